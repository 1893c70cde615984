"""Track runs in MLflow, or not at all.

Step metrics are buffered and sent in batches: one by one they would take longer than the training steps themselves.

MLflow would show a run whose process was killed as running for ever. So each run locks a file while it is alive and
names the file in a tag. The operating system frees the lock when the process ends, and the next run on the same store
and machine closes all runs whose lock is free (:func:`close_abandoned`).
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from dnpo import catalogue
from dnpo.errors import StoreError, TrackingError
from dnpo.store import write_json
from dnpo.tracking.client import connect, is_server, make_absolute, strip_password
from dnpo.tracking.sqlite import advise, file_of, first_line, lock_of

if TYPE_CHECKING:
    from dnpo.tracking.datasets import Dataset

Status = Literal["FINISHED", "FAILED", "KILLED"]
NOTE, ALIVE = "mlflow.note.content", "dnpo.alive"
PARENT, HELD = (
    "mlflow-parent.txt",
    "running.lock",
)  # in a sweep's folder: its parent run's id, its lock
LONGEST = 7900  # characters of a tag; MLflow cuts it at 8,000
ABANDONED = "**Its process is gone**: it was killed. Finished stages are kept, and the same command continues it."


class TrackedSteps:
    """Records which runs have tracked the training steps of a stage, in a small file in the store.

    Args:
        store: folder of the store.
        key: key of the stage.
        prefix: prefix of its metrics' names; one training can be tracked under several.
    """

    def __init__(self, store: Path, key: str, prefix: str = "") -> None:
        self.path = store / ".tracked" / f"{prefix}{key}.json"

    def run(self, where: str) -> str:
        """Return the run that tracked the steps in this tracking store; "" if none is known."""
        return str(self._read().get(where, ""))

    def add(self, where: str, run: str) -> None:
        """Record a run, replacing any run recorded for this tracking store."""
        if where and run:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self._read(), where: run})

    @staticmethod
    def places(store: Path) -> set[str]:
        """Return the addresses of the tracking stores in which stages of a store are tracked, without passwords."""
        files = (store / ".tracked").glob("*.json")
        return {where.rpartition(" ")[0] for path in files for where in _read_json(path)}

    def _read(self) -> dict[str, Any]:
        return _read_json(self.path) if self.path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path}: is damaged ({error}); remove it: the steps are then tracked once more") from error
    return found


class Tracking:
    """Interface through which a run is tracked. This base class discards everything."""

    id = ""  # the run's id
    where = ""  # the tracking store and experiment

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str], sweep: Path | None) -> None:
        """Begin a run. With ``sweep``, the folder shared by a multirun's jobs, nest it in the sweep's parent run.

        Raises:
            TrackingError: the store cannot be reached.
        """

    def resume(self, run: str) -> None:
        """Continue an existing run.

        Raises:
            TrackingError: the store cannot be reached.
        """

    def metrics(self, values: Mapping[str, float], step: int, model: str = "", data: "Dataset | None" = None) -> None:
        """Log metrics, possibly buffered, of ``model`` (an id from :meth:`model`) on ``data`` if these are given.

        Raises:
            DnpoError: a metric is not in the catalogue.
        """
        catalogue.check(values)

    def has(self, run: str) -> bool:
        """Return whether a run is in the tracking store and not deleted."""
        return False

    def flush(self) -> None:
        """Send all buffered metrics."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file with the run."""

    def table(self, path: Path) -> None:
        """Keep a table with the run: a JSON file with ``columns`` and ``data``."""

    def note(self, text: str) -> None:
        """Replace the note at the top of the run's page; it is Markdown."""

    def add(self, text: str) -> None:
        """Add a paragraph to the note."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""

    def inputs(self, datasets: "Sequence[Dataset]") -> None:
        """Record the data sets that the run reads."""

    def model(self, name: str, step: int, params: Mapping[str, str], note: str) -> str:
        """Record the model made at a step and return its id, "" if nothing is tracked. No weights are uploaded."""
        return ""

    def finish(self, status: Status) -> None:
        """End the run."""

    def whereabouts(self) -> list[str]:
        """Return lines for the screen that say where the run can be viewed."""
        return []


class MLflowTracking(Tracking):
    """Tracks in MLflow: one experiment per project, one MLflow run per run.

    Args:
        uri: address of the tracking store; a relative ``sqlite:///file`` lies in the working directory.
        experiment: its name.
        artifacts: artefact folder of a new experiment if the store is a local database; None for the server's default.
        batch: number of metrics sent at once.
    """

    def __init__(
        self,
        *,
        uri: str = "sqlite:///mlflow.db",
        experiment: str = "dnpo",
        artifacts: str | None = "mlartifacts",
        batch: int = 1000,
    ) -> None:
        self.uri = make_absolute(uri)
        self.experiment, self.artifacts, self.batch = experiment, artifacts, batch
        self.where = f"{strip_password(self.uri)} {experiment}"
        self._buffer: list[Any] = []
        self.id = self._note = ""
        self._tables: list[str] = []
        self._alive: FileLock | None = None
        self._marked = False

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str], sweep: Path | None) -> None:
        """Create the run, log its settings, and close abandoned runs of the experiment."""
        from mlflow.entities import Param

        params = [Param(key, strip_password(str(value))[:6000]) for key, value in settings.items()]
        with self._connect() as experiment:
            known = {name: tags[name] for name in ("dnpo.sweep_name",) if name in tags}
            parent = {"mlflow.parentRunId": self._parent(experiment, sweep, known)} if sweep is not None else {}
            close_abandoned(self._client, experiment)
            run = self._client.create_run(experiment, run_name=strip_password(name), tags={**tags, **parent})
            self.id = run.info.run_id
            self._hold()
            for start in range(0, len(params), 100):
                self._client.log_batch(self.id, params=params[start : start + 100])
        self._url = (experiment, self.id)

    def resume(self, run: str) -> None:
        """Continue an existing run, with its note."""
        with self._connect() as experiment:
            tags = self._client.get_run(run).data.tags
        self._note, self._marked = tags.get(NOTE, ""), ALIVE in tags
        self.id, self._url = run, (experiment, run)

    @contextmanager
    def _connect(self) -> Iterator[str]:
        """Connect to the store and yield the experiment's id; errors name the setting to change."""
        try:
            self._client = connect(self.uri)
            with FileLock(self._lock()):  # two processes must not make the experiment at once
                experiment = self._experiment()
            yield experiment
        except TrackingError:
            raise
        except Exception as error:  # databases and their drivers raise errors of their own
            raise TrackingError(
                f"tracking.uri={strip_password(self.uri)}: cannot be used ({first_line(error)}); {advise(error)}"
            ) from error

    def _hold(self) -> None:
        """Take the lock that shows that this process is alive."""
        path = self._lock().with_suffix(".alive") / self.id
        path.parent.mkdir(exist_ok=True)
        self._alive = FileLock(path)
        self._alive.acquire()
        self._client.set_tag(self.id, ALIVE, str(path))
        self._marked = True

    def _lock(self) -> Path:
        file = file_of(self.uri)
        if file is not None:
            return lock_of(file)
        return Path(os.environ.get("TMPDIR", "/tmp")) / "dnpo-mlflow.lock"

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        local = self.artifacts is not None and not is_server(self.uri)
        where = Path(str(self.artifacts)).absolute().as_uri() if local else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # pages of runs and models, not chats
        return str(self._client.create_experiment(self.experiment, artifact_location=where, tags=kind))

    def _parent(self, experiment: str, sweep: Path, tags: Mapping[str, str]) -> str:
        """Return the parent run of a multirun. The first job creates it, and the sweep's report ends it."""
        note = sweep / PARENT
        with FileLock(sweep / "mlflow-parent.lock"):
            if not note.is_file():
                own = {"dnpo.sweep": str(sweep), "dnpo.kind": "sweep", ALIVE: str(sweep / HELD), **tags}
                name = tags.get("dnpo.sweep_name", sweep.name)
                run = self._client.create_run(experiment, run_name=f"sweep {name}", tags=own)
                note.write_text(run.info.run_id)
        return note.read_text()

    def metrics(self, values: Mapping[str, float], step: int, model: str = "", data: "Dataset | None" = None) -> None:
        """Buffer metrics, and send them once a batch is full."""
        from mlflow.entities import Metric

        catalogue.check(values)
        now = int(time.time() * 1000)
        on = {"dataset_name": data.name, "dataset_digest": data.digest} if data else {}
        about = {"model_id": model, **on} if model else {}
        self._buffer += [Metric(name, float(value), now, step, **about) for name, value in values.items()]
        if len(self._buffer) >= self.batch:
            self.flush()

    def has(self, run: str) -> bool:
        """Look up the run; a deleted one does not count."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        try:
            return str(self._client.get_run(run).info.lifecycle_stage) == "active"
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return False

    def flush(self) -> None:
        """Send all buffered metrics, at most 1,000 per request."""
        while self._buffer:
            self._client.log_batch(self.id, metrics=self._buffer[:1000])
            del self._buffer[:1000]

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file as an artefact."""
        self._client.log_artifact(self.id, str(path), folder or None)

    def table(self, path: Path) -> None:
        """Upload a table, and mark it as one for MLflow's pages."""
        self.artifact(path)
        self._tables.append(path.name)
        # This tag makes MLflow's pages show the file as a table.
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"} for name in self._tables])})

    def note(self, text: str) -> None:
        """Replace the note, cut to what MLflow stores in a tag."""
        self._note = text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(chr(10), 1)[0]}\n\n(cut)"
        self.tags({NOTE: self._note})

    def add(self, text: str) -> None:
        """Add a paragraph to the note, cutting the text before it where it is too long."""
        self.note(f"{self._note[: LONGEST - len(text) - 2]}\n\n{text}")

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run in one request."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in values.items()])

    def inputs(self, datasets: "Sequence[Dataset]") -> None:
        """Log the data sets as inputs of the run, again if a concurrent run adds the same one."""
        from mlflow.exceptions import MlflowException

        given = [_input(each) for each in datasets]
        for last in (False, False, True):
            try:
                self._client.log_inputs(self.id, given)
                return
            except MlflowException as error:
                # A concurrent run may add the same data set between MLflow's query and its insert.
                if last or ("UNIQUE constraint" not in str(error) and "IntegrityError" not in str(error)):
                    raise

    def model(self, name: str, step: int, params: Mapping[str, str], note: str) -> str:
        """Create a logged model without weights, as an output of the run."""
        from mlflow.entities import LoggedModelOutput

        experiment, run = self._url
        made = self._client.create_logged_model(experiment, name, run, tags={NOTE: note}, params=dict(params))
        self._client.finalize_logged_model(made.model_id, "READY")
        self._client.log_outputs(run, [LoggedModelOutput(made.model_id, step)])
        return str(made.model_id)

    def finish(self, status: Status) -> None:
        """Send buffered metrics, set the status and release the lock."""
        if self.id:
            self.flush()
            self._client.set_terminated(self.id, status)
        if self._alive is not None:  # only after the status is written, see close_abandoned
            _free(self._alive)
            self._alive = None
        if self._marked:
            self._client.delete_tag(self.id, ALIVE)
            self._marked = False

    def whereabouts(self) -> list[str]:
        """Return the address of the run's page, or the command that serves it."""
        experiment, run = self._url
        page = f"#/experiments/{experiment}/runs/{run}"
        if is_server(self.uri):
            return [f"dashboard   {self.uri.rstrip('/')}/{page}"]
        shown = (
            f"sqlite:///{os.path.relpath(self.uri.removeprefix('sqlite:///'))}" if "sqlite" in self.uri else self.uri
        )
        return [f"dashboard   mlflow ui --backend-store-uri {shown}    then open /{page}"]


def _input(given: "Dataset") -> Any:
    """Convert a data set to MLflow's form, with the row count and columns that its page shows."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    columns = [{"name": name, "type": "string", "required": True} for name in given.columns]
    found = Dataset(
        name=given.name,
        digest=given.digest,
        source_type=given.kind,
        source=strip_password(json.dumps(given.source)),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"num_rows": given.rows, **given.facts}),
    )
    return DatasetInput(found, [InputTag("mlflow.data.context", given.context)])


def close_abandoned(client: Any, experiment: str) -> list[str]:
    """End the runs that are marked as running although their process is gone, and return their ids.

    A run whose lock file is on another machine is left as it is, since its state is unknown here.
    """
    closed = []
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        path = Path(run.data.tags.get(ALIVE, ""))
        if not path.is_file():
            continue
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        found = client.get_run(run.info.run_id)
        if found.info.status == "RUNNING":  # it may have ended just now
            client.set_tag(run.info.run_id, NOTE, f"{found.data.tags.get(NOTE, '')}\n\n{ABANDONED}")
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(run.info.run_id)
        _free(lock)
    return closed


def _free(lock: FileLock) -> None:
    """Release a lock and delete its file."""
    lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink()
