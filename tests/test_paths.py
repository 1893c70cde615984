"""What others may read of a run names no folder of the machine that made it."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from dnpo.tracking.paths import change_paths, from_here, last_part, override_from_here
from tests.commands import SMOKE, TINY, run_command, succeed, summary

ROWS = "".join(f'{{"prompt": "What is {i} plus 1?", "response": "It is {i + 1}."}}\n' for i in range(72))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/someone/rows.jsonl", "rows.jsonl"),
        ("~/data/rows.jsonl", "rows.jsonl"),
        ("~someone/rows.jsonl", "rows.jsonl"),
        ("sqlite:////home/someone/mlflow.db", "sqlite:///mlflow.db"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("file:///home/someone/mlartifacts", "file://mlartifacts"),
        ("https://host/home/someone", "https://host/home/someone"),
        ("org/model", "org/model"),
        ("/no_think", "/no_think"),
        ("/a/b\n/c/d", "/a/b\n/c/d"),
        (["/home/someone/a.jsonl", {"path": Path("/home/someone/b")}, 3], ["a.jsonl", {"path": "b"}, 3]),
    ],
)
def test_only_absolute_paths_are_changed(value: Any, shown: Any) -> None:
    assert change_paths(value, last_part) == shown


def test_a_command_can_be_repeated_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert override_from_here(f"data.path={tmp_path}/rows.jsonl") == "data.path=../rows.jsonl"
    assert override_from_here("seed=1") == "seed=1"
    assert (Path.cwd() / from_here(f"{tmp_path}/rows.jsonl")).resolve() == tmp_path / "rows.jsonl"


def texts_of(database: Path) -> list[tuple[str, str]]:
    """Every text that MLflow shows of runs: parameters, tags, data sets and models, with where it is."""
    found = []
    with sqlite3.connect(database) as connection:
        for table in ("params", "tags", "runs", "datasets", "inputs", "logged_model_params", "logged_model_tags"):
            names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            for row in connection.execute(f"SELECT * FROM {table}"):
                found += [(f"{table}.{n}", v) for n, v in zip(names, row, strict=True) if isinstance(v, str)]
    return found


def test_a_run_with_absolute_paths_names_no_folder(tmp_path: Path) -> None:
    """Where MLflow keeps artefacts is its own; all else, and the artefacts themselves, are looked through."""
    cwd, kept = tmp_path / "work", tmp_path / "elsewhere"
    cwd.mkdir()
    kept.mkdir()
    (kept / "rows.jsonl").write_text(ROWS)
    given = [
        *("data=jsonl", f"data.path={kept}/rows.jsonl", "method=npo", "eval.judge=null"),
        *(f"store={kept}/store", f"ledger={kept}/ledger.sqlite", f"tracking.uri=sqlite:///{kept}/mlflow.db"),
        *("data.max_prompt_tokens=48", "data.max_response_tokens=48", "tracking=mlflow"),
    ]
    settings = [each for each in (*SMOKE, *TINY) if each != "tracking=off" and not each.startswith("data.")]
    succeed(cwd, *settings, *given)
    run = next(cwd.glob("outputs/*/*/summary.json")).parent
    own = ("runs.artifact_uri", "params.tracking.artifacts")
    named = [(where, text[:200]) for where, text in texts_of(kept / "mlflow.db") if str(tmp_path) in text]
    assert [each for each in named if each[0] not in own] == []
    artefacts = [path for path in cwd.rglob("mlartifacts/**/*") if path.is_file()]
    assert artefacts
    public = [*artefacts, *(path for path in run.iterdir() if path.suffix in (".json", ".md", ".svg"))]
    assert [path for path in public if str(tmp_path).encode() in path.read_bytes()] == []
    assert summary(cwd)["settings"]["data"]["path"] == "../elsewhere/rows.jsonl"
    assert json.dumps(summary(cwd)).count("../elsewhere") >= 3
    # the run is still found from its folder
    exported = run_command(cwd, "dnpo.export", str(run), "iteration=0", f"to={tmp_path}/exported")
    assert exported.returncode == 0, exported.stdout + exported.stderr
