"""Check that the run can be tracked."""

from dnpo.errors import TrackingError
from dnpo.running.gate.finding import Finding, refuse
from dnpo.tracking.writing import Tracking


def check_tracking(tracking: Tracking) -> Finding:
    """Try the tracking store, without creating anything."""
    try:
        tracking.check()
    except TrackingError as error:
        return refuse("tracking", error, "tracking.uri, or tracking=off")
    where = tracking.where.rpartition(" ")[0]
    return Finding("tracking", "pass", f"runs can be tracked at {where}" if where else "it is off")
