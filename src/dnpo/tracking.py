"""Where runs are tracked: MLflow, or nowhere.

Step metrics are buffered and sent in batches; one by one they would take longer than the training steps they describe.
"""

import logging
import os
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError

from filelock import FileLock

from dnpo.errors import TrackingError
from dnpo.settings import Count

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracking:
    """What ``tracking=…`` configures. This one tracks nothing; others override what they do."""

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str], sweep: Path | None) -> None:
        """Begin a run; with ``sweep``, a folder that all jobs of a multirun share, nested in the sweep's run.

        Raises:
            TrackingError: the store cannot be reached.
        """

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics; they may be buffered."""

    def flush(self) -> None:
        """Send what is buffered."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file with the run."""

    def finish(self, status: Status) -> None:
        """End the run."""

    def whereabouts(self) -> list[str]:
        """Lines that say where to look."""
        return []


class MLflow(Tracking):
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
        batch: Count = 1000,
    ) -> None:
        self.uri = absolute(uri)
        self.experiment, self.artifacts, self.batch = experiment, artifacts, batch
        self._buffer: list[Any] = []
        self._run = ""

    def start(self, name: str, settings: Mapping[str, Any], tags: Mapping[str, str], sweep: Path | None) -> None:
        """See :class:`Tracking`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        reachable(self.uri)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for noisy in ("alembic", "mlflow", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        params = [Param(key, str(value)[:6000]) for key, value in settings.items()]
        try:
            with FileLock(self._lock()):  # processes that meet on a fresh database break each other's migration
                self._client = MlflowClient(tracking_uri=self.uri)
                experiment = self._experiment()
            known = {name: tags[name] for name in ("dnpo.sweep_name",) if name in tags}
            parent = {"mlflow.parentRunId": self._parent(experiment, sweep, known)} if sweep is not None else {}
            run = self._client.create_run(experiment, run_name=name, tags={**tags, **parent})
            self._run = run.info.run_id
            for start in range(0, len(params), 100):
                self._client.log_batch(self._run, params=params[start : start + 100])
        except Exception as error:  # databases and their drivers raise errors of their own
            problem = str(error).splitlines()[0]
            raise TrackingError(
                f"tracking.uri={self.uri}: cannot be used ({problem}); mend it, give another, or run with tracking=off"
            ) from error
        self._url = (experiment, self._run)

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
        return str(self._client.create_experiment(self.experiment, artifact_location=where))

    def _parent(self, experiment: str, sweep: Path, tags: Mapping[str, str]) -> str:
        """The run of the whole multirun, which the first of its jobs creates."""
        note = sweep / "mlflow-parent.txt"
        with FileLock(sweep / "mlflow-parent.lock"):
            if not note.is_file():
                own = {"dnpo.sweep": str(sweep), "dnpo.kind": "sweep", **tags}
                name = tags.get("dnpo.sweep_name", sweep.name)
                run = self._client.create_run(experiment, run_name=f"sweep {name}", tags=own)
                self._client.set_terminated(run.info.run_id)
                note.write_text(run.info.run_id)
        return note.read_text()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See :class:`Tracking`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._buffer += [Metric(name, float(value), now, step) for name, value in values.items()]
        if len(self._buffer) >= self.batch:
            self.flush()

    def flush(self) -> None:
        """See :class:`Tracking`."""
        while self._buffer:
            self._client.log_batch(self._run, metrics=self._buffer[:1000])
            del self._buffer[:1000]

    def artifact(self, path: Path, folder: str = "") -> None:
        """See :class:`Tracking`."""
        self._client.log_artifact(self._run, str(path), folder or None)

    def finish(self, status: Status) -> None:
        """See :class:`Tracking`."""
        if self._run:
            self.flush()
            self._client.set_terminated(self._run, status)

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


def mean_of_metric(uri: str, run: str, metric: str) -> float:
    """The mean of a metric over the steps at which an MLflow run tracked it.

    Raises:
        TrackingError: the store has no such run, or the run never tracked the metric.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    reachable(absolute(uri))
    try:
        values = [point.value for point in MlflowClient(tracking_uri=absolute(uri)).get_metric_history(run, metric)]
    except MlflowException as error:
        raise TrackingError(f"run:{run}: not found in tracking.uri={uri}: {error}") from error
    if not values:
        raise TrackingError(f"run:{run}: it tracked no {metric}; give a run with npo=trainable or npo=fixed")
    return float(sum(values) / len(values))


def reachable(uri: str) -> None:
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


def absolute(uri: str) -> str:
    """MLflow reads relative paths against wherever a process stands, so say where from the beginning."""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri
