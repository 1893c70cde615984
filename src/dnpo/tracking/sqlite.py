"""The SQLite file of a tracking store: it is created complete or not at all, and copied before its tables change.

MLflow takes seconds and many transactions to create a database. If its process is killed meanwhile, the file can
neither be used nor repaired. MLflow would also change the tables of an older file in place. So both are done on another
file, which then replaces it.
"""

import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from dnpo.errors import TrackingError
from dnpo.escape import say

SQLITE = "sqlite:///"
PATIENCE = 20.0  # seconds to wait for a lock of another program
OTHER = "give another tracking.uri"
REPAIR = f"repair it, {OTHER} or run with tracking=off"


def file_of(uri: str) -> Path | None:
    """Return the file of an SQLite address; None for any other address."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def lock_of(file: Path) -> Path:
    """Return the file by which processes that change the database wait for each other."""
    return file.with_name(f"{file.name}.lock")


def prepare(uri: str) -> None:
    """Make the SQLite file of this address if there is none, and migrate an older one to this MLflow's tables.

    An address that is not of an SQLite file is ignored.

    Raises:
        TrackingError: the file is not such a database or cannot be migrated to this MLflow's tables; it is not changed.
    """
    file = file_of(uri)
    if file is None:
        return
    with explain(file):
        if _is_current(file):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        lock_of(file).touch()  # FileLock would wait for ever if it cannot be made, as in /proc
        with FileLock(lock_of(file)):
            if _is_current(file):  # another process has done it meanwhile
                return
            aside = file.with_name(f"{file.name}.new")
            _remove(aside)  # left by a process that was killed
            if file.is_file() and file.stat().st_size:
                _upgrade(file, aside)
            else:
                _write_tables(aside)
                aside.replace(file)


def try_file(file: Path) -> None:
    """Check that runs can be written to a file, or that the file can be made, without changing anything.

    Raises:
        TrackingError: neither is possible, or the file is not a database of MLflow.
    """
    with explain(file):
        if not file.exists():
            folder = next(each for each in file.parents if each.exists())
            if not os.access(folder, os.W_OK) or not folder.is_dir():
                raise PermissionError(f"the folder {folder} is not writable: permission denied")
            tempfile.TemporaryFile(dir=folder).close()  # root may write anywhere, but not every file system takes files
            return
        with _open(file) as database:
            database.execute("begin immediate")
            database.rollback()
        if file.stat().st_size and not _has(file, "experiments"):
            raise TrackingError(f"tracking.uri={SQLITE}{file}: it is not a database of MLflow; {OTHER}")


def _mlflow() -> Any:
    """Return MLflow's functions for databases, which ship without annotations."""
    from mlflow.store.db import utils

    return utils


def _is_current(file: Path) -> bool:
    """Return whether the file has the tables of the installed MLflow."""
    return file.is_file() and _version(file) == str(_mlflow()._get_latest_schema_revision())


def _upgrade(file: Path, aside: Path) -> None:
    """Replace the database by a copy with the tables of the installed MLflow, and keep the original next to it."""
    from mlflow.version import VERSION

    if _has_runs_in_progress(file):
        raise TrackingError(
            f"tracking.uri={SQLITE}{file}: a run is being tracked there by another version of MLflow, "
            f"whose tables differ "
            f"from those of the one here ({VERSION}); wait until that run has ended, or {OTHER}"
        )
    if not _has(file, "experiments"):
        raise TrackingError(f"tracking.uri={SQLITE}{file}: it is not a database of MLflow; {OTHER}")
    kept = file.with_name(f"{file.name}.before-{_mlflow()._get_latest_schema_revision()}")
    _copy(file, aside)
    _remove(kept)
    _copy(file, kept)
    try:
        _write_tables(aside)
    except Exception as error:  # databases and their drivers raise various errors
        if _count_runs(file):
            raise TrackingError(
                f"tracking.uri={SQLITE}{file}: its tables (version {_version(file) or 'none'}) cannot be migrated "
                f"to MLflow {VERSION} ({shorten(error)}). It is left as it was; install the MLflow that "
                f"wrote it last, {OTHER} or run with tracking=off"
            ) from error
        _remove(aside)
        _write_tables(aside)
        done = "it was incomplete and has no runs (its creation was interrupted), so it is created again"
    else:
        done = f"it was written by another MLflow; its tables are now migrated to MLflow {VERSION}"
    aside.replace(file)
    _remove_journals(file)  # of the file that was replaced
    say(
        f"warning: {file}: {done}. The original is kept as {kept.name}; delete it once you see your runs and no longer "
        "need the other MLflow; restart an mlflow ui that has the file open",
        error=True,
    )


def _write_tables(file: Path) -> None:
    """Create the tables, or migrate them to the version of the installed MLflow."""
    engine = _mlflow().create_sqlalchemy_engine(f"{SQLITE}{file}")
    try:
        _mlflow()._initialize_tables(engine)
    finally:
        engine.dispose()


def _version(file: Path) -> str:
    """Return the version of the tables, as MLflow names it; "" if there is none."""
    return str(_ask(file, "alembic_version", "version_num") or "")


def _count_runs(file: Path) -> int:
    return int(_ask(file, "runs", "count(*)") or 0)


def _ask(file: Path, table: str, column: str) -> str | int | None:
    """Return one value of a table; None if there is no such table or row."""
    if not _has(file, table):
        return None
    with _open(file) as database:
        row = database.execute(f"select {column} from {table}").fetchone()
    return None if row is None else row[0]


def _has(file: Path, table: str) -> bool:
    with _open(file) as database:
        found = database.execute("select 1 from sqlite_master where type = 'table' and name = ?", (table,))
        return found.fetchone() is not None


def _copy(file: Path, to: Path) -> None:
    """Copy a database that others may be writing to."""
    with _open(file) as database, closing(sqlite3.connect(to)) as copy:
        database.backup(copy)


@contextmanager
def _open(file: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing database for reading. SQLite also reverts the unfinished writes of a killed process."""
    with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=PATIENCE)) as database:
        yield database


def _has_runs_in_progress(file: Path) -> bool:
    """Return whether a living process of this machine tracks a run in the database."""
    for path in lock_of(file).with_suffix(".alive").glob("*"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
    return False


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    _remove_journals(file)


def _remove_journals(file: Path) -> None:
    for suffix in ("-journal", "-wal", "-shm"):
        file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)


@contextmanager
def explain(file: Path) -> Iterator[None]:
    """Turn the errors of files and databases into messages that name the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise TrackingError(
            f"tracking.uri={SQLITE}{file}: cannot be used ({shorten(error)}); {advise(error)}"
        ) from error


def advise(error: BaseException) -> str:
    """Advise on an error of a tracking store, by its text."""
    text = str(error).lower()
    if "locked" in text:
        return "another program holds the database; wait until it has finished, then run the same command again"
    if "full" in text or "no space" in text:
        return "make room, then run the same command again"
    if "readonly" in text or "read-only" in text or "permission" in text or "unable to open" in text:
        return f"expected a file and a folder that can be written; change their permissions or {OTHER}"
    return REPAIR


def shorten(error: BaseException) -> str:
    """Return the first line of an error's message, or its type; for a failed connection, the reason."""
    reason = re.search(r"\[Errno -?\d+\] ([^\"')\]]+)", str(error)) if "HTTPConnection" in str(error) else None
    return reason[1] if reason else next(iter(str(error).strip().splitlines()), type(error).__name__)
