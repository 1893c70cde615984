"""Writing to MLflow (``writing.py``), and reading it back (``reading.py``)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dnpo.settings import Count, neutral

if TYPE_CHECKING:
    from dnpo.tracking.writing import Tracking


@dataclass(frozen=True)
class NoTracking:
    """Nothing is tracked."""

    def open(self) -> "Tracking":
        """What takes everything and keeps nothing."""
        from dnpo.tracking.writing import Tracking

        return Tracking()


@dataclass(frozen=True)
class MLflow:
    """Where runs are tracked: what ``tracking=mlflow`` configures.

    Args:
        uri: of the tracking store; a relative ``sqlite:///file`` lies in the working directory.
        experiment: its name.
        artifacts: folder for artefacts of a new experiment where the store is a local database; null for the server's.
        batch: metrics sent at once.
    """

    uri: str = neutral("sqlite:///mlflow.db")
    experiment: str = neutral("dnpo")
    artifacts: str | None = neutral("mlartifacts")
    batch: Count = neutral(1000)

    def open(self) -> "Tracking":
        """What writes there. The store is reached when a run starts."""
        from dnpo.tracking.writing import MLflowTracking

        return MLflowTracking(uri=self.uri, experiment=self.experiment, artifacts=self.artifacts, batch=self.batch)
