"""A tracking store is tried before a run: check=true creates nothing, and a locked database is named."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dnpo.errors import TrackingError
from dnpo.running.gate.tracking import check_tracking
from dnpo.tracking import sqlite
from dnpo.tracking.writing import MLflowTracking, Tracking
from tests.commands import run_command


class Hasty(sqlite3.Cursor):
    """Waits for no lock, though MLflow asks to wait for 20 seconds."""

    def execute(self, sql: str, *given: Any) -> "Hasty":
        return super().execute("select 1" if "busy_timeout" in sql else sql, *given)


class HastyConnection(sqlite3.Connection):
    """Its cursors do not wait."""

    def cursor(self, *given: Any) -> Any:
        return super().cursor(Hasty)


@contextmanager
def locked(file: Path, kind: str) -> Iterator[None]:
    """Lock a database as another program would."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute(f"begin {kind}")
        yield
        other.execute("rollback")


@pytest.fixture
def file(migrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(migrated, tmp_path / "mlflow.db"))


def tracker(file: Path) -> MLflowTracking:
    return MLflowTracking(uri=f"sqlite:///{file}", artifacts=str(file.parent / "artifacts"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "PATIENCE", 0.05)
    hasty = partial(sqlite3.dbapi2.connect, factory=HastyConnection)
    monkeypatch.setattr(sqlite3.dbapi2, "connect", lambda *given, **more: hasty(*given, **more | {"timeout": 0.05}))


@pytest.mark.parametrize("kind", ["immediate", "exclusive"])
def test_a_locked_database_is_named(kind: str, file: Path) -> None:
    found = check_tracking(tracker(file))
    assert (found.level, found.text) == ("pass", f"runs can be tracked at sqlite:///{file}")
    with locked(file, kind):
        found = check_tracking(tracker(file))
    assert (found.level, found.setting) == ("stop", "tracking.uri, or tracking=off")
    assert found.text.startswith(f"tracking.uri=sqlite:///{file}: cannot be used (database is locked); another program")


def test_a_run_on_a_locked_database_ends_with_a_message(file: Path, tmp_path: Path) -> None:
    """Locked for reading, so that connecting fails; and only for writing, so that creating the run fails."""
    for kind in ("exclusive", "immediate"):
        with locked(file, kind), pytest.raises(TrackingError) as caught:
            tracker(file).start("name", {}, {}, None, tmp_path)
        assert str(caught.value).startswith(f"tracking.uri=sqlite:///{file}: cannot be used (")
        assert "another program holds the database; wait until it has finished" in str(caught.value)


def test_trying_a_store_creates_nothing(tmp_path: Path, file: Path) -> None:
    before = file.read_bytes()
    there = sorted(tmp_path.iterdir())
    assert check_tracking(tracker(file)).level == "pass"
    assert check_tracking(tracker(tmp_path / "further" / "mlflow.db")).level == "pass"
    assert check_tracking(Tracking()).text == "it is off"
    assert sorted(tmp_path.iterdir()) == there
    assert file.read_bytes() == before


def test_an_address_without_a_tracking_store_is_named(tmp_path: Path) -> None:
    words = tmp_path / "words.db"
    words.write_text("These are words, and no database at all.\n" * 99)
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as database:
        database.execute("create table mine (a)")
        database.commit()
    (tmp_path / "folder.db").mkdir()
    for path, problem in (
        (words, "file is not a database"),
        (other, "is not a database of MLflow; give another tracking.uri"),
        (tmp_path / "folder.db", "unable to open database file"),
        (words / "mlflow.db", "is not writable"),
        (Path("/proc/mlflow.db"), "cannot be used ("),
    ):
        found = check_tracking(tracker(path))
        assert found.level == "stop"
        assert f"tracking.uri=sqlite:///{path}: " in found.text
        assert problem in found.text
    found = check_tracking(MLflowTracking(uri="http://127.0.0.1:9"))
    assert found.text.startswith("tracking.uri=http://127.0.0.1:9: no tracking server answers there")
    found = check_tracking(MLflowTracking(uri="oracle://someone:secret@nowhere/x"))
    assert found.level == "stop"
    assert "secret" not in found.text


def test_check_true_tries_the_tracking_store(tmp_path: Path) -> None:
    (tmp_path / "words.db").write_text("words " * 99)
    settings = ("scale=smoke", "method=spin", "judge=off", "check=true")
    done = run_command(tmp_path, "dnpo.train", *settings, f"tracking.uri=sqlite:///{tmp_path}/words.db")
    assert done.returncode == 1
    assert f"tracking.uri=sqlite:///{tmp_path}/words.db: cannot be used (file is not a database)" in done.stderr
    done = run_command(tmp_path, "dnpo.train", *settings)
    assert done.returncode == 0, done.stderr
    assert "runs can be tracked at sqlite:///" in " ".join(done.stdout.split())
    assert not (tmp_path / "mlflow.db").exists()
