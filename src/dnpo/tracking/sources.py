"""Read runs from where they are tracked: from an SQLite file with SQL, from any other address with MLflow's client.

MLflow's import takes two CPU seconds, so commands that only read a file do without it.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from dnpo.errors import TrackingError
from dnpo.tracking.client import connect, make_absolute
from dnpo.tracking.sqlite import PATIENCE, explain, file_of, shorten

ACTIVE = "active"  # MLflow's word for what is not deleted


@dataclass(frozen=True)
class StoredRun:
    """A run as a tracking store has it.

    Attributes:
        started, ended: milliseconds since 1970; ``ended`` is None if the run has not ended.
        artifacts: address of the artefacts.
    """

    id: str
    name: str
    status: str
    started: int
    ended: int | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    artifacts: str


class Source(Protocol):
    """Where runs are read from. What is deleted in MLflow is left out."""

    def experiments(self) -> dict[str, str]:
        """Return the ids of the experiments by name."""
        ...

    def runs(self, experiment: str, tags: Mapping[str, str]) -> list[StoredRun]:
        """Return the runs of an experiment, by its id, that have all of the tags, the newest first."""
        ...

    def run(self, id: str) -> StoredRun | None:
        """Return a run; None if there is none."""
        ...

    def history(self, run: str, metric: str) -> list[tuple[int, float]]:
        """Return the steps and values of a metric in the order in which they were tracked."""
        ...

    def download(self, run: str, path: str, to: Path) -> Path | None:
        """Download an artefact into a folder; None if there is none."""
        ...

    def upload(self, run: str, file: Path, folder: str) -> None:
        """Add a file to the artefacts of a run, in a folder of theirs or "".

        Raises:
            TrackingError: it is refused.
        """
        ...


def open_source(uri: str) -> Source:
    """Open a tracking store for reading.

    Raises:
        TrackingError: there is none.
    """
    absolute = make_absolute(uri)
    file = file_of(absolute)
    return Served(absolute, connect(absolute)) if file is None else _File(uri, file)


@dataclass(frozen=True)
class Served:
    """A tracking store that MLflow's client reads."""

    uri: str
    client: Any

    def experiments(self) -> dict[str, str]:
        found = _pages(lambda page: self.client.search_experiments(page_token=page))
        return {each.name: str(each.experiment_id) for each in found}

    def runs(self, experiment: str, tags: Mapping[str, str]) -> list[StoredRun]:
        if any(set(value) & {"'", '"', "`"} for value in tags.values()):  # they cannot be quoted in a filter
            return [run for run in self.runs(experiment, {}) if tags.items() <= run.tags.items()]
        among = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = _pages(lambda page: self.client.search_runs([experiment], among, max_results=1000, page_token=page))
        return [_stored(run) for run in found]

    def run(self, id: str) -> StoredRun | None:
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_run(id)
        except MlflowException:
            return None
        return _stored(found) if found.info.lifecycle_stage == ACTIVE else None

    def history(self, run: str, metric: str) -> list[tuple[int, float]]:
        points = self.client.get_metric_history(run, metric)
        return [(int(p.step), float(p.value)) for p in sorted(points, key=lambda p: p.timestamp)]

    def download(self, run: str, path: str, to: Path) -> Path | None:
        from mlflow.exceptions import MlflowException

        try:
            return Path(self.client.download_artifacts(run, path, str(to)))
        except (MlflowException, OSError):
            return None

    def upload(self, run: str, file: Path, folder: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_artifact(run, str(file), folder or None)
        except (MlflowException, OSError) as error:
            raise TrackingError(f"{self.uri}: {file.name} cannot be added to run {run} ({shorten(error)})") from error


def _pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield what MLflow's client returns in pages."""
    page = None
    while True:
        found = ask(page)
        yield from found
        page = found.token
        if not page:
            return


def _stored(run: Any) -> StoredRun:
    info = run.info
    return StoredRun(
        info.run_id,
        info.run_name,
        info.status,
        info.start_time,
        info.end_time,
        dict(run.data.tags),
        dict(run.data.params),
        info.artifact_uri,
    )


@dataclass(frozen=True)
class _File:
    """The SQLite file of a tracking store. It is never changed."""

    uri: str
    file: Path

    def __post_init__(self) -> None:
        if not self.file.is_file():
            raise TrackingError(f"{self.uri}: there is no such database; give uri=…, where runs were tracked")
        if not self._ask("select 1 from sqlite_master where type = 'table' and name = 'experiments'"):
            raise TrackingError(f"{self.uri}: it is not a database of MLflow; give uri=…, where runs were tracked")

    def experiments(self) -> dict[str, str]:
        found = self._ask("select name, experiment_id from experiments where lifecycle_stage = ?", ACTIVE)
        return {name: str(id) for name, id in found}

    def runs(self, experiment: str, tags: Mapping[str, str]) -> list[StoredRun]:
        having = " and run_uuid in (select run_uuid from tags where key = ? and value = ?)" * len(tags)
        given = [part for item in tags.items() for part in item]
        return self._runs(f"experiment_id = ?{having}", int(experiment), *given)

    def run(self, id: str) -> StoredRun | None:
        return next(iter(self._runs("run_uuid = ?", id)), None)

    def history(self, run: str, metric: str) -> list[tuple[int, float]]:
        query = "select step, value, is_nan from metrics where run_uuid = ? and key = ? order by timestamp, step, value"
        return [
            (step, float("nan") if is_nan else float(value)) for step, value, is_nan in self._ask(query, run, metric)
        ]

    def download(self, run: str, path: str, to: Path) -> Path | None:
        return self._served.download(run, path, to)

    def upload(self, run: str, file: Path, folder: str) -> None:
        self._served.upload(run, file, folder)

    @cached_property
    def _served(self) -> Served:
        """MLflow's client, for artefacts on other machines."""
        return Served(self.uri, connect(make_absolute(self.uri)))

    def _runs(self, among: str, *given: Any) -> list[StoredRun]:
        where, given = f"lifecycle_stage = ? and {among}", (ACTIVE, *given)
        columns = "run_uuid, name, status, start_time, end_time, artifact_uri"
        found = self._ask(f"select {columns} from runs where {where} order by start_time desc, run_uuid", *given)
        tags, params = (self._texts(table, where, given) for table in ("tags", "params"))
        return [
            StoredRun(id, name, status, started, ended, tags.get(id, {}), params.get(id, {}), artifacts)
            for id, name, status, started, ended, artifacts in found
        ]

    def _texts(self, table: str, where: str, given: tuple[Any, ...]) -> dict[str, dict[str, str]]:
        """Return the tags or parameters of runs, by the run's id and their names."""
        found: dict[str, dict[str, str]] = {}
        query = f"select run_uuid, key, value from {table} where run_uuid in (select run_uuid from runs where {where})"
        for id, name, value in self._ask(query, *given):
            found.setdefault(id, {})[name] = value
        return found

    def _ask(self, query: str, *given: Any) -> list[tuple[Any, ...]]:
        with explain(self.file):
            return self._database.execute(query, given).fetchall()

    @cached_property
    def _database(self) -> sqlite3.Connection:
        """The open file. SQLite reverts the unfinished writes of a killed process, so it has to be writable."""
        address = f"file:{quote(str(self.file))}?mode=rw"
        return sqlite3.connect(address, uri=True, timeout=PATIENCE, check_same_thread=False)
