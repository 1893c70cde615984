"""Read tracked runs from MLflow, with their metrics and artefacts.

``analysis/`` and ``dnpo.report`` read runs only through this module, so they need neither a run's folder nor the store
of stages. A run's ``summary.json`` holds its table, one row per policy: ``iteration`` is ``SFT`` or the iteration's
number, and the other columns are the metrics that ``running/execute.py`` gathers.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from dnpo import catalogue
from dnpo.disk import name_aside
from dnpo.errors import DataError, TrackingError
from dnpo.records import mean_over_steps
from dnpo.settings import nearest
from dnpo.tracking import PARENT_ID
from dnpo.tracking.client import connect, make_absolute
from dnpo.tracking.earlier import complete, rename
from dnpo.tracking.packing import PREFIXES, STAGES, STEPS, unpack
from dnpo.tracking.sources import Source, StoredRun, open_source
from dnpo.wording import plural

FINISHED = "FINISHED"
SWEEP, KIND, PARENT = "dnpo.sweep_name", "dnpo.kind", "mlflow.parentRunId"
SFT = "SFT"
STAGE = PREFIXES[STAGES]  # prefix of the names of a run's stages among its tags, which hold their keys
AVERAGED = ("rows", "npo/shift")  # metrics that mean_of_metric needs of every step
STEPS_OF = PREFIXES[STEPS]  # prefix of the tag that names the run which tracked the steps of a reused stage


@dataclass(frozen=True)
class TrackedRun:
    """One tracked run.

    Attributes:
        status: the status in MLflow: ``FINISHED``, ``RUNNING`` (also after its process was killed), ``FAILED`` or
            ``KILLED``.
        started: start time in milliseconds since 1970.
        seconds: duration; None if the run has not ended.
        tags: its tags in MLflow, its options (``dnpo.…``) and the keys of its stages (``stage.…``).
        params: settings by dotted name, as text.
        artifacts: address of the artefacts.
        assumed: settings that the run did not record, because they did not exist yet; ``params`` has their defaults.
    """

    id: str
    name: str
    status: str
    started: int
    seconds: float | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    artifacts: str
    _source: Source = field(repr=False, compare=False)
    assumed: frozenset[str] = frozenset()

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.tags["dnpo.seed"])

    @property
    def finished(self) -> bool:
        """Whether the run finished."""
        return self.status == FINISHED

    def option(self, part: str) -> str:
        """Return the option chosen for a part, such as ``trainable`` for ``npo``; "" if there is none."""
        return self.tags.get(f"dnpo.{part}", "")

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``, which a run writes at its end.

        Raises:
            DataError: there is none, because the run did not finish.
        """
        path = self.artifact("summary.json")
        if path is None:
            raise DataError(f"run {self.id} ({self.name}) has no summary.json: its status is {self.status}")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @property
    def table(self) -> list[dict[str, Any]]:
        """One row per policy: ``iteration`` and its metrics."""
        rows: list[dict[str, Any]] = self.summary["table"]
        return rows

    def row(self, iteration: int | str) -> dict[str, Any]:
        """Return the row of one policy; empty if there is none."""
        return next((row for row in self.table if row["iteration"] == iteration), {})

    @property
    def last(self) -> dict[str, Any]:
        """The row of the last policy."""
        return self.table[-1]

    def history(self, metric: str) -> list[tuple[int, float]]:
        """Return the steps and values of a metric, ordered by step; if a step was logged twice, the later value."""
        return sorted({**dict(self._read_cached_steps(metric)), **dict(self._source.history(self.id, metric))}.items())

    def over_steps(self, metric: str) -> list[tuple[int, float]]:
        """Return a metric of training steps, as :meth:`history`, but from the run's files, which saves a query."""
        return sorted(self._read_rows(metric)) or self.history(metric)

    def _read_cached_steps(self, metric: str) -> Iterator[tuple[int, float]]:
        """Yield the training steps of reused stages. Another run tracked them, but this run keeps their files too."""
        if any(name.startswith(STEPS_OF) for name in self.tags):
            yield from self._read_rows(metric)

    def _read_rows(self, metric: str) -> Iterator[tuple[int, float]]:
        """Yield a metric from the files with the rows of the run's trainings."""
        sft, like = catalogue.SFT.prefix, catalogue.LIKE.prefix
        if metric.startswith(sft):
            yield from _values(self._rows("steps", SFT) or [], metric.removeprefix(sft), 0)
            return
        kind = "like" if metric.startswith(like) else "steps"
        before = 0
        for k in count():
            trained = self._rows("steps", k)
            if trained is None:
                return
            rows = trained if kind == "steps" else self._rows(kind, k) or []
            yield from _values(rows, metric.removeprefix(like), before)
            before += len(trained)

    def _rows(self, kind: str, iteration: int | str) -> list[dict[str, float]] | None:
        """Return the rows of a training's steps; None if this iteration has no training."""
        if (kind, iteration) not in self._steps:
            path = self.artifact(f"{kind}/{iteration_name(iteration)}.json")
            self._steps[kind, iteration] = None if path is None else json.loads(path.read_text())
        return self._steps[kind, iteration]

    @cached_property
    def _steps(self) -> dict[tuple[str, int | str], list[dict[str, float]] | None]:
        """The rows of trainings that were read."""
        return {}

    def artifact(self, path: str) -> Path | None:
        """Return a local, read-only path to a tracked file, downloading it if necessary; None if there is none."""
        folder = _local(self.artifacts)
        if folder is not None:
            return folder / path if (folder / path).exists() else None
        where = _scratch() / self.id
        where.mkdir(parents=True, exist_ok=True)
        return self._source.download(self.id, path, where)


def mean_of_metric(uri: str, run: str, metric: str) -> float:
    """Return the mean of a metric over the training steps of a run, each weighted by its rows.

    Raises:
        TrackingError: the store has no such run, or the run did not track the metric.
    """
    source = open_source(uri)
    found = source.run(run)
    if found is None:
        raise TrackingError(f"run:{run}: not found in tracking.uri={uri}")
    tracked = _run(found, source)
    rows = dict(tracked.history("rows"))
    steps = [{metric: value, "rows": rows.get(step, 1.0)} for step, value in tracked.history(metric)]
    if not steps:
        raise TrackingError(f"run:{run}: it tracked no {metric}; give a run with npo=trainable or npo=fixed")
    return mean_over_steps(steps, metric)


def read_stage_keys(uri: str) -> dict[str, set[str]]:
    """Return the keys of the stages that each tracked run names, in all experiments, by the run's name and id.

    Raises:
        TrackingError: there is no such tracking store.
    """
    source = open_source(uri)
    found = {}
    for experiment in source.experiments().values():
        for run in source.runs(experiment, {}):
            tags, _ = unpack(run.tags, run.params)
            keys = {value for name, value in tags.items() if name.startswith(STAGE)}
            found[f"{run.name} ({run.id[:8]})"] = keys
    return found


def describe_assumed(assumed: Mapping[str, Set[str]], runs: Mapping[str, TrackedRun]) -> list[str]:
    """Notes on settings that some runs did not record, one for each set of runs.

    Args:
        assumed: for each setting, the ids of these runs.
        runs: all runs by id.
    """
    together: dict[frozenset[str], list[str]] = {}
    for name, ids in assumed.items():
        value = runs[min(ids)].params[name]
        together.setdefault(frozenset(ids), []).append(f"{name}={value}")
    return [
        f"{plural(len(ids), 'run')} from before these settings existed, with their defaults: {', '.join(found)}"
        for ids, found in together.items()
    ]


def iteration_name(iteration: int | str) -> str:
    """Return the name of one policy's artefacts: ``sft``, ``iteration-0``, …"""
    return "sft" if iteration == SFT else f"iteration-{iteration}"


def _values(rows: Sequence[Mapping[str, float]], metric: str, before: int) -> Iterator[tuple[int, float]]:
    """Steps and values of a metric; the steps are numbered from ``before``."""
    for row in rows:
        if metric in row:
            yield before + int(row["step"]), float(row[metric])


_SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def _scratch() -> Path:
    """Return a folder for downloads that is deleted when the process ends."""
    if not _SCRATCH:
        _SCRATCH.append(tempfile.TemporaryDirectory(prefix="dnpo-"))
    return Path(_SCRATCH[0].name)


class Database:
    """An MLflow tracking store, from which runs are read and to which results are added.

    Args:
        uri: as in ``tracking.uri``.
        experiment: name of the MLflow experiment.

    Raises:
        TrackingError: there is no such store, or it has no such experiment.
    """

    def __init__(self, uri: str = "sqlite:///mlflow.db", experiment: str = "dnpo") -> None:
        self.uri, self.experiment = make_absolute(uri), experiment
        self._source = open_source(uri)
        known = self._source.experiments()
        if experiment not in known:
            raise TrackingError(f"{uri}: it has no experiment {experiment}.{nearest(experiment, known)}")
        self.experiment_id = known[experiment]

    @cached_property
    def client(self) -> Any:
        """MLflow's client, by which results are added."""
        return connect(self.uri)

    def log(self, run: str, file: Path, folder: str = "") -> None:
        """Add a file to a run's artefacts, by the run's id.

        Raises:
            TrackingError: the run does not exist, or the file cannot be written there.
        """
        tracked = self._source.run(run)
        if tracked is None:
            raise TrackingError(f"{self.uri}: run {run} does not exist, so {file.name} cannot be added to it")
        to = _local(tracked.artifacts)
        if to is None:
            self._source.upload(run, file, folder)
            return
        place = to / folder / file.name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            name_aside(place).write_bytes(file.read_bytes())
            name_aside(place).replace(place)
        except OSError as error:
            raise TrackingError(f"{place}: {error.strerror}; {file.name} cannot be added to run {run}") from error

    def runs(
        self, *, sweeps: Sequence[str] = (), ids: Sequence[str] = (), tags: Mapping[str, str] | None = None
    ) -> list[TrackedRun]:
        """Return the training runs in any of the sweeps, with any of the ids and with all of the tags, oldest first.

        Args:
            sweeps: names as in ``+sweep=NAME``, ids of sweeps' parent runs, or sweeps' folders. None given: any.
            ids: ids of runs, or their beginnings. None given: any.

        Raises:
            DataError: a sweep or an id does not exist, or no run matches all criteria.
        """
        every = [run for run in self._all if run.tags.get(KIND) == "run"]
        if not every:
            raise DataError(f"{self.uri}: its experiment {self.experiment} has no runs yet")
        chosen = every
        if sweeps:
            chosen = [run for sweep in sweeps for run in self._find_by_sweep(sweep, every)]
        if ids:
            chosen = [run for given in ids for run in self._find_by_id(given, chosen)]
        for name, value in (tags or {}).items():
            chosen = [run for run in chosen if run.tags.get(name, run.params.get(name)) == value]
            if not chosen:
                values = Counter(run.tags.get(name, run.params.get(name, "")) for run in every)
                shown = ", ".join(f"{known} ({count})" for known, count in values.most_common(8) if known)
                raise DataError(f"no run is left with {name}={value}; values of {name}: {shown or 'none'}")
        return sorted({run.id: run for run in chosen}.values(), key=lambda run: run.started)

    def sweeps(self) -> dict[str, int]:
        """Return the number of runs of each named sweep."""
        return dict(Counter(run.tags[SWEEP] for run in self._all if run.tags.get(KIND) == "run" and SWEEP in run.tags))

    def find_named_sweep(self, name: str) -> list[TrackedRun]:
        """Return the training runs of all sweeps of this name, oldest first, without reading the other runs."""
        found = self._source.runs(self.experiment_id, {SWEEP: name, KIND: "run"}) if name else []
        return sorted((_run(each, self._source) for each in found), key=lambda run: run.started)

    def parent(self, run: TrackedRun) -> TrackedRun | None:
        """Return the parent run of the sweep that a run belongs to; None if it belongs to none."""
        id = run.tags.get(PARENT)
        if id is None or "_all" in vars(self):
            return next((each for each in self._all if each.id == id), None) if id else None
        found = self._source.run(id)
        return None if found is None else _run(found, self._source)

    def _find_by_sweep(self, sweep: str, every: Sequence[TrackedRun]) -> list[TrackedRun]:
        parents = {
            run.id
            for run in self._all
            if run.tags.get(KIND) == "sweep" and (run.id == sweep or is_of_sweep(run, Path(sweep)))
        }
        found = [run for run in every if run.tags.get(SWEEP) == sweep or run.tags.get(PARENT) in parents]
        if not found:
            known = ", ".join(f"{name} ({plural(runs, 'run')})" for name, runs in self.sweeps().items())
            raise DataError(
                f"no run of sweep {sweep} is tracked in {self.uri}; {f'it has {known}' if known else 'it has none'}. "
                f"dnpo sweep {sweep} makes them, if there is such a sweep"
            )
        return found

    def _find_by_id(self, given: str, among: Sequence[TrackedRun]) -> list[TrackedRun]:
        found = [run for run in among if run.id.startswith(given)]
        if not found:
            raise DataError(f"no run {given} is tracked in {self.uri}, experiment {self.experiment}")
        if len(found) > 1:
            raise DataError(f"run {given}: {len(found)} runs have ids that begin so; give more of it")
        return found

    @cached_property
    def _all(self) -> list[TrackedRun]:
        """All runs of the experiment, read once."""
        return [_run(each, self._source) for each in self._source.runs(self.experiment_id, {})]


def is_of_sweep(parent: TrackedRun, folder: Path) -> bool:
    """Return whether a parent run is that of the sweep in a folder.

    The folder has a file with the run's id; parent runs of earlier versions have the folder's path.
    """
    file = folder / PARENT_ID
    if file.is_file():
        return file.read_text() == parent.id
    return Path(parent.tags.get("dnpo.sweep", "/")) in (folder.absolute(), folder.resolve())


def _local(artifacts: str) -> Path | None:
    """Return the folder at an address of artefacts; None if it is not on this machine."""
    return Path(url2pathname(urlparse(artifacts).path)) if artifacts.startswith("file://") else None


def _run(found: StoredRun, source: Source) -> TrackedRun:
    seconds = (found.ended - found.started) / 1000 if found.ended else None
    tags, params = unpack(found.tags, found.params)
    recorded = rename(params)
    whole = complete(recorded)
    return TrackedRun(
        found.id,
        found.name,
        found.status,
        found.started,
        seconds,
        tags,
        whole,
        found.artifacts,
        source,
        frozenset(whole.keys() - recorded.keys()),
    )
