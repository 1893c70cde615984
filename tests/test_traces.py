"""Nothing that others may see of a run names a path of this machine, a user or a key."""

import getpass
import platform
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.commands import run_command, train

ROOT = Path(__file__).resolve().parent.parent
KEYS = {name: f"planted-{name.lower()}-4711" for name in ("OPENAI_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD")}
OWN = {"artifact_uri", "artifact_location"}  # columns in which MLflow keeps the location of its files


@pytest.fixture(scope="module")
def swept(smoke: Path, migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of one run, whose stages are stored, with the reports on both."""
    folder = tmp_path_factory.mktemp("someones-project")
    shutil.copytree(smoke / "store", folder / "store")
    shutil.copy(migrated, folder / "mlflow.db")
    done = train(folder, "-m", "scale=smoke", "seed=0", "+sweep=main", "method=dnpo", **KEYS)
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = folder.glob("multirun/*/*")
    for place in (sweep, sweep / "0"):
        made = run_command(folder, "dnpo.commands.report", str(place), **KEYS)
        assert made.returncode == 0, made.stderr
    return folder


def texts(folder: Path) -> dict[str, str]:
    """The texts of all artefacts, pages and fields of the database."""
    found = {}
    for path in [*folder.glob("mlartifacts/**/*"), *folder.glob("report-*.html")]:
        if path.suffix == ".parquet":
            found[str(path)] = str(pq.read_table(path).to_pylist())
        elif path.is_file():
            found[str(path)] = path.read_bytes().decode("utf-8", "replace")
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
            cursor = database.execute(f"select * from {table}")
            names = [each[0] for each in cursor.description]
            for row in cursor:
                fields = {name: value for name, value in zip(names, row, strict=True) if name not in OWN}
                found[f"{table}: {fields}"] = str(fields)
    return found


@pytest.mark.long
def test_nothing_that_others_see_names_this_machine_its_user_or_a_key(swept: Path) -> None:
    seen = texts(swept)
    assert sum(path.endswith(".html") for path in seen) == 4, "two pages, each also an artefact"
    assert any(path.endswith("README.md") for path in seen)
    assert any("mlflow.note.content" in path for path in seen)
    assert not any("mlflow.user" in path for path in seen)
    private = {str(swept), str(swept.resolve()), str(Path.home()), str(ROOT), sys.prefix, *KEYS.values()}
    private |= {f"/{getpass.getuser()}/", *({platform.node()} if len(platform.node()) > 5 else ())}
    for where, text in seen.items():
        for each in private:
            assert each not in text, f"{where[:200]} has {each}"
