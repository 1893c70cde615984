"""Commands whose output is closed before their end, such as ``dnpo train | head -3``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.commands import SMOKE, TINY, numbers, summary
from tests.test_train import first


def run_unread(cwd: Path, *arguments: str, lines: int = 0, both: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run a command whose reader ends after some lines.

    Args:
        both: whether the errors go to the same reader.
    """
    reader, writer = os.pipe()
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, cwd=cwd, stdout=writer, stderr=writer if both else subprocess.PIPE, text=True
    ) as process:
        os.close(writer)
        with open(reader) as printed:
            for _ in range(lines):
                assert printed.readline(), command
        _, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(command, process.returncode, "", err or "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("train", "--help"),
        ("store", "--help"),
        ("methods",),
        ("store", "list"),
        ("completion", "bash"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_command_that_only_prints_ends_quietly(arguments: tuple[str, ...], unbuffered: bool, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    done = run_unread(tmp_path, *["-u"] * unbuffered, "-m", "dnpo", *arguments)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_refusal_keeps_its_status(tmp_path: Path) -> None:
    assert run_unread(tmp_path, "-m", "dnpo", "train", "sede=1", both=True).returncode == 1
    assert run_unread(tmp_path, "-m", "dnpo", "trian", both=True).returncode == 2


@pytest.mark.long
@pytest.mark.parametrize("both", [False, True], ids=["output", "output and errors"])
def test_a_run_that_nobody_reads_ends_as_usual(both: bool, tiny: Path, tmp_path: Path, migrated: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(migrated.read_bytes())
    done = run_unread(tmp_path, "-m", "dnpo.train", "scale=smoke", *TINY, lines=3, both=both)
    assert (done.returncode, done.stderr) == (0, "")
    assert numbers(summary(tmp_path)) == numbers(first(tiny))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    assert run.info.status == "FINISHED"
    assert "**From SFT to iteration 1**" in run.data.tags["mlflow.note.content"]


@pytest.mark.long
def test_jobs_in_other_processes_end_as_usual(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    given = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2", "iterations=1")
    done = run_unread(tmp_path, "-m", "dnpo.train", "-m", *SMOKE, *TINY, *given, lines=1, both=True)
    assert done.returncode == 0
    assert len(list(tmp_path.glob("multirun/*/*/*/summary.json"))) == 2
