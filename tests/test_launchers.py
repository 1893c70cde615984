"""Launchers that start processes, with real processes; SLURM's by its batch file alone."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import OmegaConf

from dnpo.optimise.training import CHECKPOINT
from dnpo.settings import conf_folder
from tests.commands import SMOKE, TINY, Process, run_afresh

LOCAL = ("hydra/launcher=local", "hydra.sweeper.max_batch_size=2")


def wait_until(what: Any, process: Process) -> Any:
    """Wait for a value that is not empty."""
    deadline = time.monotonic() + 240
    while not (found := what()):
        assert process.returncode is None, process.communicate(1)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def tasks(sweep: Path) -> list[int]:
    """The processes that compute jobs; submitit names folders by the waiting processes."""
    waiting = [int(path.name) for path in sweep.glob(".submitit/[0-9]*")]
    listed = subprocess.run(["ps", "-eo", "ppid,pid"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    children = {int(parent): int(pid) for parent, pid in rows}
    return [children[each] for each in waiting if each in children]


@pytest.mark.long
def test_four_jobs_on_two_workers_compute_nothing_twice_and_survive_a_preemption(tmp_path: Path) -> None:
    """The signal arrives during a fine-tuning that the other job waits for; both restart automatically."""
    slow = ("sft.steps=200", "sft.checkpoint_every=20", "sft.optimizer.lr=1e-5")  # many steps, with little effect
    short = ("method=npo", "npo.start=0", "iterations=1")
    process = Process(tmp_path, "-m", *SMOKE, *TINY, *slow, *short, "seed=0,1", "npo.alpha=0.1,1", *LOCAL)
    wait_until(lambda: list((tmp_path / "store").glob(f"sft/*.partial/{CHECKPOINT}")), process)
    (sweep,) = tmp_path.glob("multirun/*/*")
    finished = {path.name for path in (tmp_path / "store").glob("[a-z]*/*") if not path.name.endswith(".partial")}
    preempted = tasks(sweep)
    assert len(preempted) == 2
    for task in preempted:
        os.kill(task, signal.SIGUSR2)
    out, err = process.communicate(500)
    assert process.returncode == 0, out + err
    logs = "".join(path.read_text() for path in sweep.glob(".submitit/*/*_log.err"))
    assert logs.count("the training ends after a checkpoint") == 1
    assert "".join(path.read_text() for path in sweep.glob(".submitit/*/*_log.out")).count("Starting with") == 4 + 2
    summaries = [json.loads((sweep / f"{job}" / "summary.json").read_text()) for job in range(4)]
    computed = [stage["key"] for each in summaries for stage in each["stages"] if not stage["reused"]]
    assert len(computed) == len(set(computed)), "none twice"
    assert finished.isdisjoint(computed), "nor again after the signal"
    assert {stage["key"] for each in summaries for stage in each["stages"]} == finished | set(computed)
    assert re.search(r"npo.alpha=0.1 +2 ", out)
    assert "failed" not in err


@pytest.mark.long
def test_a_job_that_is_killed_does_not_hide_the_others(tmp_path: Path) -> None:
    short = ("method=spin", "iterations=1", "sft.steps=1,20000")
    process = Process(tmp_path, "-m", *SMOKE, *TINY, *short, *LOCAL, afresh=True)
    wait_until(lambda: list(tmp_path.glob("multirun/*/*/0/summary.json")), process)
    (sweep,) = tmp_path.glob("multirun/*/*")
    (other,) = wait_until(lambda: len(left := tasks(sweep)) == 1 and left, process)
    os.kill(other, signal.SIGKILL)
    out, err = process.communicate(300)
    assert process.returncode == 1
    assert "the launcher stopped" in err
    assert "the same command again" in err
    reported = json.loads((sweep / "sweep.json").read_text())
    assert {"sft.steps=1" in row["settings"].split() for row in reported} == {True}
    assert re.search(r"^numbers +\S+/sweep\.json$", out, re.MULTILINE)


@pytest.mark.long
def test_joblib_starts_a_new_python_for_each_job(tmp_path: Path) -> None:
    """It has imported nothing, unlike processes that other tests fork."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = run_afresh(tmp_path, "-m", *SMOKE, "method=spin", "plan=true", "seed=0,1", *launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("iteration 1 · optimise") == 2


def test_slurm_gets_the_settings_of_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Submitit writes the batch file from the composed settings; SLURM itself is not installed."""
    from submitit.slurm.slurm import _make_sbatch_string

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg = compose("train", ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"], return_hydra_config=True)
    raw = OmegaConf.to_container(cfg.hydra.launcher, resolve=False)
    assert isinstance(raw, dict)
    assert raw.pop("_target_").endswith(SlurmLauncher.__name__)
    assert hasattr(SlurmLauncher, "checkpoint"), "by which submitit queues a job again after its time is over"
    assert raw.pop("max_num_timeout") > 0
    assert raw["signal_delay_s"] <= 600, "submitit takes an earlier signal for a preemption and never counts it"
    raw.pop("submitit_folder")
    renamed = {"timeout_min": "time", "mem_gb": "mem", "name": "job_name", "tasks_per_node": "ntasks_per_node"}
    given = {renamed.get(str(name), str(name)): value for name, value in raw.items() if value is not None}
    text = _make_sbatch_string("python", tmp_path, map_count=10, **given)
    for line in (
        *("--requeue", "--signal=USR2@300", "--open-mode=append", "--partition=gpu", "--array=0-9%8", "--time=1440"),
        *("--gpus-per-node=1", "--ntasks-per-node=1"),
    ):
        assert f"#SBATCH {line}\n" in text
