"""Find the run, or the runs of a sweep, that the page describes."""

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dnpo.errors import DataError
from dnpo.settings import nearest
from dnpo.tracking import RUN_ID
from dnpo.tracking.reading import PARENT, SWEEP, Database, TrackedRun, is_of_sweep
from dnpo.wording import plural

SUMMARY = "summary.json"
OF_A_RUN = (".hydra", "train.log", RUN_ID)  # what a run writes before it finishes
MOST_NAMED = 8  # runs in a message


@dataclass(frozen=True)
class Selection:
    """Runs to report on.

    Attributes:
        name: name of the sweep or run.
        sweep: whether the page describes a sweep; otherwise it describes one run.
        runs: the runs, oldest first.
        own: the tracked run that the page belongs to: the run itself, or the sweep's parent run, if it has one.
        left_out: a sentence on sweeps of the same name that are not shown; "" if there are none.
    """

    name: str
    sweep: bool
    runs: tuple[TrackedRun, ...]
    own: TrackedRun | None
    left_out: str = ""


def select(database: Database, given: str) -> Selection:
    """Find a run or a sweep. If several sweeps have the name, select the newest: others may have other settings.

    Args:
        given: the id of a run or of a sweep's parent run, or the beginning of one; a run's folder; or a sweep's name
            or folder.

    Raises:
        DataError: nothing matches, or more than one run does.
    """
    named = database.find_named_sweep(given)
    if named:
        return _newest(database, named)
    runs = database.runs()
    folder = Path(given)
    if given and folder.is_dir():
        of_sweep = _sweep_of_folder(database, folder, runs)
        return _sweep(database, of_sweep) if of_sweep else _single(_run_of_folder(folder, runs))
    own = _parents(database, runs)
    hits = [each for each in [*runs, *own.values()] if each.id.startswith(given)] if given else []
    if len(hits) > 1:
        raise DataError(f"{given}: {len(hits)} runs have ids that begin so; give more of it")
    if hits and hits[0].id in own:
        return _sweep(database, [run for run in runs if run.tags.get(PARENT) == hits[0].id])
    if hits:
        return _single(hits[0])
    names = database.sweeps()
    offered = nearest(given, names) if names else " No run there is part of a named sweep."
    raise DataError(
        f"{given}: no run and no sweep of that name is tracked in {database.uri}, experiment {database.experiment} "
        f"({plural(len(runs), 'run')}). Give the id of a run or its beginning, the folder of a run or a sweep, or a "
        "sweep's name."
        f"{offered}"
    )


def _single(run: TrackedRun) -> Selection:
    return Selection(run.name, False, (run,), run)


def _newest(database: Database, runs: Sequence[TrackedRun]) -> Selection:
    """Select the newest sweep among those that have the name, and list the others."""
    by_sweep: dict[str, list[TrackedRun]] = {}
    for run in sorted(runs, key=lambda run: run.started):
        by_sweep.setdefault(run.tags.get(PARENT, ""), []).append(run)
    *older, newest = sorted(by_sweep.items(), key=lambda each: each[1][-1].started)
    selection = _sweep(database, newest[1])
    if not older:
        return selection
    names = ", ".join(f"{key[:12] or 'without a sweep'} ({plural(len(some), 'run')})" for key, some in older)
    left_out = f"Only the newest sweep of this name is shown. Older ones can be given by their ids: {names}."
    return replace(selection, left_out=left_out)


def _sweep(database: Database, runs: Iterable[TrackedRun]) -> Selection:
    ordered = tuple(sorted(runs, key=lambda run: run.started))
    own = sorted(_parents(database, ordered).values(), key=lambda run: run.started)
    # A sweep without a name is named by its folder.
    name = ordered[-1].tags.get(SWEEP) or (Path(own[-1].tags.get("dnpo.sweep", "")).name if own else "")
    return Selection(name or "sweep", True, ordered, own[-1] if own else None)


def _parents(database: Database, runs: Iterable[TrackedRun]) -> dict[str, TrackedRun]:
    """Return the parent runs of the runs' sweeps, by id."""
    first = {run.tags[PARENT]: run for run in runs if PARENT in run.tags}
    parents = {key: database.parent(run) for key, run in first.items()}
    return {key: parent for key, parent in parents.items() if parent is not None}


def _sweep_of_folder(database: Database, folder: Path, runs: Iterable[TrackedRun]) -> list[TrackedRun]:
    own = {key for key, parent in _parents(database, runs).items() if is_of_sweep(parent, folder)}
    return [run for run in runs if run.tags.get(PARENT) in own]


def describe_no_run(folder: Path, verb: str) -> str:
    """Say why a folder without ``summary.json`` cannot be shown: it is no run's, or its run has not finished.

    Args:
        verb: the command that was given the folder, to be offered for the runs inside.
    """
    inside = sorted({path.parent for name in (SUMMARY, RUN_ID) for path in folder.glob(f"*/{name}")})
    if inside:
        commands = ", ".join(f"`dnpo {verb} {shlex.quote(str(each))}`" for each in inside[:MOST_NAMED])
        more = f" and {len(inside) - MOST_NAMED} more" * (len(inside) > MOST_NAMED)
        return f"{folder}: it is not the folder of a run, but it has {plural(len(inside), 'run')}: {commands}{more}"
    if any((folder / name).exists() for name in OF_A_RUN):
        where = f"in its file {RUN_ID}" if (folder / RUN_ID).is_file() else "on its page in MLflow, if it was tracked"
        return (
            f"{folder}: its run has not finished, since it has no {SUMMARY}. `dnpo report` takes an unfinished run by "
            f"its id, which is {where}"
        )
    return f"{folder}: it is not the folder of a run or of a tracked sweep; a run's folder is outputs/DATE/TIME"


def _run_of_folder(folder: Path, runs: Iterable[TrackedRun]) -> TrackedRun:
    """Find the run of a folder by the id in it, or else by comparing its ``summary.json`` with what runs tracked.

    Raises:
        DataError: the folder is not a run's, or no run tracked it.
    """
    note, path = folder / RUN_ID, folder / SUMMARY
    noted = note.read_text().strip() if note.is_file() else ""
    own = next((run for run in runs if run.id == noted), None)
    if own is not None:
        return own
    if not path.is_file():
        if noted:
            raise DataError(f"{folder}: its run {noted} is not tracked here; give uri=…, where it was tracked")
        raise DataError(describe_no_run(folder, "report"))
    content = path.read_bytes()
    try:
        keys = {stage["key"] for stage in json.loads(content)["stages"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: it is not the summary of a run ({error})") from error
    for run in runs:
        if keys <= {value for name, value in run.tags.items() if name.startswith("stage.")}:
            tracked = run.artifact(SUMMARY)
            if tracked is not None and tracked.read_bytes() == content:
                return run
    raise DataError(f"{folder}: no tracked run has its {SUMMARY}; give uri=…, where it was tracked")
