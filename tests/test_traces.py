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
from starlette.testclient import TestClient

from dnpo.browse.runs import find
from dnpo.browse.server import make_app
from tests.commands import run_command, train

LOCAL = "http://127.0.0.1:1"
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
    for module, arguments in (
        ("analysis.command", ["fig10", "table05", "out=drawn"]),
        ("analysis.claims", ["exploratory=true", "out=claims"]),
        ("dnpo.commands.export", [str(sweep / "0"), "to=exported"]),
    ):
        made = run_command(folder, module, *arguments, **KEYS)
        assert made.returncode == 0, made.stdout + made.stderr
    return folder


def texts(folder: Path) -> dict[str, str]:
    """The texts of all artefacts, reports, cards, drawn and exported files, pages, and fields of the database."""
    found = {}
    places = (
        "mlartifacts/**/*",
        "report-*.html",
        "multirun/**/models/*/README.md",
        "drawn/*",
        "claims/*",
        "exported/*",
    )
    for path in (path for place in places for path in folder.glob(place)):
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
    (run,) = folder.glob("multirun/*/*/0")
    page = TestClient(make_app(find([str(run)], None, f"sqlite:///{folder / 'mlflow.db'}", "dnpo")), base_url=LOCAL)
    for address in ("/", "/rows", "/rows?view=pairs", "/row?row=0", "/row?view=pairs&row=0", "/row?row=none"):
        answer = page.get(address)
        found[f"browse {address}"] = f"{answer.headers} {answer.text}"
    return found


@pytest.mark.long
def test_nothing_that_others_see_names_this_machine_its_user_or_a_key(swept: Path) -> None:
    seen = texts(swept)
    assert sum(path.endswith(".html") for path in seen) == 4, "two pages, each also an artefact"
    assert any(path.endswith("README.md") for path in seen)
    assert any("mlflow.note.content" in path for path in seen)
    for kind in ("models/iteration-1/README.md", "exported/README.md", "drawn/fig10_movement.svg", "claims/claims.tex"):
        assert any(path.endswith(kind) for path in seen), kind
    assert not any("mlflow.user" in path for path in seen)
    private = {str(swept), str(swept.resolve()), str(Path.home()), str(ROOT), sys.prefix, *KEYS.values()}
    private |= {f"/{getpass.getuser()}/", *({platform.node()} if len(platform.node()) > 5 else ())}
    for where, text in seen.items():
        for each in private:
            assert each not in text, f"{where[:200]} has {each}"
