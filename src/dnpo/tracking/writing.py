"""Track runs in MLflow, or not at all.

Step metrics are buffered and sent in batches: one by one they would take longer than the training steps themselves. If
MLflow stops answering, the run continues: its data are kept in its folder (``outbox.py``) and sent later.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock

from dnpo import catalogue
from dnpo.errors import StoreError, TrackingError
from dnpo.escape import for_database, for_mlflow
from dnpo.store import write_json
from dnpo.tracking import PARENT_ID, RUN_ID, end_note
from dnpo.tracking.alive import ALIVE, NOTE, close_abandoned, free
from dnpo.tracking.client import check_reachable, connect, is_server, make_absolute, strip_password
from dnpo.tracking.outbox import KEPT, LATER, PATIENCE, Kind, Message, Outbox, Refused, send, warn
from dnpo.tracking.packing import OPTIONS, STAGES, STEPS, pack, split_tags
from dnpo.tracking.paths import change_paths, last_part
from dnpo.tracking.sqlite import advise, file_of, lock_of, shorten, try_file

if TYPE_CHECKING:
    from dnpo.tracking.datasets import Dataset

Status = Literal["FINISHED", "FAILED", "KILLED"]
HELD = "running.lock"  # in a sweep's folder: its lock
LOCAL_PAGE = "http://127.0.0.1:5000"  # where mlflow ui serves it by default
VERBS = {
    **{"run": "train", "sweep": "sweep", "evaluation": "evaluate", "agreement": "judge agreement"},
    "leaderboard": "leaderboard",
}  # the verb of dnpo that makes a run, by its kind
LONGEST = 7900  # characters of a tag; MLflow cuts it at 8,000


def describe_source(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that MLflow's pages show as a run's source: the verb of dnpo, and the commit."""
    verb, commit = VERBS.get(tags.get("dnpo.kind", "")), tags.get("dnpo.commit", "").rstrip("+")
    if verb is None:
        return {}
    source = {"mlflow.source.name": f"dnpo {verb}", "mlflow.source.type": "LOCAL"}
    return source | ({"mlflow.source.git.commit": commit} if commit else {})


class TrackedSteps:
    """Records which runs have tracked the training steps of a stage, in a small file in the store.

    Args:
        store: folder of the store.
        key: key of the stage.
        prefix: prefix of its metrics' names; one training can be tracked under several prefixes.
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

    def start(
        self,
        name: str,
        settings: Mapping[str, Any],
        tags: Mapping[str, str],
        sweep: Path | None,
        folder: Path | None = None,
        stages: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Begin a run.

        Args:
            tags: the options and facts by which the run is found.
            stages: the keys of its stages, by short names.
            sweep: the folder shared by a multirun's jobs; the run is nested in the sweep's parent run.
            folder: the run's folder, which keeps data that cannot be sent.

        Raises:
            TrackingError: the store cannot be reached.
        """

    def check(self) -> None:
        """Check that runs can be tracked, without creating anything.

        Raises:
            TrackingError: the store cannot be reached or written.
        """

    def resume(self, run: str, folder: Path | None = None) -> None:
        """Continue an existing run.

        Raises:
            TrackingError: the store cannot be reached.
        """

    def metrics(self, values: Mapping[str, float], step: int, model: str = "", data: "Dataset | None" = None) -> None:
        """Log metrics, possibly buffered; ``model`` (an id from :meth:`model`) and ``data`` say to what they belong.

        Raises:
            DnpoError: a metric is not in the catalogue.
        """
        catalogue.check(values)

    def has(self, run: str) -> bool:
        """Return whether a run is in the tracking store and not deleted."""
        return False

    def flush(self) -> bool:
        """Send all buffered metrics, and return whether everything has been sent."""
        return True

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file with the run."""

    def table(self, path: Path) -> None:
        """Keep a table with the run: a JSON file with ``columns`` and ``data``."""

    def note(self, text: str) -> None:
        """Replace the note at the top of the run's page; it is Markdown."""

    def end_note(self, text: str) -> None:
        """Write into the note how the run ended."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""

    def steps_of(self, stage: str, run: str) -> None:
        """Record which run tracked the training steps of a reused stage."""

    def inputs(self, datasets: "Sequence[Dataset]") -> None:
        """Record the data sets that the run reads."""

    def model(self, name: str, step: int, params: Mapping[str, str], note: str) -> str:
        """Record the model made at a step and return its id, "" if nothing is tracked. No weights are uploaded."""
        return ""

    def finish(self, status: Status) -> str:
        """End the run, and return what could not be sent ("" for nothing). It never raises an error."""
        return ""

    def whereabouts(self) -> list[str]:
        """Return lines for the screen: where the run can be viewed."""
        return []


class MLflowTracking(Tracking):
    """Tracks in MLflow: one experiment per project, one MLflow run per run.

    Args:
        uri: address of the tracking store; a relative ``sqlite:///file`` lies in the working directory.
        experiment: name of the MLflow experiment.
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
        self.id = self._note = self._experiment = ""
        self._buffer: list[Any] = []
        self._outbox = Outbox()
        self._models: dict[str, str] = {}
        self._tables: list[str] = []
        self._alive: FileLock | None = None
        self._marks: list[str] = []  # tags that are removed when the run has ended

    # --- beginning

    def start(
        self,
        name: str,
        settings: Mapping[str, Any],
        tags: Mapping[str, str],
        sweep: Path | None,
        folder: Path | None = None,
        stages: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Create the run, log its settings, and close abandoned runs of the experiment."""
        from mlflow.entities import Param

        shown = {key: change_paths(value, last_part) for key, value in settings.items()}
        values = {key: for_database(strip_password(str(value)))[:6000] for key, value in shown.items()}
        tags = {**describe_source(tags), **tags}
        clean = {for_mlflow(key): for_database(value) for key, value in tags.items()}
        known, options = split_tags(clean)
        values |= {**pack(OPTIONS, options), **pack(STAGES, stages)}
        params = [Param(for_mlflow(key), value) for key, value in values.items()]
        self._outbox = Outbox(folder)
        with self._connect():
            named = {key: known[key] for key in ("dnpo.sweep_name",) if key in known}
            known |= {"mlflow.parentRunId": self._parent(sweep, named)} if sweep is not None else {}
            close_abandoned(self._client, self._experiment)
            marks = {ALIVE: self._hold()} | ({KEPT: str(self._outbox.path)} if folder is not None else {})
            known, self._marks = {**known, **marks}, list(marks)
            title = for_database(strip_password(name))
            self.id = self._client.create_run(self._experiment, run_name=title, tags=known).info.run_id
            if folder is not None:
                (folder / RUN_ID).write_text(self.id)
            for start in range(0, len(params), 100):
                self._client.log_batch(self.id, params=params[start : start + 100])

    def check(self) -> None:
        """Try the store: a server is asked for the experiment, a file is locked for writing and released."""
        file = file_of(self.uri)
        if file is not None:
            try_file(file)
            return
        try:
            connect(self.uri).get_experiment_by_name(self.experiment)
        except TrackingError:
            raise
        except Exception as error:  # servers and databases raise various errors
            raise self._refuse(error) from error

    def resume(self, run: str, folder: Path | None = None) -> None:
        """Continue an existing run, with its note."""
        self._outbox = Outbox(folder)
        with self._connect():
            tags = self._client.get_run(run).data.tags
        self.id, self._note, self._marks = run, tags.get(NOTE, ""), [mark for mark in (ALIVE, KEPT) if mark in tags]

    @contextmanager
    def _connect(self) -> Iterator[None]:
        """Connect to the store, and create the experiment if there is none; errors name the setting to change."""
        try:
            self._client = connect(self.uri)
            with FileLock(self._lock()):  # two processes must not make the experiment at once
                self._experiment = self._find_experiment()
            yield
        except Exception as error:  # databases and their drivers raise various errors
            if self._alive is not None:
                free(self._alive)
            if isinstance(error, TrackingError):
                raise
            raise self._refuse(error) from error

    def _refuse(self, error: Exception) -> TrackingError:
        problem = f"tracking.uri={self.uri}: cannot be used ({shorten(error)})"
        return TrackingError(f"{strip_password(problem)}; {advise(error)}")

    def _hold(self) -> str:
        """Take the lock that shows that this process is alive, and return its file."""
        path = self._lock().with_suffix(".alive") / uuid.uuid4().hex
        path.parent.mkdir(exist_ok=True)
        self._alive = FileLock(path)
        self._alive.acquire()
        return str(path)

    def _lock(self) -> Path:
        file = file_of(self.uri)
        if file is not None:
            return lock_of(file)
        return Path(os.environ.get("TMPDIR", "/tmp")) / "dnpo-mlflow.lock"

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        local = self.artifacts is not None and not is_server(self.uri)
        where = Path(str(self.artifacts)).absolute().as_uri() if local else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # pages of runs and models, not chats
        return str(self._client.create_experiment(self.experiment, artifact_location=where, tags=kind))

    def _parent(self, sweep: Path, tags: Mapping[str, str]) -> str:
        """Return the parent run of a multirun. The first job creates it, and the sweep's report ends it."""
        note = sweep / PARENT_ID
        with FileLock(sweep / "mlflow-parent.lock"):
            if not note.is_file():
                own = {"dnpo.sweep": _shown(sweep), "dnpo.kind": "sweep", ALIVE: str(sweep / HELD), **tags}
                own = {**describe_source(own), **own}
                name = tags.get("dnpo.sweep_name", sweep.name)
                run = self._client.create_run(self._experiment, run_name=f"sweep {name}", tags=own)
                aside = note.with_suffix(".new")
                aside.write_text(run.info.run_id)
                aside.replace(note)
        return note.read_text()

    # --- sending

    def _send(self, kind: Kind, content: Any) -> str:
        """Send a message, or keep it if MLflow does not answer; return the id of what it created."""
        message = Message(kind, content)
        self._retry()
        if message.way not in self._outbox.down:
            sent, made = self._try(message)
            if sent:
                return made
        try:
            self._outbox.keep(message)
        except OSError as error:  # the message is still in memory
            warn(f"{self._outbox.path}: cannot be written ({error.strerror}); a kill would lose what is to be sent")
            self._outbox.folder = None
        return ""

    def _retry(self, now: bool = False) -> None:
        """Send what was kept, if it is time to try again."""
        box = self._outbox
        if not box.down or (time.monotonic() < box.next_attempt and not now):
            return
        began = time.monotonic()
        try:
            check_reachable(self.uri, 3)
        except TrackingError:
            box.next_attempt = time.monotonic() + max(PATIENCE, 5 * (time.monotonic() - began))
            return
        was = set(box.down)
        box.empty(lambda message: self._try(message, again=True)[0])
        if was and not box.down:
            warn(f"tracking.uri={strip_password(self.uri)}: MLflow answers again; what was kept is sent")

    def _try(self, message: Message, again: bool = False) -> tuple[bool, str]:
        """Try to send a message; return whether it is settled, and the id of what it created."""
        began = time.monotonic()
        try:
            return True, send(self._client, self._experiment, self.id, message, self._models)
        except Refused as refused:
            warn(f"run {self.id}: MLflow refuses {_name(message)} ({refused}); this is not tracked")
            return True, ""
        except Exception as error:  # stores and their drivers raise various errors; the run continues
            self._note_failure(message.way, error, time.monotonic() - began, again)
            return False, ""

    def _note_failure(self, way: str, error: Exception, took: float, again: bool = False) -> None:
        """Note that MLflow does not answer, and warn about it once."""
        if self._outbox.fail(way, took) and not again:
            what = "MLflow no longer answers" if way == "runs" else "MLflow no longer accepts artefacts"
            where = self._outbox.path or "memory"
            warn(
                f"tracking.uri={strip_password(self.uri)}: {what} ({shorten(error)}). The run continues; what it "
                f"tracks is kept in {where}, and sent when MLflow answers again"
            )

    def metrics(self, values: Mapping[str, float], step: int, model: str = "", data: "Dataset | None" = None) -> None:
        """Buffer metrics, and send them once a batch is full."""
        catalogue.check(values)
        now = int(time.time() * 1000)
        on = {"dataset_name": data.name, "dataset_digest": data.digest} if data else {}
        about = {"model_id": model, **on} if model else {}
        self._buffer += [[name, float(value), now, step, about] for name, value in values.items()]
        if len(self._buffer) >= self.batch:
            self.flush()

    def has(self, run: str) -> bool:
        """Look up the run. It does not count if it is deleted, or cannot be looked up now."""
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        began = time.monotonic()
        try:
            return "runs" not in self._outbox.down and self._client.get_run(run).info.lifecycle_stage == "active"
        except Exception as error:  # stores and their drivers raise various errors; the run continues
            if getattr(error, "error_code", "") != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                self._note_failure("runs", error, time.monotonic() - began)
            return False

    def flush(self) -> bool:
        """Send all buffered metrics, at most 1,000 per request."""
        while self._buffer:
            batch, self._buffer[:1000] = self._buffer[:1000], []
            self._send("metrics", batch)
        return not self._outbox.messages

    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file as an artefact."""
        self._send("artifact", {"path": str(path.absolute()), "folder": folder})

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

    def end_note(self, text: str) -> None:
        """Write into the note how the run ended; if the note is too long, cut the text before that."""
        self.note(end_note(self._note[: LONGEST - len(text) - 2], text))

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run in one request."""
        self._send("tags", dict(values))

    def steps_of(self, stage: str, run: str) -> None:
        """Add a parameter that names the run."""
        self._send("params", {f"{STEPS}.{stage}": json.dumps({stage: run})})

    def inputs(self, datasets: "Sequence[Dataset]") -> None:
        """Log the data sets as inputs of the run."""
        self._send("inputs", [_input(each) for each in datasets])

    def model(self, name: str, step: int, params: Mapping[str, str], note: str) -> str:
        """Create a logged model without weights, as an output of the run."""
        known = {for_mlflow(key): for_database(value) for key, value in params.items()}
        made = self._send("model", {"name": name, "step": step, "params": known, "tags": {NOTE: for_database(note)}})
        return made or f"{LATER}{name}"

    # --- ending

    def finish(self, status: Status) -> str:
        """Send buffered metrics, set the status and release the lock.

        The next run that is tracked there sends the data that MLflow does not accept now.
        """
        if not self.id:
            return ""
        self.flush()
        self._retry(now=True)
        self._send("end", {"status": status, "time": int(time.time() * 1000), "remove": self._marks})
        left, self._marks = self._outbox.describe(), []
        if self._alive is not None:  # only after the status is written, see close_abandoned
            if left:
                self._alive.release()  # the file remains: it shows the next run that this one has ended
            else:
                free(self._alive)
            self._alive = None
        if left:
            self._describe_rest(left)
        return left

    def _describe_rest(self, left: str) -> None:
        """Report what is not tracked, and how it can still be sent."""
        path = self._outbox.path
        later = "The next run that is tracked there from this machine sends this"
        if "runs" not in self._outbox.down:  # only the store of artefacts does not answer, and the run has its status
            later = "When MLflow answers, run the same command again: it reuses the stages and tracks the files"
        elif path is not None:
            later = f"It is kept in {path}; the next run that is tracked there from this machine sends it"
        warn(f"tracking.uri={strip_password(self.uri)}: run {self.id}: not tracked yet: {left}. {later}")

    def whereabouts(self) -> list[str]:
        """Return the address of the page with the experiment's runs, and the command that serves it."""
        # without workflowType, MLflow's page shows chats instead of trainings
        runs = f"#/experiments/{self._experiment}/runs?workflowType=machine_learning"
        if is_server(self.uri):
            return [f"dashboard   {strip_password(self.uri).rstrip('/')}/{runs}"]
        file = file_of(self.uri)
        shown = self.uri if file is None else f"sqlite:///{os.path.relpath(file)}"
        command = f"mlflow ui --backend-store-uri {strip_password(shown)}"
        return [f"dashboard   {command}", f"            {LOCAL_PAGE}/{runs}"]


def _shown(folder: Path) -> str:
    """Return a folder's path from the working folder; only its name if it is elsewhere."""
    path = os.path.relpath(folder)
    return folder.name if path.startswith(os.pardir) else path


def _input(given: "Dataset") -> dict[str, Any]:
    """Convert a data set to MLflow's form, with the number of rows and the columns that its page shows."""
    columns = [{"name": name, "type": "string", "required": True} for name in given.columns]
    return {
        "name": given.name,
        "digest": given.digest,
        "source_type": given.kind,
        "source": for_database(strip_password(json.dumps(given.source))),
        "schema": json.dumps({"mlflow_colspec": columns}),
        "profile": json.dumps({"num_rows": given.rows, **given.facts}),
        "context": given.context,
    }


def _name(message: Message) -> str:
    """Name a message for people."""
    content = message.content
    names: Mapping[str, Any] = {
        "metrics": lambda: ", ".join(dict.fromkeys(each[0] for each in content)),
        "tags": lambda: ", ".join(content),
        "params": lambda: ", ".join(content),
        "artifact": lambda: content["path"],
        "inputs": lambda: "the data sets",
        "model": lambda: f"the model {content['name']}",
        "end": lambda: "how it ended",
    }
    return str(names[message.kind]())
