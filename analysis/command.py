"""The command line: choose scripts and runs, draw, and report the outcome of each script."""

import argparse
import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from matplotlib import rc_context

from analysis.drawing import STYLE
from analysis.keeping import log, write
from analysis.selection import Runs, select
from dnpo.commands.grammar import Parser, parse, program
from dnpo.errors import DnpoError, SettingsError
from dnpo.escape import tell
from dnpo.settings import offer
from dnpo.tracking.client import default_uri
from dnpo.tracking.reading import Database
from dnpo.wording import plural

HERE = Path(__file__).parent
BESIDE = 28  # letters of a name in the list of figures and tables
ANY = "any"  # in place of a sweep: all runs, in any sweep or in none


@dataclass(frozen=True)
class Outcome:
    """The outcome of a script: ``drawn``, ``skipped`` (its data are missing) or ``failed`` (a bug)."""

    name: str
    state: str
    text: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m analysis`` and return its exit status: 1 if nothing could be drawn or a script has a bug."""
    asked = parse(parser(), arguments)
    try:
        known = scripts(asked.also)
        if asked.list or not asked.names:
            for name, script in known.items():
                tell(f"{name:{BESIDE}}{_title(script)}", hang=BESIDE)
            return 0
        names = resolve(asked.names, asked.also)
        tags = dict(_pair(given) for given in asked.tag)
        database = Database(asked.uri, asked.experiment)
    except DnpoError as error:
        tell(f"error: {error}", error=True)
        return 1

    @cache
    def runs(sweep: str) -> Runs:
        sweeps = asked.sweep or ([] if asked.runs else [sweep])
        return select(database, [name for name in sweeps if name != ANY], asked.runs, tags)

    if asked.sweep or asked.runs:  # if given, all scripts have the same selection
        try:
            runs("")
        except DnpoError as error:
            tell(f"error: {error}", error=True)
            return 1
    outcomes: list[Outcome] = []
    for name in names:
        outcome = _run(name, known[name], database, runs, asked.out, asked.log)
        same = next((each.name for each in outcomes if each.text == outcome.text), "")
        tell(f"{outcome.name}: {f'skipped, for the same reason as {same}' if same else outcome.text}")
        outcomes.append(outcome)
    return _report(outcomes)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(prog=program("analysis", "figures"), description="Figures and tables from tracked runs.")
    options.add_argument("names", nargs="*", metavar="NAME", help="fig05, table01, …, or all")
    options.add_argument("--list", action="store_true", help="list the scripts, each with its sweep")
    options.add_argument(
        "--also",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="a folder with more scripts, figNN_name.py or tableNN_name.py; can be repeated",
    )
    options.add_argument(
        "--uri",
        default=default_uri(),
        help="where runs were tracked (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    options.add_argument("--experiment", default="dnpo", help="MLflow experiment (default: %(default)s)")
    options.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME",
        help="this sweep instead of each script's own; can be repeated; any takes all runs",
    )
    options.add_argument("--runs", nargs="+", default=[], metavar="ID", help="only these runs")
    options.add_argument(
        "--tag",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only runs with this tag or setting; can be repeated",
    )
    options.add_argument(
        "--out",
        type=Path,
        default=Path("figures"),
        metavar="FOLDER",
        help="folder of the results (default: %(default)s)",
    )
    options.add_argument("--no-log", dest="log", action="store_false", help="write files, log nothing to MLflow")
    return options


def alone(name: str) -> int:
    """Run one script, as in ``python -m analysis.fig05_benchmark sweep=main``."""
    return main([name, *sys.argv[1:]])


def scripts(also: Sequence[Path] = ()) -> dict[str, Path]:
    """The scripts by name: first those of this folder, in the order of the paper, then those in further folders.

    Raises:
        SettingsError: there is no such folder, or two scripts have the same name.
    """
    paths: dict[str, Path] = {}
    for folder in (HERE, *also):
        if not folder.is_dir():
            raise SettingsError(f"also={folder}: there is no such folder")
        for path in sorted(path for kind in ("fig", "table") for path in folder.glob(f"{kind}[0-9]*.py")):
            if path.stem in paths:
                raise SettingsError(f"{path}: another script has this name, {paths[path.stem]}")
            paths[path.stem] = path
    return paths


def resolve(given: Sequence[str], also: Sequence[Path] = ()) -> list[str]:
    """Find scripts by name, by its first part (``fig05``) or by an alias in ``ALSO``; ``all`` gives every script.

    Raises:
        SettingsError: there is no such script.
    """
    known = scripts(also)
    if "all" in given:
        return list(known)
    names = []
    for name in given:
        matches = [
            each
            for each, path in known.items()
            if each.split("_")[0] == name or each == name or name in _read_aliases(path)
        ]
        if not matches:
            short = [each.split("_")[0] for each in known]
            raise SettingsError(f"{name}: there is no such figure or table.{offer(name, short)}")
        names += matches
    return list(dict.fromkeys(names))


def _run(name: str, path: Path, database: Database, runs: Callable[[str], Runs], out: Path, logged: bool) -> Outcome:
    started = time.monotonic()
    try:
        script = load(path)
        with rc_context(STYLE):
            drawing = script.make(runs(script.SWEEP))
            paths = write(drawing, name, out)
        where = f", logged to {_count(log(database, drawing.runs, paths))}" if logged else ""
        state, text = "drawn", f"{paths[0].with_suffix('')}.{{{','.join(p.suffix[1:] for p in paths)}}}{where}"
    except DnpoError as error:
        state, text = "skipped", str(error)
    except Exception:  # a bug in one script must not stop the others; its traceback is printed, the exit status is 1
        state, text = "failed", traceback.format_exc()
    return Outcome(name, state, text, time.monotonic() - started)


def _report(outcomes: Sequence[Outcome]) -> int:
    wide = max(len(each.name) for each in outcomes)
    print()
    for each in outcomes:
        print(f"{each.name:{wide}}  {each.state:8}{each.seconds:6.1f} s")
    states = [each.state for each in outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{counts} in {sum(each.seconds for each in outcomes):.1f} s")
    return int("failed" in states or "drawn" not in states)


def load(path: Path) -> ModuleType:
    """Import a script."""
    if path.parent == HERE:
        return importlib.import_module(f"analysis.{path.stem}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def _title(path: Path) -> str:
    script = load(path)
    return f"{script.TITLE} (sweep {script.SWEEP})"


def _read_aliases(path: Path) -> Sequence[str]:
    """Other names of a script, such as the name of a second figure in it."""
    return getattr(load(path), "ALSO", ())


def _count(runs: int) -> str:
    return f"{plural(runs, 'run')} in MLflow"


def _pair(given: str) -> tuple[str, str]:
    name, equals, value = given.partition("=")
    if not (name and equals):
        raise SettingsError(f"tag={given}: expected NAME=VALUE")
    return name, value
