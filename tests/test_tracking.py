"""A run's page in MLflow: real tracking in a SQLite database, read with MLflow's own client."""

import csv
import importlib
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import alembic.command
import numpy as np
import pytest
from filelock import FileLock
from mlflow import MlflowClient

from dnpo.catalogue import metric
from dnpo.errors import TrackingError
from dnpo.palette import choose_looks
from dnpo.report.drawing import Panel, over_iterations, progress
from dnpo.running import execute, notes
from dnpo.running.samples import tell_apart
from dnpo.stats.intervals import Estimate
from dnpo.stats.overoptimised import LEARNS_FROM
from dnpo.store import Store
from dnpo.tracking import RUNNING, end_note
from dnpo.tracking import sqlite as database
from dnpo.tracking import writing as tracking
from dnpo.tracking.alive import ABANDONED, ALIVE, NOTE
from dnpo.tracking.datasets import Dataset
from dnpo.tracking.packing import unpack
from dnpo.tracking.reading import STEPS_OF, Database
from dnpo.tracking.writing import MLflowTracking, TrackedSteps, Tracking
from tests.commands import train

PNG = b"\x89PNG\r\n\x1a\n"
ROWS: list[dict[str, Any]] = [
    {"iteration": "SFT", "eval/score": 50.0, "eval/score_human": 88.0, "eval/accuracy": 0.5, "eval/loss": 2.0},
    {"iteration": 0, "eval/score": 53.25, "eval/score_human": 88.0, "eval/accuracy": 0.5625, "eval/loss": 2.125},
]
ROWS[1] |= {"pairs/pairs": 200, "pairs/flipped": 30, "pairs/flips": 0.15, "stagnation/ks": 0.25, "seconds": 7}
ROWS[1]["stagnation/ks_critical"] = 0.06


def tracked(folder: Path, **settings: Any) -> MLflowTracking:
    return MLflowTracking(uri=f"sqlite:///{folder / 'runs.db'}", artifacts=str(folder / "artifacts"), **settings)


def client(folder: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs.db'}")


@pytest.fixture(scope="module")
def folder(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database without runs."""
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(migrated, folder / "runs.db")
    return folder


@pytest.fixture
def run(folder: Path) -> Iterator[MLflowTracking]:
    """A run that has begun."""
    run = tracked(folder)
    run.start("a run", {"npo.alpha": 0.1, "tracking.uri": "postgresql://me:secret@host/db"}, {"dnpo.kind": "run"}, None)
    yield run
    run.finish("FINISHED")


# --- the run


def test_a_page_has_its_inputs_its_models_and_their_metrics(run: MLflowTracking, folder: Path) -> None:
    held = Dataset("test", "0123456789abcdef", "evaluation", "local", {"uri": "data.jsonl"}, 48, ["id"], {"cut": 3})
    run.inputs([held])
    model = run.model("iteration-0", 0, {"stage": "optimise/abc"}, "The policy after iteration 0.")
    run.metrics({"eval/score": 51.5}, 0, model, held)
    run.metrics({"loss/policy": 0.5}, 7)
    run.finish("FINISHED")
    found = client(folder).get_run(run.id)
    (given,) = found.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("test", "0123456789abcdef")
    assert json.loads(given.dataset.profile) == {"num_rows": 48, "cut": 3}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "evaluation")]
    assert [(out.model_id, out.step) for out in found.outputs.model_outputs] == [(model, 0)]
    logged = client(folder).get_logged_model(model)
    assert (logged.name, logged.params, str(logged.status)) == ("iteration-0", {"stage": "optimise/abc"}, "READY")
    (score,) = logged.metrics
    assert (score.key, score.value, score.dataset_digest) == ("eval/score", 51.5, held.digest)
    assert found.data.metrics == {"eval/score": 51.5, "loss/policy": 0.5}


def test_passwords_in_addresses_are_not_tracked(run: MLflowTracking, folder: Path) -> None:
    run.finish("FINISHED")
    assert client(folder).get_run(run.id).data.params["tracking.uri"] == "postgresql://…@host/db"
    assert "secret" not in notes.code("python -m dnpo.train tracking.uri=postgresql://me:secret@host/db")


def test_a_note_that_is_too_long_is_cut_at_a_line_and_says_so(run: MLflowTracking, folder: Path) -> None:
    run.note("\n".join(["a line of the note"] * 1000))
    run.end_note("**Failed** at the end")
    said = client(folder).get_run(run.id).data.tags[NOTE]
    assert len(said) <= 8000
    assert said.endswith("**Failed** at the end")
    run.note("\n".join(["a line of the note"] * 1000))
    said = client(folder).get_run(run.id).data.tags[NOTE]
    assert set(said.splitlines()) == {"a line of the note", "", "(cut)"}


def test_the_shown_address_leads_to_the_runs_of_trainings(run: MLflowTracking, folder: Path) -> None:
    experiment = client(folder).get_run(run.id).info.experiment_id
    page = f"#/experiments/{experiment}/runs?workflowType=machine_learning"
    command, address = run.whereabouts()
    assert "mlflow ui --backend-store-uri sqlite:///" in command
    assert address.strip() == f"{tracking.LOCAL_PAGE}/{page}"
    run.uri = "https://me:secret@host/mlflow/"
    assert run.whereabouts() == [f"dashboard   https://…@host/mlflow/{page}"]
    run.uri = f"sqlite:///{folder / 'runs.db'}"


def test_tables_are_shown_as_tables(run: MLflowTracking, folder: Path) -> None:
    for name in ("table.json", "other.json"):
        (folder / name).write_text(json.dumps({"columns": ["a"], "data": [[1]]}))
        run.table(folder / name)
    tag = client(folder).get_run(run.id).data.tags["mlflow.loggedArtifacts"]
    assert json.loads(tag) == [{"path": name, "type": "table"} for name in ("table.json", "other.json")]


def test_prompts_that_mlflow_would_show_as_one_row_are_told_apart() -> None:
    given = [("a", "Why?"), ("b", "How?"), ("c", "Why?"), ("d", ""), ("e", ""), ("f", "Why?")]
    prompts = [{"id": name, "messages": [{"role": "user", "content": text}]} for name, text in given]
    shown = tell_apart(prompts)
    assert shown == ["Why?", "How?", "Why? (c)", "(d)", "(e)", "Why? (f)"]
    assert tell_apart(prompts[:3]) == shown[:3], "a run with fewer prompts has the same rows"


def test_a_run_can_be_continued(run: MLflowTracking, folder: Path) -> None:
    run.note("first")
    run.finish("FINISHED")
    again = tracked(folder)
    again.resume(run.id)
    again.end_note("second")
    again.finish("FAILED")
    found = client(folder).get_run(run.id)
    assert (found.data.tags[NOTE], found.info.status) == ("first\n\nsecond", "FAILED")


KILLED = """
import os, signal, sys
from pathlib import Path
from dnpo.tracking.writing import MLflowTracking
run = MLflowTracking(uri=f"sqlite:///{sys.argv[1]}/runs.db", artifacts=f"{sys.argv[1]}/artifacts")
run.start("killed", {}, {"dnpo.kind": "run"}, None)
run.note("what it is")
print(run.id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_ended_run_is_not_shown_as_running() -> None:
    note = f"what it is\n\n{RUNNING}\n\nits settings"
    assert end_note(note, ABANDONED) == f"what it is\n\n{ABANDONED}\n\nits settings"
    assert end_note("results", ABANDONED) == f"results\n\n{ABANDONED}"


def test_the_next_run_ends_those_whose_process_was_killed_and_no_others(run: MLflowTracking, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = done.stdout.strip()
    assert client(folder).get_run(killed).info.status == "RUNNING"
    following = tracked(folder)
    following.start("next", {}, {"dnpo.kind": "run"}, None)
    found = client(folder).get_run(killed)
    assert (found.info.status, found.data.tags[NOTE]) == ("KILLED", f"what it is\n\n{ABANDONED}")
    assert client(folder).get_run(run.id).info.status == "RUNNING", "its process lives"
    for one in (run, following):
        one.finish("FINISHED")
    assert [client(folder).get_run(one.id).info.status for one in (run, following)] == ["FINISHED", "FINISHED"]
    assert ALIVE not in client(folder).get_run(run.id).data.tags
    assert list((folder / "runs.db.alive").iterdir()) == []


def test_without_tracking_every_call_is_accepted() -> None:
    nowhere = tracking.Tracking()
    nowhere.note("a")
    nowhere.inputs([])
    assert nowhere.model("sft", -1, {}, "") == nowhere.id == ""


# --- notes


def test_data_is_not_interpreted_as_markdown() -> None:
    said = notes.escape("a|b\n<img src=x onerror=alert(1)> [x](javascript:y) `c` **d** http://u:p@h")
    assert "\n" not in said
    assert "<" not in said
    assert said.count("|") == said.count("\\|") == 1
    assert "\\[x\\](javascript:y)" in said
    assert "\\`c\\` \\*\\*d\\*\\*" in said
    assert "u:p@" not in said
    assert notes.code("a\n```\nb").splitlines() == ["    a", "    ```", "    b"]


def test_a_note_describes_a_run_by_its_table() -> None:
    summary = {"table": ROWS, "seconds": 12.3, "judge_agreement": [], "labelled_by": "same"}
    said = notes.describe_results(summary, Path("outputs/x_y"), "abc")
    head = said.splitlines()[0]
    assert head.startswith("**From SFT to iteration 0**: ")
    for change in ("50.0 to 53.2", "50.0 to 56.2 %", "2.000 to 2.125"):
        assert change in head
    assert "30 of 200" in said
    assert re.search(r"changed .*0\.250.*0\.060", said)
    assert "outputs/x\\_y/models" in said
    assert "    dnpo report abc" in said
    still = [{**ROWS[1], "stagnation/ks": 0.05}]
    said = notes.describe_results({**summary, "table": still}, Path("x"), "")
    assert "no difference between the new and the rejected answers can be shown" in said
    lines = notes.results(ROWS).splitlines()
    assert lines[0] == "| after iteration | score | accuracy, % | flips, % | KS | held-out loss | seconds |"
    assert lines[2] == "| SFT | 50.0 | 50.0 | – | – | 2.000 | – |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("labelled_by", LEARNS_FROM)
def test_a_note_warns_of_scores_only_if_training_learns_from_their_judge(labelled_by: str) -> None:
    summary = {"table": ROWS, "seconds": 12.3, "judge_agreement": [], "labelled_by": labelled_by}
    said = notes.describe_results(summary, Path("x"), "")
    assert f"Here {LEARNS_FROM[labelled_by]}" in said
    assert ("no evidence" in said) == (labelled_by == "same")


def test_a_note_describes_a_run_without_a_judge() -> None:
    rows = [{"iteration": "SFT", "eval/loss": 2.0}, {"iteration": 0, "eval/loss": 1.5}]
    summary = {"table": rows, "seconds": 1, "judge_agreement": [], "labelled_by": "nobody"}
    said = notes.describe_results(summary, Path("x"), "")
    assert said.startswith("**From SFT to iteration 0**: ")
    assert "2.000 to 1.500" in said
    assert "judge" not in said


def test_a_note_says_what_a_run_is_before_anything_is_computed() -> None:
    settings = {"iterations": 4, "seed": 3, "eval": {"split": "test"}, "npo": {"start": 1}, "data": {"path": "a|b"}}
    choices = {"method": "npo", "dsl": "off", "npo": "trainable", "judge": "rules", "judge@second_judge": "correct"}
    said = notes.describe_run(settings, {**choices, "data": "jsonl"}, ["method=npo", "data.path=a|b"], "12ab+")
    cells = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", said, re.MULTILINE))
    assert "origin" in cells["labels"]
    assert any(re.match(r"trainable\b.*\biteration 1\b", cell) for cell in cells.values())
    assert re.match(r"rules\b.*\bcorrect\b", cells["judge"])
    assert "| data | jsonl a\\|b |" in said
    assert "    python -m dnpo.train method=npo 'data.path=a|b'" in said
    assert re.search(r"Commit 12ab, .*changes", said)
    assert notes.title(settings, choices) == "### npo, seed 3"


# --- pictures


@pytest.mark.parametrize("groups", [1, 3, 30])
def test_a_figure_is_drawn_from_any_metrics(groups: int, tmp_path: Path) -> None:
    values = {f"g{i} $x$": {-1: Estimate(1.0), 0: Estimate(2.0 + i, 1.5 + i, 2.5 + i)} for i in range(groups)}
    panels = [Panel(metric("eval/score"), values, 3.0), Panel(metric("eval/win"), values), Panel(metric("seconds"), {})]
    over_iterations(panels, tmp_path / "a.png", "t" * 300, "note", choose_looks(dict.fromkeys(values, ("off", "off"))))
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    progress(ROWS, tmp_path / "b.png", "a run", ("off", "off"))
    assert (tmp_path / "b.png").read_bytes().startswith(PNG)


# --- whole runs


DATABASE = "sqlite:///runs.db"


@pytest.fixture(scope="module")
def swept(smoke: Path, migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sweep of two methods, with one failing job of each."""
    cwd = tmp_path_factory.mktemp("swept")
    shutil.copytree(smoke / "store", cwd / "store")
    shutil.copy(migrated, cwd / "runs.db")
    settings = ("method=spin,dnpo", "seed=0", "trainer.epochs=1,-1")
    done = train(cwd, "-m", "scale=smoke", *settings, MLFLOW_TRACKING_URI=DATABASE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Downloading" not in done.stderr
    return cwd


def runs(folder: Path) -> dict[str, Any]:
    """The run of the sweep and the runs of its jobs, by method."""
    (own,) = client(folder).search_runs(["1"], "tags.`dnpo.kind` = 'sweep'")
    jobs = client(folder).search_runs(["1"], f"tags.`mlflow.parentRunId` = '{own.info.run_id}'")
    return {"sweep": own, **{run.data.tags["dnpo.method"]: run for run in jobs}}


@pytest.mark.long
def test_the_run_of_a_sweep_has_the_comparison_and_the_failures(swept: Path) -> None:
    own = runs(swept)["sweep"]
    assert own.info.status == "FAILED"
    tags = {name: own.data.tags[f"dnpo.{name}"] for name in ("jobs", "failed", "state")}
    assert tags == {"jobs": "4", "failed": "2", "state": "incomplete"}
    said = own.data.tags[NOTE]
    assert re.search(r"\*\*Incomplete\*\*: 2 of 4 .*method; seeds 0", said)
    assert said.count("failed: trainer.epochs=-1") == 2
    assert "python -m dnpo.train -m scale=smoke method=spin,dnpo" in said
    assert f"![comparison](get-artifact?path=comparison.png&run_uuid={own.info.run_id})" in said
    kept = {file.path for file in client(swept).list_artifacts(own.info.run_id)}
    assert kept == {"comparison.png", "comparison.md", "comparison.csv", "comparison.json", "sweep.json"}
    (folder,) = swept.glob("multirun/*/*")
    assert not (folder / tracking.HELD).exists()


@pytest.mark.long
def test_the_comparison_has_the_numbers_of_the_runs(swept: Path) -> None:
    (sweep,) = swept.glob("multirun/*/*")
    cells = list(csv.DictReader((sweep / "comparison.csv").open()))
    for method, job in (("spin", "0"), ("dnpo", "2")):
        table = json.loads((sweep / job / "summary.json").read_text())["table"]
        mine = [c for c in cells if (c["measure"], c["shows"], c["row"]) == ("eval/loss", "mean", method)]
        assert [float(c["value"]) for c in mine] == pytest.approx([row["eval/loss"] for row in table])
    (apart,) = [c for c in cells if (c["measure"], c["column"]) == ("eval/loss", "k = 1") and c["shows"] != "mean"]
    last = {c["row"]: float(c["value"]) for c in cells if (c["measure"], c["column"]) == ("eval/loss", "k = 1")}
    assert (apart["shows"], apart["row"]) == ("difference from spin", "dnpo")
    both = [json.loads((sweep / job / "summary.json").read_text())["table"][-1]["eval/loss"] for job in ("2", "0")]
    assert last["dnpo"] == pytest.approx(np.subtract(*both)), "the last cell of a row is its difference"
    tracked = json.loads((sweep / "comparison.json").read_text())
    assert tracked["columns"] == ["mean or difference", "SFT", "k = 0", "k = 1"]
    rows = [row[0] for row in tracked["data"]]
    assert len(set(rows)) == len(rows), "MLflow's view shows one of the rows with the same first cell"
    assert {f"{metric('eval/loss').axis}: {of}" for of in ("spin", "dnpo", "dnpo less spin")} <= set(rows)


@pytest.mark.long
def test_a_run_records_its_inputs_and_outputs(swept: Path) -> None:
    run = runs(swept)["dnpo"]
    given = {each.dataset.name: (each.dataset, each.tags[0].value) for each in run.inputs.dataset_inputs}
    assert {name: context for name, (_, context) in given.items()} == {
        "train": "training",
        "validation": "not used",
        "test": "evaluation",
        "pairs-0": "training",
        "pairs-1": "training",
    }
    assert json.loads(given["train"][0].profile)["num_rows"] == 192
    other = {each.dataset.name: each.dataset.digest for each in runs(swept)["spin"].inputs.dataset_inputs}
    assert {name for name, (data, _) in given.items() if data.digest != other[name]} == {"pairs-1"}
    assert given["pairs-1"][0].digest == unpack(run.data.tags, run.data.params)[0]["stage.iteration-1.label"]
    steps = {client(swept).get_logged_model(out.model_id).name: out for out in run.outputs.model_outputs}
    assert {name: out.step for name, out in steps.items()} == {"sft": -1, "iteration-0": 0, "iteration-1": 1}
    model = client(swept).get_logged_model(steps["iteration-1"].model_id)
    assert (swept / model.params["folder"] / "config.json").is_file()
    table = json.loads((swept / model.params["folder"]).parents[1].joinpath("summary.json").read_text())["table"]
    scores = {metric.key: metric.value for metric in model.metrics}
    assert scores["eval/score"] == table[-1]["eval/score"]
    assert {"iteration/loss/policy", "iteration/grad_norm/first"} <= set(scores)
    said = run.data.tags[NOTE]
    assert said.startswith("### dnpo, seed 0\n\n**From SFT to iteration 1**: ")
    kept = {file.path for file in client(swept).list_artifacts(run.info.run_id)}
    assert {"progress.png", "table.md", "table.json"} <= kept


@pytest.mark.long
def test_a_stage_is_tracked_and_drawn_once(
    smoke: Path, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its run is deleted, the next run tracks the steps again."""
    shutil.copytree(smoke / "store", tmp_path / "store")
    shutil.copy(migrated, tmp_path / "runs.db")

    def run() -> tuple[Any, dict[str, int], set[str]]:
        done = train(tmp_path, "scale=smoke", MLFLOW_TRACKING_URI=DATABASE, TESTS_DRAW="all")
        assert done.returncode == 0, done.stdout + done.stderr
        run = client(tmp_path).search_runs(["1"], order_by=["start_time DESC"])[0]
        names = ("loss/policy", "sft/loss/policy", "eval/loss")
        own = {name: len(client(tmp_path).get_metric_history(run.info.run_id, name)) for name in names}
        return (
            run,
            own,
            {value for tag, value in unpack(run.data.tags, run.data.params)[0].items() if tag.startswith(STEPS_OF)},
        )

    def draw(*given: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr("dnpo.report.drawing.logprob_histogram", draw)
    first, tracked_by_first, found = run()  # the data of the store's own run are in another database
    assert (tracked_by_first["sft/loss/policy"], tracked_by_first["eval/loss"], found) == (60, 3, set())
    second, tracked_by_second, found = run()
    assert tracked_by_second == {"loss/policy": 0, "sft/loss/policy": 0, "eval/loss": 3}
    assert found == {first.info.run_id}
    pictures = {file.path for file in client(tmp_path).list_artifacts(second.info.run_id, "logprobs")}
    assert {"logprobs/sft.png", "logprobs/iteration-0.png", "logprobs/iteration-1.png"} <= pictures
    read = Database(f"sqlite:///{tmp_path / 'runs.db'}").runs()
    for name in ("loss/policy", "sft/loss/policy"):
        one, other = (run.history(name) for run in read)
        assert one == other
        assert len(one) == tracked_by_first[name]
    client(tmp_path).delete_run(first.info.run_id)
    third, tracked_by_third, found = run()
    assert (tracked_by_third, found) == (tracked_by_first, set())
    _, _, found = run()
    assert found == {third.info.run_id}


def test_a_training_is_tracked_under_each_of_its_names(tmp_path: Path) -> None:
    plain, matched = (TrackedSteps(tmp_path, "0123", prefix) for prefix in ("", "like/"))
    plain.add("here", "one")
    plain.add("there", "two")
    assert [plain.run(where) for where in ("here", "there", "elsewhere")] == ["one", "two", ""]
    assert matched.run("here") == ""
    plain.add("here", "three")
    assert TrackedSteps(tmp_path, "0123").run("here") == "three"


def test_a_run_is_found_by_its_id(run: MLflowTracking, folder: Path) -> None:
    assert run.has(run.id)
    assert not run.has("0" * 32)
    assert not Tracking().has(run.id)


@pytest.mark.long
def test_a_failed_run_names_the_place(swept: Path) -> None:
    done = train(
        swept,
        "scale=smoke",
        "method=spin",
        "seed=0",
        "trainer.optimizer.lr=1e30",
        "iterations=1",
        MLFLOW_TRACKING_URI=DATABASE,
    )
    assert done.returncode == 1, done.stdout
    (run,) = client(swept).search_runs(["1"], "attributes.status = 'FAILED' and tags.`dnpo.kind` = 'run'")
    assert run.info.status == "FAILED"
    assert "**Failed** at iteration 0 · optimise: " in run.data.tags[NOTE]
    assert notes.CONTINUES in run.data.tags[NOTE]


# --- the database's file


KILLED_AT = """
import os, signal, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
from dnpo.tracking import sqlite as database
left = [int(sys.argv[2])]

def count(*_):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Engine, "before_cursor_execute", count)
database.prepare(f"sqlite:///{sys.argv[1]}")
"""


def prepare_and_die(file: Path, statement: int) -> None:
    """Prepare a database in a process that is killed before this statement."""
    script = [sys.executable, "-c", KILLED_AT, str(file), str(statement)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def query(file: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(file)) as opened, opened:
        return opened.execute(statement).fetchall()


def tables_of_an_earlier_mlflow(file: Path) -> None:
    """Undo the newest migration, as if an earlier version of MLflow had written the database."""
    utils: Any = importlib.import_module("mlflow.store.db.utils")
    engine, config = utils.create_sqlalchemy_engine(f"sqlite:///{file}"), utils._get_alembic_config("")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, "-1")
    engine.dispose()


def test_a_kill_while_the_database_is_made_leaves_none_and_the_next_start_makes_it(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "mlflow.db"
    prepare_and_die(file, 150)
    assert not file.exists()
    assert (tmp_path / "new folder" / "mlflow.db.new").exists()
    database.prepare(f"sqlite:///{file}")
    assert MlflowClient(tracking_uri=f"sqlite:///{file}").search_experiments()
    assert not file.with_name("mlflow.db.new").exists()


@pytest.fixture
def older(folder: Path, run: MLflowTracking, tmp_path: Path) -> Path:
    """A database with a run and with the tables of an earlier MLflow."""
    shutil.copy(folder / "runs.db", tmp_path / "runs.db")
    tables_of_an_earlier_mlflow(tmp_path / "runs.db")
    return tmp_path / "runs.db"


def test_older_tables_are_changed_in_a_copy_and_the_old_ones_are_kept(
    older: Path, run: MLflowTracking, capsys: pytest.CaptureFixture[str]
) -> None:
    before = query(older, "select * from alembic_version")
    prepare_and_die(older, 5)
    assert query(older, "select * from alembic_version") == before, "a kill changes nothing"
    database.prepare(f"sqlite:///{older}")
    (kept,) = older.parent.glob("runs.db.before-*[0-9a-f]")
    assert re.search(rf"runs\.db: .*another MLflow.*{kept.name}; delete it once", capsys.readouterr().err)
    assert query(kept, "select * from alembic_version") == before
    assert run.id in {found.info.run_id for found in client(older.parent).search_runs(["1"])}
    database.prepare(f"sqlite:///{older}")
    assert capsys.readouterr().err == ""


def test_a_database_that_another_mlflow_is_writing_to_is_not_replaced(older: Path) -> None:
    alive = older.parent / "runs.db.alive"
    alive.mkdir()
    with FileLock(alive / "a run"), pytest.raises(TrackingError, match="wait until that run has ended"):
        database.prepare(f"sqlite:///{older}")


def test_tables_that_cannot_be_brought_up_to_date_are_left_as_they_are(
    older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A database broken by a kill under earlier versions of dnpo: made again without a run, else refused by name."""
    query(older, "update alembic_version set version_num = 'unknown'")
    before = older.read_bytes()
    with pytest.raises(TrackingError, match=r"runs\.db: its tables \(version unknown\).*left as it was"):
        database.prepare(f"sqlite:///{older}")
    assert older.read_bytes() == before
    query(older, "delete from runs")
    database.prepare(f"sqlite:///{older}")
    assert re.search(r"incomplete.*created again", capsys.readouterr().err)
    assert client(older.parent).search_experiments()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no database at all, but text", "file is not a database.*repair it, give another tracking.uri"),
        (None, "not a database of MLflow; give another tracking.uri"),
    ],
    ids=["text", "another database"],
)
def test_files_of_something_else_are_refused_and_left_alone(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "runs.db"
    if content is None:
        query(file, "create table calls (id)")
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(TrackingError, match=rf"tracking\.uri=sqlite:///\S*runs\.db: .*{message}"):
        database.prepare(f"sqlite:///{file}")
    assert file.read_bytes() == before


def test_a_file_that_cannot_be_made_is_refused_at_once() -> None:
    """Root may write anywhere, but this file system takes no files."""
    with pytest.raises(TrackingError, match=r"^tracking\.uri=sqlite:////proc/runs\.db: cannot be used \("):
        database.prepare("sqlite:////proc/runs.db")


def test_figures_are_drawn_again_by_new_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTS_DRAW", "all")
    store, drawn = Store(tmp_path / "store"), []
    store.open(print)

    def draw(path: Path) -> None:
        drawn.append(path)
        path.write_bytes(PNG)

    for _ in range(2):
        execute._draw_once(store, "key", draw, tmp_path / "a.png")
    assert len(drawn) == 1
    monkeypatch.setattr(execute, "_hash_drawing", lambda: "another palette")
    execute._draw_once(store, "key", draw, tmp_path / "a.png")
    assert len(drawn) == 2
