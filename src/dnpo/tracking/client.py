"""Connect to a tracking store through MLflow's client, without its long retries and its log output."""

import logging
import os
import re
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from dnpo.errors import TrackingError
from dnpo.tracking.sqlite import SQLITE, prepare

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # by default it retries for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds
}
# What these loggers print is also in the errors that are raised.
SILENCED = {"alembic": logging.WARNING, "mlflow": logging.ERROR, "urllib3.connectionpool": logging.ERROR}
SILENCED |= {"mlflow.store.db.utils": logging.CRITICAL}


def connect(uri: str) -> Any:
    """Return MLflow's client for a tracking store.

    Args:
        uri: address of the store, absolute.

    Raises:
        TrackingError: no server answers, or the database cannot be used.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    check_reachable(uri)
    from mlflow import MlflowClient

    for name, level in SILENCED.items():
        logging.getLogger(name).setLevel(level)
    prepare(uri)
    return MlflowClient(tracking_uri=uri)


def default_uri() -> str:
    """Return where runs are tracked by default: ``MLFLOW_TRACKING_URI``, or a file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"


def is_server(uri: str) -> bool:
    """Return whether an address is a tracking server's."""
    return uri.startswith(("http://", "https://"))


def check_reachable(uri: str, seconds: float = 10) -> None:
    """Check that a tracking server answers; MLflow's client would retry for long.

    Raises:
        TrackingError: no server answers.
    """
    if not is_server(uri):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=seconds).close()
    except HTTPError:
        pass  # a server answers; whether it accepts requests is seen later
    except (URLError, OSError) as error:
        problem = getattr(error, "reason", error)
        raise TrackingError(
            f"tracking.uri={strip_password(uri)}: no tracking server answers there ({problem}); start it, "
            "set tracking.uri or MLFLOW_TRACKING_URI, or run with tracking=off"
        ) from error


def make_absolute(uri: str) -> str:
    """Make the path of an SQLite address absolute; MLflow resolves relative ones by the current directory."""
    if uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}/"):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def strip_password(text: str) -> str:
    """Mask the user name and password of every address in a text that others may read."""
    return re.sub(r'://[^/@"\s]+@', "://…@", text)
