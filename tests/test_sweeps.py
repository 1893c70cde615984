"""Sweeps by name: each composes, each of its jobs passes every check, and together they give their table."""

import importlib
import importlib.util
import itertools
import json
import logging
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import configure_log
from omegaconf import DictConfig

from dnpo.commands.train import build, check_settings
from dnpo.dsl import HumanChosen
from dnpo.loop import chain
from dnpo.running import execute as running
from dnpo.settings import conf_folder
from dnpo.stages.plan import Iteration, Run
from dnpo.tracking.reading import Database
from tests.commands import TINY, Process, logging_restored, train

CONF = conf_folder()
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
GRIDS = [name for name in SWEEPS if name != "optuna"]
OPTUNA = importlib.util.find_spec("optuna") is not None
SPIN = ("HumanChosen", "NoNoise")


@cache
def composed(*overrides: str, **options: Any) -> DictConfig:
    """Compose settings, which several tests read and none changes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides), **options)


def jobs(name: str, *arguments: str) -> list[list[str]]:
    """The overrides of each job of ``python -m dnpo.train -m +sweep=NAME ARGUMENTS``."""
    params = composed(f"+sweep={name}", return_hydra_config=True).hydra.sweeper.params
    given = [*(f"{key}={value}" for key, value in params.items()), f"+sweep={name}", *arguments]
    parsed = OverridesParser.create().parse_overrides(given)
    found: list[list[str]] = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    return found


@cache
def built(*job: str) -> tuple[Run, list[Iteration], dict[str, Any]]:
    """The run of a job, its iterations (nothing is computed), and its settings."""
    run, _, settings = build(composed(*job, "tracking=off"))
    return run, list(chain(run)), settings


def laid_out(job: list[str]) -> list[Iteration]:
    return built(*job)[1]


def in_force(job: list[str]) -> list[tuple[str, str]]:
    """Labels and noise of each iteration of a job."""
    run, *_ = built(*job)
    return [(type(plan.dsl).__name__, type(plan.npo).__name__) for plan in run.plans]


def trainings(found: list[list[str]]) -> Counter[str]:
    """The number of different trainings of some jobs in each iteration."""
    keys = {
        stage.key: stage.title
        for job in found
        for iteration in laid_out(job)
        for stage in iteration.stages
        if iteration.k >= 0
    }
    return Counter(title for title in keys.values() if title.endswith(("optimise", "match")))


def test_the_required_sweeps_exist() -> None:
    assert SWEEPS == [
        "ablation",
        "alpha",
        "fixed_vs_trainable",
        "judge_accuracy",
        "judge_length",
        "main",
        "methods",
        "noise_grid",
        "noise_map",
        "optuna",
        "osp",
        "sapo",
        "saturation",
        "seeds",
        "small",
    ]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ablation", 3 * 4 * 5),
        ("alpha", 5),
        ("fixed_vs_trainable", 3 * 4 * 5),
        ("judge_accuracy", 4 * 7 * 3),
        ("judge_length", 5 * 3),
        ("main", 2 * 5),
        ("methods", 24 * 5),
        ("noise_grid", 3 * 3 * 3),
        ("noise_map", 3 * 2 * 3 * 4 * 3),
        ("osp", 2 * 2 * 5),
        ("sapo", 2 * 2 * 5),
        ("saturation", 3 * 4 * 5),
        ("seeds", 10),
        ("small", 2 * 3 * 3),
    ],
)
def test_a_sweep_has_as_many_jobs_as_it_says(name: str, count: int) -> None:
    found = jobs(name)
    assert len(found) == len({tuple(job) for job in found}) == count


@pytest.mark.parametrize("name", GRIDS)
def test_every_job_of_a_sweep_passes_every_check(name: str) -> None:
    for job in jobs(name, "seed=0"):
        top, *_ = check_settings(composed(*job, "tracking=off"))
        assert top["seed"] == 0


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_file_starts_with_its_question_and_command(name: str) -> None:
    head = (CONF / "sweep" / f"{name}.yaml").read_text().split("\ndefaults:")[0]
    assert head.startswith("# @package _global_\n# ")
    assert f"python -m dnpo.train -m +sweep={name}" in head
    assert "# Jobs: " in head


def test_settings_of_the_command_override_the_sweep() -> None:
    (job,) = jobs("main", "seed=7", "method=dsl", "iterations=2")
    top, *_ = check_settings(composed(*job))
    assert (top["seed"], top["iterations"]) == (7, 2)


def test_settings_are_chosen_on_validation_and_reported_on_test() -> None:
    splits = {name: composed(f"+sweep={name}").eval.split for name in GRIDS}
    assert {name for name, split in splits.items() if split == "validation"} == {"alpha", "noise_grid"}


# --- the tables


def test_the_ablation_branches_every_method_from_the_spin_chain_at_each_iteration() -> None:
    found = jobs("ablation", "seed=0")
    cells = [in_force(job) for job in found]
    assert all(iteration == SPIN for cell in cells for iteration in cell[:-1])
    methods = [(dsl, npo) for npo in ("NoNoise", "TrainableNoise") for dsl in ("HumanChosen", "HigherScoreChosen")]
    assert Counter((len(cell) - 1, cell[-1]) for cell in cells) == Counter(itertools.product((1, 2, 3), methods))
    # SPIN's chain once, and at each iteration a branch of every other method.
    assert trainings(found) == {f"iteration {k} · optimise": 1 if k == 0 else 4 for k in range(4)}


def test_fixed_against_trainable_noise_includes_the_matched_constant() -> None:
    found = jobs("fixed_vs_trainable", "seed=0")
    cells = [in_force(job) for job in found]
    assert all(iteration == SPIN for cell in cells for iteration in cell[:-1])
    kinds = [("HumanChosen", kind) for kind in ("NoNoise", "FixedNoise", "TrainableNoise", "MatchedOffset")]
    assert Counter((len(cell) - 1, cell[-1]) for cell in cells) == Counter(itertools.product((1, 2, 3), kinds))
    # The constant is matched to the trainable noise's existing training, which adds none.
    needed = trainings(found)
    assert sum(needed.values()) == 1 + 3 * 4
    assert trainings([*found, *jobs("ablation", "seed=0", "method=spin,npo")]).total() == needed.total()


@pytest.mark.parametrize("command", ["train", "evaluate", "leaderboard", "agreement"])
def test_hydra_does_not_announce_jobs_but_warns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command announces its jobs itself; jobs of submitit print to their own files, so its lines stay."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, return_hydra_config=True)
    launchers = ["hydra._internal.core_plugins.basic_launcher", "hydra_plugins.hydra_joblib_launcher._core"]
    with logging_restored():
        configure_log(cfg.hydra.hydra_logging)
        for name in (*launchers, "hydra_plugins.hydra_submitit_launcher.submitit_launcher"):
            logging.getLogger(name).info("Launching 4 jobs")
            logging.getLogger(name).warning("Something is wrong")
    out = capsys.readouterr().out
    assert (out.count("Launching"), out.count("wrong")) == (1, 3)


def test_the_launchers_that_are_silenced_log_under_these_names() -> None:
    """Else the settings would silence nothing, for instance after an update of Hydra."""
    settings = yaml.safe_load((CONF / "hydra" / "hydra_logging" / "quiet.yaml").read_text())
    for name in settings["loggers"]:
        if importlib.util.find_spec(name.partition(".")[0]):
            assert importlib.import_module(name).log.name == name


def test_the_main_sweep_shares_iteration_0() -> None:
    found = jobs("main", "seed=0", "scale=smoke", "iterations=4")
    assert [in_force(job)[0] for job in found] == [SPIN, SPIN]
    assert trainings(found) == {f"iteration {k} · optimise": 1 if k == 0 else 2 for k in range(4)}


def test_all_methods_share_fine_tuning_and_common_responses() -> None:
    found = jobs("methods", "seed=0")
    assert sorted(each for job in found for each in job if each.startswith("method=")) == sorted(
        f"method={path.stem}" for path in (CONF / "method").glob("*.yaml")
    )
    stages: dict[str, set[str]] = {}
    for iteration in (iteration for job in found for iteration in laid_out(job)):
        for stage in iteration.stages:
            stages.setdefault(stage.title, set()).add(stage.key)
    counts = {title: len(keys) for title, keys in stages.items()}
    assert (counts["prompts"], counts["supervised fine-tuning"], counts["evaluate"]) == (1, 1, 1)
    # At first one answer a prompt; one greedy one; four to a part of the prompts; eight; and eight at temperature 0.7.
    assert counts["iteration 0 · generate"] == 5
    # dsl, npo, dnpo, fixed_noise, scip … train as spin does before their parts begin.
    assert counts["iteration 0 · optimise"] == 19


def test_the_noise_grid_shares_everything_but_the_last_training() -> None:
    assert trainings(jobs("noise_grid", "seed=0")) == {"iteration 0 · optimise": 1, "iteration 1 · optimise": 27}


def test_saturation_has_its_regimes() -> None:
    found = jobs("saturation", "seed=0")
    seen: Counter[tuple[float, bool]] = Counter()
    for job in found:
        run, _, settings = built(*job)
        (plan,) = run.plans
        seen[settings["objective"]["beta"], isinstance(plan.dsl, HumanChosen)] += 1
        assert (settings["sft"]["steps"], settings["sft_rows"], settings["data"]["train"]) == (200, 800, 2400)
        trainer = settings["trainer"]
        assert (trainer["epochs"], trainer["batch_size"], trainer["optimizer"]["lr"]) == (6, 64, 1e-4)
        assert trainer["optimizer"]["_target_"] == "torch.optim.RMSprop"
        assert settings["eval"]["samples"] == 8
    assert seen == {(10.0, True): 4, (1.0, True): 4, (20.0, False): 4}
    generated = {
        iteration.responses.key for job in found for iteration in laid_out(job) if iteration.responses is not None
    }
    assert len(generated) == 1, "all regimes have the same fresh pairs"


def test_an_offset_is_matched_to_the_default_noise() -> None:
    noise = {key: value for key, value in composed("npo=trainable").npo.items() if key != "start"}
    assert composed("npo=matched").npo.like == noise


def test_the_search_has_bounds_that_pass_every_check() -> None:
    """Read without Optuna, which may be missing."""
    given = yaml.safe_load((CONF / "sweep" / "optuna.yaml").read_text())["hydra"]["sweeper"]
    assert given["sampler"]["seed"] is not None, "the seed is what makes a search resumable"
    assert (given["n_jobs"], given["direction"], given["max_failure_rate"]) == (1, "maximize", 1.0)
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in given["params"].items()])
    for bound in ("start", "end"):
        check_settings(composed(*(f"{one.key_or_group}={getattr(one.value(), bound)}" for one in parsed)))


# --- start=last and tags


@pytest.mark.parametrize("iterations", [1, 3])
def test_last_means_the_last_iteration(iterations: int) -> None:
    starts = check_settings(composed(f"iterations={iterations}", "npo.start=last", "dsl.start=last")).starts
    assert starts == {"npo": iterations - 1, "dsl": iterations - 1}
    number = laid_out([f"iterations={iterations}", f"npo.start={iterations - 1}", f"dsl.start={iterations - 1}"])
    word = laid_out([f"iterations={iterations}", "npo.start=last", "dsl.start=last"])
    assert [iteration.policy.key for iteration in number] == [iteration.policy.key for iteration in word]


def test_a_run_is_tagged_with_the_name_of_its_sweep() -> None:
    tags = running.tags({"sweep": "ablation", "method": "npo", "hydra/launcher": "basic"}, {"seed": 4})
    assert {name: tags[name] for name in ("dnpo.sweep_name", "dnpo.method", "dnpo.seed")} == {
        "dnpo.sweep_name": "ablation",
        "dnpo.method": "npo",
        "dnpo.seed": "4",
    }
    assert "dnpo.sweep" not in tags
    assert "dnpo.sweep_name" not in running.tags({"method": "npo"}, {"seed": 4})


# --- whole sweeps


def sweep(cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return train(cwd, "-m", "scale=smoke", *arguments, MLFLOW_TRACKING_URI="sqlite:///mlflow.db")


def summaries(cwd: Path) -> dict[str, Any]:
    """The summaries of the newest sweep's jobs, by number."""
    newest = max(cwd.glob("multirun/*/*"))
    return {path.parent.name: json.loads(path.read_text()) for path in newest.glob("*/summary.json")}


def computed(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The stages that the jobs report as computed."""
    return [(s["stage"], s["key"]) for job in found.values() for s in job["stages"] if not s["reused"]]


def tracked(cwd: Path) -> dict[str, dict[str, Any]]:
    """The data of each job in MLflow: status, tags and every point of every metric, except times.

    The steps of a training are tracked once, by the job that computed it, and read back for all.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    (parent,) = [run for run in found if run.data.tags["dnpo.kind"] == "sweep"]
    assert parent.data.tags["dnpo.sweep_name"] == "ablation"
    jobs = {run.id: run for run in Database(f"sqlite:///{cwd / 'mlflow.db'}").runs(sweeps=["ablation"])}
    names = {name for run in found for name in run.data.metrics if "second" not in name}
    return {
        run.info.run_name: {
            "status": run.info.status,
            "sweep": (run.data.tags["dnpo.sweep_name"], run.data.tags["mlflow.parentRunId"] == parent.info.run_id),
            "metrics": {name: points for name in sorted(names) if (points := jobs[run.info.run_id].history(name))},
        }
        for run in found
        if run is not parent
    }


ABLATION = ("+sweep=ablation", "seed=0", "iterations=2,0,3", "method=npo,dnpo", *TINY)
"""Jobs that share the chain of SPIN; all have noise, half of them a judge, and two cannot run."""


@pytest.fixture(scope="module")
def serial(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished ablation, one job after the other."""
    cwd = tmp_path_factory.mktemp("serial")
    shutil.copy(migrated, cwd / "mlflow.db")
    done = sweep(cwd, *ABLATION)
    assert done.returncode == 1, done.stdout + done.stderr
    return cwd


@pytest.fixture(scope="module")
def side_by_side(serial: Path, migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A folder with the same ablation by two parallel processes; exit status and errors.

    It uses the other fixture, so that the tests of both run on one worker.
    """
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    cwd = tmp_path_factory.mktemp("side") / "by-side"
    cwd.mkdir()
    shutil.copy(migrated, cwd / "mlflow.db")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    variables = {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
    process = Process(cwd, "-m", "scale=smoke", *ABLATION, *launcher, before="tests.forking.fork_joblib", **variables)
    _, err = process.communicate(600)
    assert process.returncode is not None
    return cwd, process.returncode, err


@pytest.mark.long
def test_a_parallel_sweep_equals_a_sequential_one(serial: Path, side_by_side: tuple[Path, int, str]) -> None:
    """Every number of every job is equal, no stage is computed twice, and nothing is missing in MLflow."""
    other_folder, status, err = side_by_side
    assert status == 1, err
    one, other = summaries(serial), summaries(other_folder)
    assert len(one) == len(other) == 4
    for number, job in one.items():
        rows = zip(job["table"], other[number]["table"], strict=True)
        for row, same in rows:
            assert {**row, "seconds": 0} == {**same, "seconds": 0}, number
    for found in (one, other):
        assert len(computed(found)) == len(set(computed(found)))
        assert set(computed(found)) == {(s["stage"], s["key"]) for job in found.values() for s in job["stages"]}
    assert sorted(computed(one)) == sorted(computed(other))
    runs = tracked(serial)
    assert len(runs) == 4
    assert runs == tracked(other_folder)
    for run in runs.values():
        assert (run["status"], run["sweep"]) == ("FINISHED", ("ablation", True))
        assert len(run["metrics"]["sft/loss/policy"]) == 20


@pytest.mark.long
def test_a_constant_is_matched_to_the_noise_of_the_same_iteration(serial: Path) -> None:
    """In the ablation's store: its trainable noise is found, and only the constant's training is new."""
    settings = ("seed=0", "iterations=2", "npo=trainable,matched", "tracking=off", *TINY)
    done = sweep(serial, "+sweep=fixed_vs_trainable", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    noisy, constant = (summaries(serial)[number] for number in ("0", "1"))
    assert computed({"0": noisy}) == []
    assert [stage for stage, _ in computed({"1": constant})] == ["optimise", "evaluate", "drift"]
    (match,) = [stage for stage in constant["stages"] if stage["title"].endswith("match")]
    assert match["key"] == next(s["key"] for s in reversed(noisy["stages"]) if s["stage"] == "optimise")
    steps = json.loads((serial / "store" / "optimise" / match["key"] / "steps.json").read_text())
    mean = np.average([step["npo/shift"] for step in steps], weights=[step["rows"] for step in steps])
    assert mean > 0
    assert constant["table"][-1]["npo/shift"] == pytest.approx(mean, rel=1e-5)
    assert constant["settings"]["npo"]["start"] == 1


@pytest.mark.long
def test_failing_parallel_jobs_do_not_stop_the_others_and_are_reported(side_by_side: tuple[Path, int, str]) -> None:
    folder, status, err = side_by_side
    assert status == 1
    for job in (2, 3):
        assert f"job {job} failed" in err
    assert "iterations=0: " in err
    assert "Traceback" not in err
    assert sorted(summaries(folder)) == ["0", "1", "4", "5"]


@pytest.mark.long
def test_only_rows_set_apart_are_fine_tuned_on(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    settings = ("method=spin", "iterations=1", "tracking=off", "seed=0", "sft.steps=20")
    done = sweep(tmp_path, "sft_rows=64", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (prompts,) = (tmp_path / "store" / "prompts").iterdir()
    apart, rest = (pq.read_table(prompts / f"{split}.parquet")["id"].to_pylist() for split in ("sft", "train"))
    assert (len(apart), len(rest)) == (64, 192 - 64)
    assert not set(apart) & set(rest)
    (pairs,) = (tmp_path / "store" / "pairs").iterdir()
    paired = pq.read_table(pairs / "pairs.parquet")["id"].to_pylist()
    identical = json.loads((pairs / "manifest.json").read_text())["facts"]["identical"]  # which make no pair
    assert paired == [row for row in rest if row in set(paired)]
    assert len(paired) + identical == len(rest)
    refused = sweep(tmp_path, "sft_rows=192", "tracking=off", "seed=0")
    assert "the run does not begin. sft_rows=192: " in refused.stderr


@pytest.mark.long
@pytest.mark.skipif(not OPTUNA, reason="hydra-optuna-sweeper is not installed")
def test_a_search_continues_where_it_ended(smoke: Path, tmp_path: Path) -> None:
    shutil.copytree(smoke / "store", tmp_path / "store")
    settings = ("+sweep=optuna", "iterations=1", "tracking=off")
    for trials in (2, 3):
        done = sweep(tmp_path, *settings, f"hydra.sweeper.n_trials={trials}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Best value" in done.stdout
    again = summaries(tmp_path)
    assert [computed({"": again[number]}) == [] for number in ("0", "1", "2")] == [True, True, False]
