"""Where runs are tracked: MLflow, or nowhere.

Step metrics are buffered and sent in batches; one by one they would take longer than the training steps they describe.

A process that is killed cannot say so, and MLflow would show its run as running for ever. So a run holds a lock on a
file of its own as long as it lives, which the system frees with the process, and names it in a tag: the next run on the
same store and machine closes those whose lock is free (:func:`close_abandoned`).
"""

import json
import logging
import os
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError, URLError

from filelock import FileLock, Timeout

from dnpo import catalogue
from dnpo.errors import TrackingError
from dnpo.store import write_json

if TYPE_CHECKING:
    from dnpo.tracking.datasets import Dataset

Status = Literal["FINISHED", "FAILED", "KILLED"]
NOTE, ALIVE = "mlflow.note.content", "dnpo.alive"
PARENT, HELD = "mlflow-parent.txt", "running.lock"  # in a sweep's folder: its run, and the lock while it goes on
LONGEST = 7900  # characters of a tag, of which MLflow takes 8,000 and cuts the rest
ABANDONED = "**Its process is gone**: it was killed. Finished stages are kept, and the same command continues it."


class TrackedSteps:
    """Which runs have tracked the training steps of a stage: a small file in the store.

    Args:
        store: its folder.
        key: of the stage.
        prefix: of the names of its metrics; one training can be tracked under several.
    """

    def __init__(self, store: Path, key: str, prefix: str = "") -> None:
        self.path = store / ".tracked" / f"{prefix}{key}.json"

    def run(self, where: str) -> str:
        """The run in this tracking store, "" where none is known."""
        return str(self._read().get(where, ""))

    def add(self, where: str, run: str) -> None:
        """Remember a run as the one of its tracking store."""
        if where and run:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**self._read(), where: run})

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        return found


class Tracking:
    """What a run says of itself. This one keeps nothing; others override what they do."""

    id = ""  # of the run
    where = ""  # the tracking store and experiment

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str], sweep: Path | None) -> None:
        """Begin a run; with ``sweep``, a folder that all jobs of a multirun share, nested in the sweep's run.

        Raises:
            TrackingError: the store cannot be reached.
        """

    def resume(self, run: str) -> None:
        """Go on with a run that exists.

        Raises:
            TrackingError: the store cannot be reached.
        """

    def metrics(self, values: Mapping[str, float], step: int, model: str = "", data: "Dataset | None" = None) -> None:
        """Log metrics; they may be buffered. ``model`` (see :meth:`model`) and ``data`` say of what and on what.

        Raises:
            DnpoError: a metric is not in the catalogue.
        """
        catalogue.check(values)

    def has(self, run: str) -> bool:
        """Whether a run is in the tracking store, and not deleted."""
        return False

    def flush(self) -> None:
        """Send what is buffered."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file with the run."""

    def table(self, path: Path) -> None:
        """Keep a table with the run: a JSON file with ``columns`` and ``data``."""

    def note(self, text: str) -> None:
        """What the run's page says first, in Markdown; in place of what it said before."""

    def add(self, text: str) -> None:
        """Add a paragraph to the note."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""

    def inputs(self, datasets: "Sequence[Dataset]") -> None:
        """Say what the run reads."""

    def model(self, name: str, step: int, params: Mapping[str, str], note: str) -> str:
        """Say that a model came out at a step; its id, "" where nothing is tracked. No weights are uploaded."""
        return ""

    def finish(self, status: Status) -> None:
        """End the run."""

    def whereabouts(self) -> list[str]:
        """Lines that say where to look."""
        return []


class MLflowTracking(Tracking):
    """Tracks in MLflow: an experiment a project, a run a training run.

    Args:
        uri: of the tracking store; a relative ``sqlite:///file`` lies in the working directory.
        experiment: its name.
        artifacts: folder for artefacts of a new experiment where the store is a local database; null for the server's.
        batch: metrics sent at once.
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
        """See :class:`Tracking`."""
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
        """See :class:`Tracking`."""
        with self._connect() as experiment:
            tags = self._client.get_run(run).data.tags
        self._note, self._marked = tags.get(NOTE, ""), ALIVE in tags
        self.id, self._url = run, (experiment, run)

    @contextmanager
    def _connect(self) -> Iterator[str]:
        """Connect to the store and give the id of the experiment; errors name the setting."""
        for silenced in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
            os.environ.setdefault(silenced, "true")
        check_reachable(self.uri)
        from mlflow import MlflowClient

        for noisy in ("alembic", "mlflow", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            with FileLock(self._lock()):  # processes that meet on a fresh database break each other's migration
                self._client = MlflowClient(tracking_uri=self.uri)
                experiment = self._experiment()
            yield experiment
        except Exception as error:  # databases and their drivers raise errors of their own
            problem = str(error).splitlines()[0]
            raise TrackingError(
                f"tracking.uri={self.uri}: cannot be used ({problem}); mend it, give another, or run with tracking=off"
            ) from error

    def _hold(self) -> None:
        """Take the lock that says that this process lives."""
        path = self._lock().with_suffix(".alive") / self.id
        path.parent.mkdir(exist_ok=True)
        self._alive = FileLock(path)
        self._alive.acquire()
        self._client.set_tag(self.id, ALIVE, str(path))
        self._marked = True

    def _lock(self) -> Path:
        if self.uri.startswith("sqlite:///"):
            database = Path(self.uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            return database.with_name(f"{database.name}.lock")
        return Path(os.environ.get("TMPDIR", "/tmp")) / "dnpo-mlflow.lock"

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        local = self.artifacts is not None and not self.uri.startswith(("http://", "https://"))
        where = Path(str(self.artifacts)).absolute().as_uri() if local else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # its pages begin with runs and models, not chats
        return str(self._client.create_experiment(self.experiment, artifact_location=where, tags=kind))

    def _parent(self, experiment: str, sweep: Path, tags: Mapping[str, str]) -> str:
        """The run of the whole multirun, which the first of its jobs creates and the sweep's report ends."""
        note = sweep / PARENT
        with FileLock(sweep / "mlflow-parent.lock"):
            if not note.is_file():
                own = {"dnpo.sweep": str(sweep), "dnpo.kind": "sweep", ALIVE: str(sweep / HELD), **tags}
                name = tags.get("dnpo.sweep_name", sweep.name)
                run = self._client.create_run(experiment, run_name=f"sweep {name}", tags=own)
                note.write_text(run.info.run_id)
        return note.read_text()

    def metrics(self, values: Mapping[str, float], step: int, model: str = "", data: "Dataset | None" = None) -> None:
        """See :class:`Tracking`."""
        from mlflow.entities import Metric

        catalogue.check(values)
        now = int(time.time() * 1000)
        on = {"dataset_name": data.name, "dataset_digest": data.digest} if data else {}
        about = {"model_id": model, **on} if model else {}
        self._buffer += [Metric(name, float(value), now, step, **about) for name, value in values.items()]
        if len(self._buffer) >= self.batch:
            self.flush()

    def has(self, run: str) -> bool:
        """Look the run up."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        try:
            return str(self._client.get_run(run).info.lifecycle_stage) == "active"
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return False

    def flush(self) -> None:
        """See :class:`Tracking`."""
        while self._buffer:
            self._client.log_batch(self.id, metrics=self._buffer[:1000])
            del self._buffer[:1000]

    def artifact(self, path: Path, folder: str = "") -> None:
        """See :class:`Tracking`."""
        self._client.log_artifact(self.id, str(path), folder or None)

    def table(self, path: Path) -> None:
        """See :class:`Tracking`."""
        self.artifact(path)
        self._tables.append(path.name)
        # By this tag MLflow's pages know that a file is a table.
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"} for name in self._tables])})

    def note(self, text: str) -> None:
        """See :class:`Tracking`."""
        self._note = text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(chr(10), 1)[0]}\n\n(cut)"
        self.tags({NOTE: self._note})

    def add(self, text: str) -> None:
        """See :class:`Tracking`."""
        self.note(f"{self._note[: LONGEST - len(text) - 2]}\n\n{text}")

    def tags(self, values: Mapping[str, str]) -> None:
        """See :class:`Tracking`."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in values.items()])

    def inputs(self, datasets: "Sequence[Dataset]") -> None:
        """See :class:`Tracking`."""
        from mlflow.exceptions import MlflowException

        given = [_input(each) for each in datasets]
        for last in (False, False, True):
            try:
                self._client.log_inputs(self.id, given)
                return
            except MlflowException as error:
                # A run side by side may add the same data set between MLflow's look and its own insert.
                if last or ("UNIQUE constraint" not in str(error) and "IntegrityError" not in str(error)):
                    raise

    def model(self, name: str, step: int, params: Mapping[str, str], note: str) -> str:
        """See :class:`Tracking`."""
        from mlflow.entities import LoggedModelOutput

        experiment, run = self._url
        made = self._client.create_logged_model(experiment, name, run, tags={NOTE: note}, params=dict(params))
        self._client.finalize_logged_model(made.model_id, "READY")
        self._client.log_outputs(run, [LoggedModelOutput(made.model_id, step)])
        return str(made.model_id)

    def finish(self, status: Status) -> None:
        """See :class:`Tracking`."""
        if self.id:
            self.flush()
            self._client.set_terminated(self.id, status)
        if self._alive is not None:  # after the status is written: see close_abandoned
            _free(self._alive)
            self._alive = None
        if self._marked:
            self._client.delete_tag(self.id, ALIVE)
            self._marked = False

    def whereabouts(self) -> list[str]:
        """The run's page, or the command that shows it."""
        experiment, run = self._url
        page = f"#/experiments/{experiment}/runs/{run}"
        if self.uri.startswith(("http://", "https://")):
            return [f"dashboard   {self.uri.rstrip('/')}/{page}"]
        shown = (
            f"sqlite:///{os.path.relpath(self.uri.removeprefix('sqlite:///'))}" if "sqlite" in self.uri else self.uri
        )
        return [f"dashboard   mlflow ui --backend-store-uri {shown}    then open /{page}"]


def _input(given: "Dataset") -> Any:
    """A data set as MLflow has it; its page shows how many rows and which columns there are."""
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
    """End the runs that are said to go on while the process behind them is gone; their ids.

    A run whose lock lies on another machine is left as it is: nothing is known of it here.
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
        if found.info.status == "RUNNING":  # and did not end just now
            client.set_tag(run.info.run_id, NOTE, f"{found.data.tags.get(NOTE, '')}\n\n{ABANDONED}")
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(run.info.run_id)
        _free(lock)
    return closed


def _free(lock: FileLock) -> None:
    """Give a lock back, and leave no file of it."""
    lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink()


def strip_password(text: str) -> str:
    """An address may carry a password, which has no place where others read."""
    return re.sub(r'://[^/@"\s]+@', "://…@", text)


def check_reachable(uri: str) -> None:
    """Fail at once, where MLflow's client would try again for minutes.

    Raises:
        TrackingError: no tracking server answers there.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
    except HTTPError:
        pass  # someone answers; whether they accept us shows next
    except (URLError, OSError) as error:
        raise TrackingError(
            f"tracking.uri={uri}: no tracking server answers there ({getattr(error, 'reason', error)}); start "
            "it, set tracking.uri or MLFLOW_TRACKING_URI, or run with tracking=off"
        ) from error


def make_absolute(uri: str) -> str:
    """MLflow reads relative paths against wherever a process stands, so say where from the beginning."""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri
