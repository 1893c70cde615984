"""Write runs to MLflow (``writing.py``), and read them (``reading.py``)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnpo.settings import Count, neutral

if TYPE_CHECKING:
    from dnpo.tracking.writing import Tracking

RUN_ID = "mlflow-run.txt"  # file in a run's folder with the id of the run, from its beginning
PARENT_ID = "mlflow-parent.txt"  # file in a sweep's folder with the id of its parent run
RUNNING = "*It is running; its results will appear here.*"  # in a run's note, until it has ended


def end_note(note: str, text: str) -> str:
    """In a run's note, replace the line that says that it is running with how it ended."""
    return note.replace(RUNNING, text) if RUNNING in note else f"{note}\n\n{text}"


@dataclass(frozen=True)
class NoTracking:
    """Settings of ``tracking=off``: nothing is tracked."""

    def open(self) -> "Tracking":
        """Return a tracker that discards everything."""
        from dnpo.tracking.writing import Tracking

        return Tracking()


@dataclass(frozen=True)
class MLflow:
    """Settings of ``tracking=mlflow``: where runs are tracked.

    Args:
        uri: address of the tracking store; a relative ``sqlite:///file`` lies in the working directory.
        experiment: name of the MLflow experiment.
        artifacts: artefact folder of a new experiment if the store is a local database; null for the server's default.
        batch: number of metrics sent at once.
    """

    uri: str = neutral("sqlite:///mlflow.db")
    experiment: str = neutral("dnpo")
    artifacts: str | None = neutral("mlartifacts")
    batch: Count = neutral(1000)

    def open(self) -> "Tracking":
        """Return a tracker that writes to MLflow. It connects to the store when a run starts."""
        from dnpo.tracking.writing import MLflowTracking

        return MLflowTracking(uri=self.uri, experiment=self.experiment, artifacts=self.artifacts, batch=self.batch)
