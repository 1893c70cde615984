"""Assess the papers' claims in ``claims.yaml`` on the tracked sweeps.

    python -m analysis.claims                                     # from what is tracked in ./mlflow.db
    python -m analysis.claims run=true jobs=2                     # first runs the sweeps that are missing
    python -m analysis.claims exploratory=true seeds=0,1,2,3,4    # also runs older than the claims, marked
    python -m analysis.claims uri=sqlite:///elsewhere.db tag=data.train=4800
    python -m analysis.claims measured=claims/claims.json run=true      # runs only what that table lacks
    python -m analysis.claims forecast=claims                     # the planner's forecast beside the actual runs
    python -m analysis.claims_plan                                # how many seeds and prompts the claims need

Claims are tested only on the seeds that their file fixes and on runs made after the commit of that file.

Writes ``claims.md``, ``claims.csv``, ``claims.json`` and ``claims.tex``, the effects by seed (``seeds.csv``) and the
policies of the runs that were read (``runs-SWEEP.csv``), and logs them to MLflow in a separate run; ``claims.json`` is
also logged with the sweeps that were read. The exit status is 1 if no claim could be measured, or if a sweep failed.

``claims_book.py`` explains the file of claims, ``claims_rules.py`` the decision rule, and ``claims_registered.py`` says
which runs test the claims. ``claims_measures.py`` has the measures, ``claims_assess.py`` computes them from runs, and
``claims_earlier.py`` takes them over from an earlier table. ``claims_forecast.py`` compares them with the plan.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from analysis import claims_forecast as forecast
from analysis import claims_page as page
from analysis import claims_tables as tables
from analysis.claims_assess import Result, Tracked, assess
from analysis.claims_book import Book, Claim, Sweep, read
from analysis.claims_earlier import NONE, Earlier, SweepRead
from analysis.claims_earlier import read as read_earlier
from analysis.claims_options import choose_seeds, execute, make_parser, pair_tags
from analysis.claims_registered import Registration
from analysis.claims_rules import CHECKED, OUTCOMES
from analysis.claims_runs import describe_work, newest, to_csv
from analysis.keeping import log as keep
from analysis.keeping import make_folder, writing_to
from dnpo.errors import SettingsError, TrackingError
from dnpo.escape import say, tell
from dnpo.running.console import Console
from dnpo.screen import ScreenTable
from dnpo.tracking.reading import KIND, Database
from dnpo.wording import plural, ranges

BRIEF = "claims-brief.md"
CLAIMS, FORECAST = "claims", "forecast"  # blocks of a page
SHOWN = ("scale", "data", "model", "judge")  # options of the runs that the caption gives
LAUNCHER = "hydra_plugins.hydra_joblib_launcher"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return execute(parser(), _go, arguments, "Finished stages are kept: run the same command again.")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    seeds = "such as 5,6,7 (default: those of the file; exploratory: all that are tracked)"
    options = make_parser("analysis.claims", "claims", "The papers' claims, measured here.", seeds)
    options.add_argument(
        "--exploratory",
        action="store_true",
        help="also take other seeds, and runs older than the claims, and mark them",
    )
    options.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="claims.json of an earlier table: claims whose runs are not tracked here are taken from it",
    )
    options.add_argument(
        "--forecast",
        type=Path,
        metavar="FOLDER",
        help="what dnpo claims plan wrote, the folder or its plan.csv: compare its forecast with the actual runs",
    )
    options.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="a Markdown file: its part between the marks for claims becomes the tables, likewise for the forecast",
    )
    options.add_argument("--run", action="store_true", help="first run the sweeps that are missing")
    options.add_argument("--jobs", type=int, default=2, help="parallel jobs of a sweep (%(default)s)")
    options.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="[SWEEP:]NAME=VALUE",
        help="a setting for every sweep that is run, or for one",
    )
    options.add_argument("--no-log", action="store_true", help="log nothing to MLflow")
    return options


def _go(options: argparse.Namespace) -> int:
    book = read(options.claims)
    registration = Registration.of(book.path)
    seeds = choose_seeds(book, options)
    if registration.problem and not options.exploratory:
        raise SettingsError(
            f"claims={options.claims}: {registration.problem}. Commit it before its seeds are run; exploratory=true "
            "takes all runs, and marks the results"
        )
    where = pair_tags(options.tag)
    required = None if options.exploratory else registration
    forecasts = None if options.forecast is None else forecast.read(options.forecast, book, required)
    if options.page is not None:
        page.expect(options.page, [CLAIMS] + [FORECAST] * (forecasts is not None))
    earlier = read_earlier(options.measured, book, required) if options.measured else NONE
    failed: list[str] = []
    clock = time.monotonic()
    if options.run:
        failed = run_missing(book, options, where, seeds or book.seeds, earlier)
    database = None
    try:
        database = Database(options.uri, options.experiment)
    except TrackingError as error:
        if not earlier.results:
            raise TrackingError(f"{error}. To run the sweeps first: python -m analysis.claims run=true") from error
    make_folder(options.out)  # refused before the runs are read
    tracked = Tracked.of(book, database, where, seeds, required)
    began = time.monotonic()
    results = assess(book, tracked, options.exploratory, earlier.results)
    sweeps = describe_sweeps(results, tracked, earlier)
    print(
        f"{plural(len(results), 'claim')} measured in {time.monotonic() - began:.0f} s; "
        f"{time.monotonic() - clock:.0f} s in all"
    )
    about = f"{_registered(book, registration, options.exploratory)} {_about(book, sweeps)}"
    files = write(results, {"about": about, "registered": registration.commit, "sweeps": sweeps}, options.out)
    files += write_runs(book, tracked, options.out)
    blocks = {CLAIMS: tables.brief(results, about)}
    if forecasts is not None:
        rows = forecast.join(forecasts, results)
        blocks[FORECAST] = forecast.markdown(rows, forecast.describe(forecasts, rows, results))
        files += _write(options.out, {"forecast.md": blocks[FORECAST], "forecast.csv": forecast.to_csv(rows)})
    if options.page is not None:
        page.write(options.page, blocks)
        if forecasts is None and page.content(options.page, FORECAST):
            tell(f"page={options.page}: its forecast is left as it was; forecast=… makes it again")
    Console().table(on_screen(results), fold=True)
    for remark in tables.remarks(results):
        if "not measured" in remark:
            tell(remark)
    tell(f"\n{tables.caption(results, about)[0]}")
    if forecasts is not None:
        tell(f"Forecast: {forecast.conclude(rows)}")
    say(f"results     {options.out}")
    if database is not None and not options.no_log:
        log(database, results, files)
    measured = any(result.effect for result in results)
    if not measured:
        tell("error: no claim could be measured", error=True)
    return int(bool(failed) or not measured)


def on_screen(results: Sequence[Result]) -> ScreenTable:
    """The outcomes in a table of which only the last column is wrapped on a narrow terminal."""
    table = ScreenTable(padding=(0, 1, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("claim", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    table.add_column("effect (95 %)")
    for role, members in groupby(enumerate(results, 1), key=lambda each: each[1].claim.role):
        table.add_row("", Text(role, style="bold"))
        for place, result in members:
            effect = "" if result.effect is None else tables.format_effect(result)
            table.add_row(str(place), result.claim.id, result.outcome, effect)
    return table


def _registered(book: Book, registration: Registration, exploratory: bool) -> str:
    """Which runs test which claims, in a sentence."""
    if exploratory:
        return f"Exploratory ({registration.text}): also runs older than the claims, and seeds that they do not fix."
    return f"Claims: {registration.text}; only runs made after this commit are used, of seeds {ranges(book.seeds)}."


def describe_sweeps(results: Sequence[Result], tracked: Tracked, earlier: Earlier) -> dict[str, SweepRead]:
    """What was read of each sweep; if its claims were measured earlier, what the earlier table says."""
    found = {}
    kept = {result.claim.sweep for result in results if result.effect is not None and not result.runs}
    for sweep, every in tracked.runs.items():
        runs = newest(every)
        seeds = tracked.seeds(sweep)
        of = f" of seeds {ranges(seeds)}" if seeds else ""
        short = f", {tracked.unfinished[sweep]} unfinished and left out" if tracked.unfinished[sweep] else ""
        refused = f"; left out: {tracked.refused[sweep]}" if sweep in tracked.refused else ""
        options = {part: sorted({run.option(part) or "none" for run in runs}) for part in SHOWN} if runs else {}
        work = f"; {spent}" if (spent := describe_work(runs)) else ""
        here = SweepRead(text=f"{plural(len(runs), 'run')}{of}{short}{work}{refused}", options=options)
        found[sweep] = earlier.sweeps[sweep] if sweep in kept and sweep in earlier.sweeps else here
    return found


def _about(book: Book, sweeps: Mapping[str, SweepRead]) -> str:
    """The scale, and the sweeps, runs, seeds and options that were read, in sentences."""
    listed = "; ".join(f"{name} ({sweep['text']})" for name, sweep in sweeps.items())
    shared = []
    for part in SHOWN:
        values = sorted({value for sweep in sweeps.values() for value in sweep["options"].get(part, [])})
        shared += [f"{part}={' and '.join(values)}"] if values else []
    scale = f"Measured on: {book.scale}. " if shared else "No run was found. "
    return f"{scale}Sweeps read: {listed}{'; all with ' if shared else ''}{', '.join(shared)}."


# --- run missing sweeps -----------------------------------------------------------------------------------------------


def run_missing(
    book: Book,
    options: argparse.Namespace,
    where: Mapping[str, str],
    seeds: Sequence[int],
    earlier: Earlier = NONE,
) -> list[str]:
    """Run every sweep with the seeds for which claims lack a run; return the names of the sweeps that failed.

    Args:
        earlier: measurements that need no runs any more.
    """
    if options.jobs < 1:
        raise SettingsError(f"jobs={options.jobs}: expected 1 or more")
    failed = []
    for name, sweep in book.sweeps.items():
        lacking = missing_seeds(book, name, options, where, seeds, earlier)
        if not lacking:
            print(f"sweep {name}: complete for seeds {', '.join(map(str, seeds))}")
            continue
        command = sweep_command(name, sweep, lacking, options)
        print(f"sweep {name}: {' '.join(command[1:])}", flush=True)
        began = time.monotonic()
        make_folder(options.out)
        with (options.out / f"{name}.log").open("w") as stream:
            status = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
        took = f"{time.monotonic() - began:.0f} s"
        if status:
            failed.append(name)
            print(f"sweep {name}: failed after {took}, see {options.out / f'{name}.log'}", file=sys.stderr, flush=True)
        else:
            print(f"sweep {name}: {took}", flush=True)
    return failed


def missing_seeds(
    book: Book,
    sweep: str,
    options: argparse.Namespace,
    where: Mapping[str, str],
    seeds: Sequence[int],
    earlier: Earlier = NONE,
) -> list[int]:
    """The seeds without a finished run that a claim on this sweep needs, and that an earlier table lacks too."""
    try:
        database = Database(options.uri, options.experiment)
    except TrackingError:
        database = None  # nothing is tracked there yet
    registration = None if options.exploratory else Registration.of(book.path)
    tracked = Tracked.of(book, database, where, seeds, registration)
    claims = [claim for claim in book.claims if claim.sweep == sweep]

    def lacks(claim: Claim, seed: int) -> bool:
        measured = earlier.results.get(claim.id)
        return bool(tracked.missing(claim, seed)) and (measured is None or seed not in measured.complete)

    return [seed for seed in seeds if any(lacks(claim, seed) for claim in claims)]


def sweep_command(name: str, sweep: Sweep, seeds: Sequence[int], options: argparse.Namespace) -> list[str]:
    """The command that runs a sweep with some seeds; ``override=`` takes precedence over the file of claims."""
    command = [sys.executable, "-m", "dnpo.train", "-m", f"+sweep={name}", f"seed={','.join(map(str, seeds))}"]
    command += [f"tracking.uri={options.uri}", f"tracking.experiment={options.experiment}"]
    if options.jobs > 1 and find_spec("hydra_plugins") and find_spec(LAUNCHER):
        command += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={options.jobs}"]
    elif options.jobs > 1:
        tell("jobs run one after another: parallel jobs need the extra `launchers`")
    asked = [override.removeprefix(f"{name}:") for override in options.override if _meant(override, name)]
    given = {override.split("=")[0] for override in asked}
    wanted = [*sweep.overrides]
    for packages, overrides in sweep.where_installed.items():
        absent = [package for package in packages.split() if not find_spec(package)]
        if absent:
            tell(f"sweep {name}: without {' '.join(overrides)}, which needs {', '.join(absent)}")
        else:
            wanted += overrides
    return command + [override for override in wanted if override.split("=")[0] not in given] + asked


def _meant(override: str, sweep: str) -> bool:
    """Whether an override applies to a sweep: ``SWEEP:NAME=VALUE`` applies to one, ``NAME=VALUE`` to all."""
    where, colon, _ = override.split("=")[0].partition(":")
    return not colon or where == sweep


# --- results ----------------------------------------------------------------------------------------------------------


def write(results: Sequence[Result], about: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the results in all formats and return the files.

    Args:
        about: ``about``, the sentences on what was read, and whatever else the JSON is to have.
    """
    said = about["about"]
    contents = {
        "claims.md": tables.markdown(results, said),
        BRIEF: tables.brief(results, said),
        "claims.csv": tables.to_csv(results),
        "claims.json": tables.as_json(results, about),
        "claims.tex": tables.latex(results, said),
        "seeds.csv": tables.seeds_to_csv(results),
    }
    return _write(folder, contents)


def write_runs(book: Book, tracked: Tracked, folder: Path) -> list[Path]:
    """Write the policies of each sweep that has runs here, and return the files."""
    found = {f"runs-{sweep}.csv": to_csv(runs, book.arms) for sweep, runs in tracked.runs.items() if runs}
    return _write(folder, found)


def _write(folder: Path, contents: Mapping[str, str]) -> list[Path]:
    with writing_to(folder):
        for name, content in contents.items():
            (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]


def log(database: Database, results: Sequence[Result], files: Sequence[Path]) -> str:
    """Log the files as a separate run, and the numbers with the sweeps that were read; return the run's id.

    Raises:
        TrackingError: the tracking store refuses them.
    """
    outcomes = [result.outcome for result in results]
    # a note in MLflow is too short for the whole table
    note = next(file for file in files if file.name == BRIEF).read_text(encoding="utf-8")
    tags = {KIND: "claims", "mlflow.note.content": note}
    if any(result.exploratory for result in results):
        tags["dnpo.exploratory"] = "true"
    run = str(database.client.create_run(database.experiment_id, run_name="claims", tags=tags).info.run_id)
    for outcome in (*OUTCOMES, *CHECKED):
        database.client.log_metric(run, f"claims/{outcome.replace(' ', '_')}", outcomes.count(outcome))
    for result in results:
        if result.effect is not None:
            database.client.log_metric(run, f"effect/{result.claim.id}", result.effect.estimate.value)
    for file in files:
        database.client.log_artifact(run, str(file))
    keep(database, [run for result in results for run in result.runs], [f for f in files if f.suffix == ".json"])
    database.client.set_terminated(run)
    return run


if __name__ == "__main__":
    sys.exit(main())
