"""Find the run, or the runs of a sweep, that the page describes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dnpo.errors import DataError
from dnpo.settings import nearest
from dnpo.tracking.reading import PARENT, SWEEP, Database, TrackedRun, is_of_sweep
from dnpo.wording import plural

SUMMARY = "summary.json"


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


def _run_of_folder(folder: Path, runs: Iterable[TrackedRun]) -> TrackedRun:
    """Find the run that wrote this folder's ``summary.json``, by comparing the files that runs tracked.

    Raises:
        DataError: the folder has no such file, or no run tracked it.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise DataError(
            f"{folder}: it has no {SUMMARY}, so its run did not finish, and it is not the folder of a tracked sweep. "
            "Give the id of the run, which MLflow shows: a page can be written on an unfinished run too"
        )
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
