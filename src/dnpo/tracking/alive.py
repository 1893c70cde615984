"""Find runs whose process was killed: MLflow would show them as running for ever.

So each run locks a file while it is alive and names the file in a tag. The operating system frees the lock when the
process ends, and the next run on the same store and machine closes all runs whose lock is free.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dnpo.tracking import end_note
from dnpo.tracking.outbox import KEPT, read_kept, send_kept, warn
from dnpo.tracking.sqlite import shorten

NOTE, ALIVE = "mlflow.note.content", "dnpo.alive"
ABANDONED = "**Its process is gone**: it was killed. Finished stages are kept, and the same command continues it."


def close_abandoned(client: Any, experiment: str) -> list[str]:
    """End the runs that are marked as running although their process is gone, and return their ids.

    If MLflow did not answer such a run, the run's folder has the unsent data. They are sent first, since they may
    include how the run ended. A run whose lock file is on another machine is not changed, since its state is unknown
    here.
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
        kept = Path(run.data.tags.get(KEPT, ""))
        if kept.is_file() and not _send(client, experiment, run.info.run_id, kept):
            lock.release()
            continue
        found = client.get_run(run.info.run_id)
        if found.info.status == "RUNNING":  # it may have ended in the meantime
            client.set_tag(run.info.run_id, NOTE, end_note(found.data.tags.get(NOTE, ""), ABANDONED))
            client.set_terminated(run.info.run_id, "KILLED")
            for mark in (ALIVE, KEPT):
                if mark in run.data.tags:
                    client.delete_tag(run.info.run_id, mark)
            closed.append(run.info.run_id)
        free(lock)
    return closed


def _send(client: Any, experiment: str, run: str, kept: Path) -> bool:
    """Send the data that a run kept, and return whether that was possible; if not, the next run tries again."""
    try:
        send_kept(client, experiment, run, read_kept(kept))
    except Exception as error:  # stores raise various errors, which must not stop the new run
        warn(f"{kept}: cannot be sent to run {run} ({shorten(error)}); it is kept")
        return False
    kept.unlink()
    return True


def free(lock: FileLock) -> None:
    """Release a lock and delete its file."""
    lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink()
