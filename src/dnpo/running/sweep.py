"""Report on a whole multirun: shared stages, failed jobs, and a table that compares the jobs."""

import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from dnpo import __version__
from dnpo.catalogue import Metric, metric
from dnpo.errors import DnpoError
from dnpo.escape import for_terminal, say, tell
from dnpo.wording import estimate, fixed, plural, visible

if TYPE_CHECKING:
    from dnpo.report.comparison import Items, MeasureComparison
    from dnpo.report.groups import Groups
    from dnpo.store import Stage
    from dnpo.tracking.writing import MLflowTracking, Status

ERROR, PLAN, PICTURE, RESPONSE, TRAIN = "error.txt", "plan.json", "comparison.png", "response.png", "train"
COMPARISON, NUMBERS = "comparison.md", "sweep.json"
SETTINGS = "multirun.yaml"  # Hydra's, in a sweep's folder
SILENT = "it ended with neither a result nor an error; its process was probably killed"
# not attributes of the callback, since Hydra sends the callback to other processes
_HELD: list[FileLock] = []
_STARTED: list[tuple["SweepReport", DictConfig]] = []


def record_failure(folder: Path, message: str) -> None:
    """Print that a job failed, and record it for the sweep's report."""
    say(f"error: {message}", error=True)
    (folder / ERROR).write_text(message + "\n")


def report_stopped(error: Exception) -> bool:
    """Report on a sweep whose launcher has stopped, for instance because the process of a job was killed.

    Returns:
        Whether there is such a sweep; it then exits with status 1.
    """
    if not _STARTED:
        return False
    callback, config = _STARTED.pop()
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    say(
        f"error: the launcher stopped ({type(error).__name__}: {words}). Jobs that it has started may still run. This "
        "is the report on those that have ended; the same command again continues with the others",
        error=True,
    )
    callback.on_multirun_end(config)
    sys.exit(1)


def find_shared_stages(sweep: Path | None, folder: Path, stages: "Sequence[Stage]") -> dict[str, str]:
    """Return the stages that an earlier job of the sweep also computes, and record this job's stages for later jobs."""
    if sweep is None:
        return {}
    shared: dict[str, str] = {}
    for plan in sorted(sweep.glob(f"*/{PLAN}")):
        for key in json.loads(plan.read_text()):
            shared.setdefault(key, f"shared with job {plan.parent.name}")
    (folder / PLAN).write_text(json.dumps([stage.key for stage in stages]))
    return shared


def describe_place(sweep: Path, number: int) -> str:
    """Say which job of a sweep this is, of how many, and about how long the jobs after it take.

    The number of jobs is known if the sweep tries all combinations; a search decides as it goes along.

    Args:
        number: the job's number, from 0.
    """
    total = _read_total(sweep)
    done = sum((job / "summary.json").is_file() for job in sweep.iterdir() if job.is_dir())
    if total is None or not done:
        return _name(number, total)
    left = (time.time() - (sweep / SETTINGS).stat().st_mtime) / done * (total - done)
    return f"{_name(number, total)}, about {estimate(left)} left"


def name_job(sweep: Path, number: int) -> str:
    """Say which job of a sweep this is, and of how many if that is known.

    Args:
        number: the job's number, from 0.
    """
    return _name(number, _read_total(sweep))


def _name(number: int, total: int | None) -> str:
    return f"job {number + 1}" + ("" if total is None else f" of {total}")


def find_varying(sweep: Path, overrides: Sequence[str]) -> list[str]:
    """Return a job's seed, and those of its overrides that the sweep's command does not give to all jobs."""
    try:
        given = yaml.safe_load((sweep / SETTINGS).read_text(encoding="utf-8"))["hydra"]["overrides"]["task"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return list(overrides)
    return [each for each in overrides if each not in given or each.startswith("seed=")] or list(overrides)


def _read_total(sweep: Path) -> int | None:
    try:
        return _count_jobs(yaml.safe_load((sweep / SETTINGS).read_text(encoding="utf-8"))["hydra"])
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return None


def _count_jobs(settings: Mapping[str, Any]) -> int | None:
    """The number of combinations, from Hydra's own settings; None if the sweeper does not try them all."""
    sweeper = settings["sweeper"]
    if not str(sweeper["_target_"]).endswith(".BasicSweeper"):
        return None
    given = [str(each) for each in settings["overrides"]["task"]]
    named = {each.partition("=")[0] for each in given}
    given += [f"{name}={value}" for name, value in (sweeper.get("params") or {}).items() if name not in named]
    overrides = OverridesParser.create().parse_overrides(given)
    if any(each.is_sweep_override() and not each.is_discrete_sweep() for each in overrides):
        return None  # Hydra refuses it
    return math.prod(len(list(each.sweep_iterator())) if each.is_sweep_override() else 1 for each in overrides)


class SweepReport(Callback):
    """Reports on a multirun at its start and at its end.

    At the end it shows the table and the failures, tracks the comparison with the sweep's parent run in MLflow, and
    exits with status 1 if a job failed.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the sweep, and take the lock that shows that it is running."""
        sweep = Path(config.hydra.sweep.dir)
        total = _count_jobs(config.hydra)
        jobs = "" if total is None else f" of {plural(total, 'job')}"
        where = "" if config.get("plan") or config.get("check") else f", in {os.path.relpath(sweep)}"
        tell(f"dnpo {__version__}: a sweep{jobs}{where}")
        from dnpo.tracking.writing import HELD  # takes a while to import

        sweep.mkdir(parents=True, exist_ok=True)
        _HELD.append(FileLock(sweep / HELD))
        _HELD[-1].acquire()
        _STARTED.append((self, config))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Gather the jobs' results from the sweep's folder, report them and release the lock."""
        _STARTED.clear()
        sweep = Path(config.hydra.sweep.dir)
        folders = (p for p in sweep.iterdir() if p.is_dir() and not p.name.startswith("."))  # launchers keep logs there
        jobs = sorted(folders, key=lambda p: (len(p.name), p.name))
        failed = {job.name: (job / ERROR).read_text().strip() for job in jobs if (job / ERROR).is_file()}
        rows = [
            (_overrides(job), json.loads((job / "summary.json").read_text()))
            for job in jobs
            if (job / "summary.json").is_file()
        ]
        numbers = _gather(sweep, rows)
        for job, message in failed.items():
            shown = for_terminal(f"({' '.join(_overrides(sweep / job))}): {message}")
            say(f"job {job} failed {shown}", error=True)
        untracked, pages = _track(config, sweep, jobs, failed)
        if numbers and not (sweep / COMPARISON).is_file():
            _show_spread(numbers)
        if rows if config.hydra.job.config_name == TRAIN else len(failed) < len(jobs):
            _show_places(sweep, [summary["settings"]["store"] for _, summary in rows], pages)
        if untracked:
            say(f"error: the comparison of the sweep could not be tracked: {untracked}", error=True)
        while _HELD:
            held = _HELD.pop()
            held.release()
            Path(held.lock_file).unlink(missing_ok=True)
        if failed or untracked:
            raise SystemExit(1)


def _gather(sweep: Path, jobs: Sequence[tuple[list[str], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Gather the numbers of all runs by settings, iteration and metric, and write them to ``sweep.json``."""
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for overrides, summary in jobs:
        name = " ".join(o for o in overrides if not o.startswith("seed=")) or "defaults"
        groups.setdefault(name, []).append(summary["table"])
    longest = max((table for tables in groups.values() for table in tables), key=len, default=[])
    found = []
    for shown in map(metric, ("eval/score", "eval/accuracy", "eval/loss")):
        for name, tables in groups.items():
            for iteration in (row["iteration"] for row in longest):
                rows = [row for table in tables for row in table if row["iteration"] == iteration]
                values = [shown.scale * row[shown.name] for row in rows if shown.name in row]
                found.append({"settings": name, "iteration": iteration, "metric": shown.name, "values": values})
    measured = {each["metric"] for each in found if each["values"]}
    found = [each for each in found if each["metric"] in measured]
    if found:
        (sweep / NUMBERS).write_text(json.dumps(found, indent=1))
    return found


def _show_spread(numbers: Sequence[Mapping[str, Any]]) -> None:
    """Show means and standard deviations over seeds, if the comparison with intervals is missing."""
    from dnpo.running.console import Console
    from dnpo.screen import ScreenTable

    console = Console()
    names = list(dict.fromkeys(each["settings"] for each in numbers))
    alike = set.intersection(*(set(name.split(" ")) for name in names)) if len(names) > 1 else set()
    if alike:
        console.say(f"\nall jobs: {' '.join(o for o in names[0].split(' ') if o in alike)}")
    for shown in map(metric, dict.fromkeys(each["metric"] for each in numbers)):
        rows = [each for each in numbers if each["metric"] == shown.name]
        iterations = list(dict.fromkeys(each["iteration"] for each in rows))
        view = ScreenTable()
        for heading in ("settings", "runs", *map(str, iterations)):
            view.add_column(heading, justify="left" if heading == "settings" else "right", no_wrap=True)
        for name in names:
            values = [each["values"] for each in rows if each["settings"] == name]
            different = " ".join(o for o in name.split(" ") if o not in alike)
            view.add_row(different, str(max(map(len, values))), *(_format(shown, some) for some in values))
        console.say(f"\n{shown.axis}: mean ± standard deviation over seeds")
        console.table(view)


def _format(shown: Metric, values: Sequence[float]) -> str:
    import statistics

    if not values:
        return "–"
    if len(values) == 1:
        return fixed(values[0], shown.digits)
    spread = statistics.stdev(values)
    digits = visible([spread], shown.digits)
    return f"{fixed(statistics.fmean(values), digits)} ± {fixed(spread, digits)}"


def _show_comparison(compared: "Sequence[MeasureComparison]") -> None:
    """Show the means and the paired differences with their intervals."""
    from dnpo.running.console import Console
    from dnpo.screen import ScreenTable

    console = Console()
    for one in compared:
        parts = [(one.measure.metric.axis, one.means)]
        parts += [] if one.differences is None else [(f"Differences from {one.baseline}, paired", one.differences)]
        for title, table in parts:
            view = ScreenTable()
            for heading in ("settings", *table.columns):
                view.add_column(heading, justify="left" if heading == "settings" else "right", no_wrap=True)
            for row in table.rows:
                view.add_row(row.label, *("" if shown is None else shown.text for shown in row.shown))
            console.say(f"\n{title}")
            console.table(view)
        for text in (parts[-1][1].caption, *one.notes):
            console.tell(text)


def _show_places(sweep: Path, stores: Sequence[str], pages: Sequence[str]) -> None:
    """Show where the results of all jobs are, and what to do next.

    Args:
        stores: the store of each run; no command shows the results of jobs that are not runs.
        pages: lines on where the tracked runs can be viewed.
    """
    from dnpo.running.console import Console
    from dnpo.running.ending import list_places

    files = {"numbers": sweep / NUMBERS, "comparison": sweep / COMPARISON}
    where: dict[str, object] = {"results": sweep, **{label: file for label, file in files.items() if file.is_file()}}
    where |= {"stages": ", ".join(dict.fromkeys(stores))} if stores else {}
    console = Console()
    for line in ("", *list_places(where, pages, sweep if stores else None)):
        console.place(line)


def _track(
    config: DictConfig, sweep: Path, jobs: Sequence[Path], failed: Mapping[str, str]
) -> tuple[str, Sequence[str]]:
    """Track the comparison with the sweep's parent run and end that run.

    If no job was tracked, there is no parent run, so nothing is done.

    Returns:
        An error message, "" for success; and lines on where the tracked runs can be viewed.
    """
    from omegaconf import OmegaConf

    from dnpo.settings import build
    from dnpo.tracking import PARENT_ID

    own = sweep / PARENT_ID
    if not own.is_file():
        return "", ()
    pages: Sequence[str] = ()
    silent = {job.name: SILENT for job in jobs if not any((job / left).is_file() for left in ("summary.json", ERROR))}
    try:
        settings = cast(dict[str, Any], OmegaConf.to_container(config.tracking, resolve=True))
        tracking: MLflowTracking = build("tracking", settings).open()
        tracking.resume(own.read_text(), sweep)
        pages = tracking.whereabouts()
        if config.hydra.job.config_name != TRAIN:  # other commands have no iterations to compare
            tracking.tags({"dnpo.jobs": str(len(jobs)), "dnpo.failed": str(len(failed))})
            return tracking.finish("FAILED" if failed else "FINISHED"), pages
        status: Status = "FAILED"
        try:
            _compare(tracking, sweep, [job.name for job in jobs], {**failed, **silent})
            status = "FAILED" if failed or silent else "FINISHED"
        finally:
            left = tracking.finish(status)
        return left, pages
    except Exception as error:  # drivers of databases raise many types of errors; the jobs' results remain valid
        return str(error) if isinstance(error, DnpoError) else f"{type(error).__name__}: {error}", pages


def _compare(tracking: "MLflowTracking", sweep: Path, jobs: Sequence[str], failed: Mapping[str, str]) -> None:
    """Track the comparison of all runs as tables, a picture and a note, and set the tags."""
    from dnpo.report.comparison import MEASURES, Items, compare
    from dnpo.report.drawing import responses
    from dnpo.report.groups import group_runs
    from dnpo.report.response import find_responses
    from dnpo.running import notes
    from dnpo.tracking.reading import SWEEP, Database

    runs = Database(tracking.uri, tracking.experiment).runs(sweeps=[tracking.id])
    name = runs[0].tags.get(SWEEP, sweep.name)
    groups, items = group_runs(runs), Items()
    compared = [one for measure in MEASURES if (one := compare(groups, measure, items)) is not None]
    pictures = []
    if compared:
        pictures.append(PICTURE)
        _draw(groups, compared, items, sweep / PICTURE, f"sweep {name}")
        (sweep / COMPARISON).write_text(notes.comparison(compared))
        (sweep / "comparison.csv").write_text(_csv(compared))
        (sweep / "comparison.json").write_text(json.dumps(_table_for_mlflow(compared)))
        found = find_responses(groups, compared[0].measure, items)
        if found:
            pictures.append(RESPONSE)
            bars = "The last policy of each run. Bars: 95 % t intervals."
            responses(found, sweep / RESPONSE, f"sweep {name}", bars)
        for file in (*pictures, COMPARISON, "comparison.csv"):
            tracking.artifact(sweep / file)
        for iteration, values in summarise(groups, compared).items():
            tracking.metrics(values, iteration)
        tracking.table(sweep / "comparison.json")
    if (sweep / NUMBERS).is_file():
        tracking.artifact(sweep / NUMBERS)
    overrides = {job: _overrides(sweep / job) for job in failed}
    addresses = [f"get-artifact?path={picture}&run_uuid={tracking.id}" for picture in pictures]
    tracking.note(notes.describe_sweep(name, len(jobs), groups, compared, failed, overrides, sys.argv[1:], addresses))
    state = "incomplete" if failed else "complete"
    tracking.tags({"dnpo.jobs": str(len(jobs)), "dnpo.failed": str(len(failed)), "dnpo.state": state})
    if compared:
        _show_comparison(compared)


def summarise(groups: "Groups", compared: "Sequence[MeasureComparison]") -> dict[int, dict[str, float]]:
    """Return the metrics of a sweep's parent run by iteration: each group's mean over seeds, and the best of them."""
    from dnpo.tracking.reading import SFT

    found: dict[int, dict[str, float]] = {}
    for iteration in groups.iterations:
        row = found.setdefault(-1 if iteration == SFT else int(iteration), {})
        for shown in (one.measure.metric for one in compared):
            means = {g.label: sum(v) / len(v) for g in groups.groups if (v := g.values(iteration, shown.name))}
            if means:
                row[f"best/{shown.name}"] = (max if shown.better == "higher" else min)(means.values())
            row |= {f"mean/{shown.name}/{_plain(label)}": mean for label, mean in means.items()}
    return found


def _plain(label: str) -> str:
    """Return a group's label with only those characters that MLflow accepts in names."""
    return label.replace(" · ", " ").replace("=", " ")


def _draw(groups: "Groups", compared: "Sequence[MeasureComparison]", items: "Items", path: Path, title: str) -> None:
    """Draw one panel per measure, with one line per group over the iterations."""
    from dnpo.palette import choose_looks
    from dnpo.report.comparison import mean_of
    from dnpo.report.drawing import Panel, over_iterations
    from dnpo.stats.intervals import Estimate
    from dnpo.tracking.reading import SFT

    panels = []
    for one in compared:
        values: dict[str, dict[int, Estimate]] = {}
        for group in groups.groups:
            for iteration in groups.iterations:
                mean = mean_of(group, iteration, one.measure, items)
                if mean is not None:
                    values.setdefault(group.label, {})[-1 if iteration == SFT else int(iteration)] = mean
        panels.append(Panel(one.measure.metric, values))
    styles = choose_looks({group.label: group.options for group in groups.groups})
    over_iterations(panels, path, title, "Bars: 95 % t intervals.", styles, joined=not groups.branching)


def _csv(compared: "Sequence[MeasureComparison]") -> str:
    """Return all tables as CSV, with one line per cell."""
    from dnpo.stats.table import to_csv

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for one in compared:
        for shows, table in (("mean", one.means), (f"difference from {one.baseline}", one.differences)):
            if table is not None:
                head, *lines = csv.reader(to_csv(table).splitlines())
                if not out.tell():
                    writer.writerow(["measure", "shows", *head])
                writer.writerows([one.measure.metric.name, shows, *line] for line in lines)
    return out.getvalue()


def _table_for_mlflow(compared: "Sequence[MeasureComparison]") -> dict[str, Any]:
    """Join the tables into one in MLflow's form. MLflow groups rows by the first column, so no text is there twice."""
    columns = list(dict.fromkeys(column for one in compared for column in one.means.columns))
    data = []
    for one in compared:
        for less, table in (("", one.means), (f" less {one.baseline}", one.differences)):
            if table is None:
                continue
            for row in table.rows:
                cells = dict(zip(table.columns, row.shown, strict=True))
                texts = [shown.text if (shown := cells.get(column)) is not None else "" for column in columns]
                data.append([f"{one.measure.metric.axis}: {row.label}{less}", *texts])
    return {"columns": ["mean or difference", *columns], "data": data}


def _overrides(folder: Path) -> list[str]:
    from omegaconf import OmegaConf

    path = folder / ".hydra" / "overrides.yaml"
    return [str(o) for o in OmegaConf.load(path)] if path.is_file() else []
