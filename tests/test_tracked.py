"""Reading tracked data: runs found by sweep, id and tags, and clear messages if nothing is found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dnpo.commands.report import main as report
from dnpo.errors import DataError, TrackingError
from dnpo.records import mean_over_steps
from dnpo.report.selection import select
from dnpo.running.execute import TRACKED, thin
from dnpo.settings import flat
from dnpo.tracking.client import connect
from dnpo.tracking.earlier import complete, rename
from dnpo.tracking.neutral import find_neutral
from dnpo.tracking.reading import STEPS_OF, Database, is_of_sweep, iteration_name, read_stage_keys
from dnpo.tracking.sources import Served, open_source
from dnpo.tracking.writing import MLflowTracking
from tests.test_building import composed

Made = dict[str, str]


@pytest.fixture(scope="module")
def uri(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with a sweep of two seeds, one failed, and a single run."""
    folder = tmp_path_factory.mktemp("tracked")
    shutil.copy(migrated, folder / "mlflow.db")
    where = f"sqlite:///{folder / 'mlflow.db'}"
    sweep = folder / "multirun" / "1"
    sweep.mkdir(parents=True)
    for seed, status in ((0, "FINISHED"), (1, "FAILED")):
        tracking = MLflowTracking(uri=where, artifacts=str(folder / "artifacts"))
        tags = {"dnpo.kind": "run", "dnpo.seed": str(seed), "dnpo.npo": "trainable", "dnpo.sweep_name": "main"}
        tracking.start(f"seed={seed}", {"seed": seed, "npo.alpha": 0.1}, tags, sweep)
        for step, value in enumerate((0.7, 0.6)):
            tracking.metrics({"loss/policy": value + seed}, step)
        if status == "FINISHED":
            path = folder / "summary.json"
            path.write_text(json.dumps({"table": [{"iteration": "SFT"}, {"iteration": 0, "eval/score": 50.0}]}))
            tracking.artifact(path)
        tracking.finish(status)  # type: ignore[arg-type]
    alone = MLflowTracking(uri=where, artifacts=str(folder / "artifacts"))
    alone.start("alone", {"seed": 7}, {"dnpo.kind": "run", "dnpo.seed": "7", "dnpo.npo": "off"}, None)
    alone.finish("FINISHED")
    return where


def test_runs_are_found_by_sweep_by_id_and_by_tag(uri: str) -> None:
    database = Database(uri)
    every = database.runs()
    assert [run.seed for run in every] == [0, 1, 7]
    assert [run.seed for run in database.runs(sweeps=["main"])] == [0, 1]
    parent = database.parent(every[0])
    assert parent is not None
    assert [run.seed for run in database.runs(sweeps=[parent.id])] == [0, 1]
    folder = Path(uri.removeprefix("sqlite:///")).parent / "multirun" / "1"
    assert [run.seed for run in database.runs(sweeps=[str(folder)])] == [0, 1]
    assert not Path(parent.tags["dnpo.sweep"]).is_absolute()
    of_an_earlier_version = replace(parent, tags={**parent.tags, "dnpo.sweep": str(folder / "x")})
    assert is_of_sweep(of_an_earlier_version, folder / "x")
    assert not is_of_sweep(parent, folder / "x")
    assert [run.seed for run in database.runs(ids=[every[2].id[:12]])] == [7]
    assert [run.seed for run in database.runs(tags={"dnpo.npo": "trainable", "seed": "1"})] == [1]
    assert database.sweeps() == {"main": 2}
    assert database.parent(every[2]) is None


def test_a_run_has_its_table_steps_and_options(uri: str) -> None:
    first, failed, alone = Database(uri).runs()
    assert first.finished
    assert not failed.finished
    assert first.last == first.row(0) == {"iteration": 0, "eval/score": 50.0}
    assert first.row(3) == {}
    assert failed.history("loss/policy") == [(0, 1.7), (1, 1.6)]
    assert (alone.option("npo"), alone.option("dsl")) == ("off", "")
    assert first.artifact("nothing.txt") is None
    with pytest.raises(DataError, match=r"summary\.json: .*FAILED"):
        _ = failed.summary


def test_steps_that_another_run_tracked_are_read_from_the_rows(migrated: Path, tmp_path: Path) -> None:
    """Fine-tuning and iteration 0 existed and iteration 1 is new; its noise is matched to an existing training."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    where = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracking = MLflowTracking(uri=where, artifacts=str(tmp_path / "artifacts"))
    tags = {"dnpo.kind": "run", "dnpo.seed": "0", f"{STEPS_OF}iteration-0.optimise": "0" * 32}
    tracking.start("shared", {}, tags, None)
    rows = {
        "steps/sft": [{"step": 0, "loss/policy": 2.0}, {"step": 1, "loss/policy": 1.9}],
        "steps/iteration-0": [{"step": 0, "loss/policy": 0.7}, {"step": 1, "loss/policy": 0.6, "npo/shift": 3.0}],
        "steps/iteration-1": [{"step": 0, "loss/policy": 0.5}],
        "like/iteration-1": [{"step": 0, "loss/policy": 0.4}],
    }
    for name, content in rows.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        tracking.artifact(path, path.parent.name)
    tracking.metrics({"loss/policy": 0.5}, 2)
    tracking.finish("FINISHED")
    (run,) = Database(where).runs()
    assert run.history("loss/policy") == [(0, 0.7), (1, 0.6), (2, 0.5)]
    assert run.history("npo/shift") == [(1, 3.0)]
    assert run.history("sft/loss/policy") == [(0, 2.0), (1, 1.9)]
    assert run.history("like/loss/policy") == [(2, 0.4)]
    assert run.history("loss/noise") == []


def test_a_file_is_read_as_mlflows_client_reads_it(uri: str, tmp_path: Path) -> None:
    """Not-a-number values, deleted runs and deleted experiments too."""
    copied = tmp_path / "mlflow.db"
    shutil.copy(uri.removeprefix("sqlite:///"), copied)
    uri = f"sqlite:///{copied}"
    client = connect(uri)
    client.delete_experiment(client.create_experiment("deleted"))
    experiment = client.create_experiment("other")
    gone, failed = (client.create_run(experiment, run_name=name, tags={"x": "it's"}).info.run_id for name in "ab")
    client.delete_run(gone)
    for step, value in ((3, float("nan")), (1, 2.0), (1, 3.0), (2, float("inf"))):
        client.log_metric(failed, "m", value, step=step)
    by_file, by_client = open_source(uri), Served(uri, client)
    assert by_file.experiments() == by_client.experiments()
    assert {"other", "dnpo"} <= by_file.experiments().keys()
    for each in by_file.experiments().values():
        for tags in ({}, {"dnpo.sweep_name": "main", "dnpo.kind": "run"}, {"x": "it's"}):
            found = by_file.runs(each, tags)
            assert found == by_client.runs(each, tags)
            assert all(by_file.run(run.id) == by_client.run(run.id) == run for run in found)
    assert len(by_file.runs(by_file.experiments()["dnpo"], {"dnpo.sweep_name": "main", "dnpo.kind": "run"})) == 2
    assert by_file.run(gone) is by_client.run(gone) is by_file.run("none") is by_client.run("none") is None
    assert str(by_file.history(failed, "m")) == str(by_client.history(failed, "m"))
    assert by_file.history(failed, "m")[1] == (1, 2.0)
    assert by_file.history(failed, "none") == by_client.history(failed, "none") == []


def test_a_file_is_added_to_a_run_where_mlflow_finds_it(uri: str, tmp_path: Path) -> None:
    database = Database(uri)
    run = database.runs()[0]
    (tmp_path / "page.html").write_text("text")
    database.log(run.id, tmp_path / "page.html", "pages")
    assert [each.path for each in database.client.list_artifacts(run.id, "pages")] == ["pages/page.html"]
    assert Path(run.artifact("pages/page.html") or "").read_text() == "text"
    with pytest.raises(TrackingError, match="run none does not exist"):
        database.log("none", tmp_path / "page.html")


def test_a_file_without_mlflows_tables_is_no_tracking_store(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("text " * 200)
    with pytest.raises(TrackingError, match=r"empty\.db: it is not a database of MLflow"):
        Database(f"sqlite:///{tmp_path / 'empty.db'}")
    with pytest.raises(TrackingError, match=r"text\.db: cannot be used \(file is not a database\)"):
        Database(f"sqlite:///{tmp_path / 'text.db'}")


@pytest.mark.parametrize(("total", "every"), [(TRACKED, 1), (TRACKED + 1, 2), (3 * TRACKED, 3)])
def test_a_long_training_tracks_evenly_spaced_steps_and_exact_means(total: int, every: int) -> None:
    rows = [{"step": float(i), "rows": 1.0 + i % 3, "loss/policy": 1.0, "npo/shift": 0.1 * i} for i in range(total)]
    tracked = [thin(row, total) for row in rows]
    whole = [int(row["step"]) for row in tracked if "loss/policy" in row]
    assert whole == sorted({*range(0, total, every), total - 1})
    assert len(whole) <= TRACKED + 1
    assert mean_over_steps(tracked, "npo/shift") == mean_over_steps(rows, "npo/shift")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"sweeps": ["mian"]}, r"no run of sweep mian is tracked .* it has main \(2 runs\)"),
        ({"ids": ["nothing"]}, "no run nothing is tracked"),
        ({"ids": [""]}, "3 runs have ids that begin so"),
        ({"tags": {"dnpo.npo": "fixed"}}, r"no run is left with dnpo\.npo=fixed; values of dnpo\.npo: trainable \(2\)"),
    ],
)
def test_missing_runs_are_reported(uri: str, chosen: dict[str, list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Database(uri).runs(**chosen)  # type: ignore[arg-type]


def test_a_missing_database_is_reported_and_not_created(uri: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"none\.db"):
        Database(f"sqlite:///{tmp_path / 'none.db'}")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(TrackingError, match=r"\bdnpu\b.*\bdnpo\b"):
        Database(uri, "dnpu")


def test_iterations_have_the_names_of_their_artefacts() -> None:
    assert [iteration_name(k) for k in ("SFT", 0, 3)] == ["sft", "iteration-0", "iteration-3"]


# --- settings that cannot change a result


def test_comparisons_ignore_the_neutral_settings_of_parts() -> None:
    """Batch sizes, costs and paths do not distinguish runs; contents do, and so does a path with unknown contents."""
    params = {
        "judge._target_": "dnpo.judges.openai.OpenAI",  # an import path of an earlier layout
        "model._target_": "dnpo.policy.base.Pretrained",
        "model.contents": "0123",
        "generate._target_": "dnpo.generate.Sampling",
        "trainer._target_": "dnpo.optimise.parts.PairOptimisation",
        "data._target_": "mine.data.Rows",
        "store": "here",
        "tracking.uri": "x",
    }
    neutral = find_neutral(params)
    assert {"store", "ledger", "device", "threads", "tracking.uri", "model.path", "trainer.micro_batch_size"} <= neutral
    assert not {"seed", "iterations", "sft_rows", "trainer.batch_size", "model.dtype", "data.path"} & neutral
    unknown = find_neutral({name: value for name, value in params.items() if name != "model.contents"})
    assert neutral - unknown == {"model.path"}
    assert not {name for name in find_neutral({"npo._target_": "dnpo.no.longer.There"}) if name.startswith("npo.")}


def test_a_run_older_than_a_setting_had_its_default() -> None:
    """Otherwise a comparison would refuse runs of two versions that share their stages."""
    params = {
        name: str(value) for name, value in flat(OmegaConf.to_container(composed("method=dnpo"), resolve=True)).items()
    }
    whole = complete(params)
    assert {name: whole[name] for name in params} == params
    later = ("generate.engine", "rollout.engine", "reference", "strength._target_", "ema._target_", "generate.top_p")
    assert set(later) <= set(params)
    before = {name: value for name, value in params.items() if name not in later}
    assert {name: complete(before)[name] for name in params} == params
    other = complete({**before, "reference": "initial", "ema._target_": "dnpo.optimise.parts.MovingAverage"})
    assert (other["reference"], other["ema._target_"]) == ("initial", "dnpo.optimise.parts.MovingAverage")
    assert "generate.engine" not in complete({**before, "generate.engine._target_": "dnpo.generate.server.Server"})
    assert complete({"a": "b"}) == {"a": "b"}


def test_earlier_names_of_parts_are_read_as_the_present_ones() -> None:
    """Otherwise a run of an earlier layout would differ from a present one in parts that only moved."""
    assert rename(
        {
            "trainer._target_": "dnpo.training.Optimisation",
            "sft._target_": "dnpo.training.Optimisation",
            "sft.optimizer._partial_": "True",
            "judge._target_": "dnpo.judges.rules.Rules",
            "judge.note": "dnpo.judges.rules.Rules",
        }
    ) == {
        "trainer._target_": "dnpo.optimise.parts.PairOptimisation",
        "sft._target_": "dnpo.optimise.parts.Optimisation",
        "judge._target_": "dnpo.judges.exact.rules.Rules",
        "judge.note": "dnpo.judges.rules.Rules",
    }


def test_of_equally_named_sweeps_the_newest_is_reported_and_the_others_are_named(
    migrated: Path, tmp_path: Path
) -> None:
    """A smoke sweep and a later one at full scale are different sweeps; so is a single run with the same name."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    where, ids = f"sqlite:///{tmp_path / 'mlflow.db'}", []
    for folder, scale in (("1", "smoke"), ("1", "smoke"), ("", "alone"), ("2", "full"), ("2", "full")):
        sweep = tmp_path / folder if folder else None
        if sweep is not None:
            sweep.mkdir(exist_ok=True)
        tracking = MLflowTracking(uri=where, artifacts=str(tmp_path / "artifacts"))
        tags = {"dnpo.kind": "run", "dnpo.seed": "0", "dnpo.scale": scale, "dnpo.sweep_name": "main"}
        tracking.start(scale, {}, tags, sweep)
        tracking.finish("FINISHED")
        ids.append(tracking.id)
    database = Database(where)
    found = select(database, "main")
    assert [run.option("scale") for run in found.runs] == ["full", "full"]
    parent = database.parent(next(run for run in database.runs() if run.id == ids[0]))
    assert parent is not None
    assert f"{parent.id[:12]} (2 runs)" in found.left_out
    assert "without a sweep (1 run)" in found.left_out
    older = select(database, parent.id[:12])
    assert [run.option("scale") for run in older.runs] == ["smoke", "smoke"]
    assert older.left_out == ""


def test_a_report_reads_from_the_environments_tracking_address(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        report(["main"])
    assert "sqlite:///mlflow.db: there is no such database" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SystemExit):
        report(["nothing"])
    assert f"is tracked in {uri}" in capsys.readouterr().err


def test_keys_of_a_runs_stages_are_in_parameters_and_in_tags_for_earlier_runs(migrated: Path, tmp_path: Path) -> None:
    shutil.copy(migrated, tmp_path / "runs.db")
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    keys = {f"iteration-{k}.{verb}": f"{k:08x}{n:08x}" for k in range(50) for n, verb in enumerate("abcdefgh")}
    options = {f"dnpo.{name}": f"option {name}" for name in ("method", "npo", "second_judge")}
    tags = {"dnpo.kind": "run", "dnpo.seed": "0", **options}

    def begin(name: str, **more: dict[str, str]) -> MLflowTracking:
        tracking = MLflowTracking(uri=uri, artifacts=str(tmp_path / "artifacts"))
        tracking.start(name, {"seed": 0}, {**tags, **more.pop("tags", {})}, None, **more)  # type: ignore[arg-type]
        return tracking

    present = begin("present", stages=keys)
    present.steps_of("iteration-0.optimise", "a" * 32)
    present.steps_of("iteration-1.optimise", "b" * 32)
    former = begin("former", tags={f"stage.{name}": key for name, key in keys.items()})
    former.tags({f"steps.iteration-{k}.optimise": letter * 32 for k, letter in enumerate("ab")})
    for tracking in (present, former):
        tracking.finish("FINISHED")
    now, earlier = Database(uri).runs()
    assert {name: now.tags[f"stage.{name}"] for name in keys} == keys
    assert now.tags == {**earlier.tags, "mlflow.runName": "present"}
    assert now.option("second_judge") == "option second_judge"
    assert now.params == earlier.params, "they are no settings"
    assert [set(found) for found in read_stage_keys(uri).values()] == [set(keys.values())] * 2
    stored = connect(uri).get_run(now.id).data
    own = {name for name in stored.tags if not name.startswith("mlflow.")}
    assert own == {"dnpo.kind", "dnpo.seed", "dnpo.method"}, "more would hide the note on the run's page"
    assert max(map(len, stored.params.values())) <= 6000
