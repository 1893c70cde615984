"""Stages on several processes: the same results, named errors, no process that outlives the run."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dnpo.errors import Declined, RankError, SettingsError, StepZeroError
from dnpo.running.launch import LONGEST, MARK, Here, Torchrun, _Listener
from dnpo.store import manifest
from dnpo.worker import Lines
from tests.commands import SMOKE, TINY, Process, succeed, summary, train
from tests.conftest import Report

TWO = ("launch=torchrun", "launch.devices=2")
SHARED = ("reference", "optimise", "evaluate")


def heard(*messages: tuple[int, str, list[Any]], printed: str = "", status: int = 0) -> tuple[Report, Any]:
    """The reports and the result for these messages from ranks."""
    report = Report()
    listener = _Listener(report)
    for rank, kind, values in messages:
        listener._hear(f"{MARK}{rank} . {json.dumps([kind, values])}\n")
    return report, listener.finish(status, printed)


def failure(rank: int, kind: str = "", text: str = "", **given: Any) -> Any:
    usual = {"elsewhere": False, "interrupted": False, "errno": None, "files": [], "trace": f"trace of {rank}"}
    return (rank, "error", [{"rank": rank, "kind": kind, "text": text, **usual, **given}])


def test_lines_of_several_ranks_are_joined_at_any_length(capfd: pytest.CaptureFixture[str]) -> None:
    long = [{"step": float(n), "loss": n / 7} for n in range(400)]
    Lines(0).begin(400, "steps")
    Lines(0).steps(long)
    Lines(1).advance(3)
    Lines(1).note("only rank 0 says such things")
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) < LONGEST + 20
    first, *others, last = lines
    report = Report()
    listener = _Listener(report)
    for line in (first, "a library's line", others[0], last, *others[1:]):
        listener._hear(f"{line}\n")
    assert (report.total, report.done, report.rows, report.notes) == (400, 3, long, [])


def test_work_done_before_the_total_is_known_counts() -> None:
    report, made = heard((1, "advance", [2]), (0, "begin", [5, "rows", 1]), (1, "advance", [2]), (0, "made", [{}, {}]))
    assert (report.total, report.done) == (5, 5)
    assert made == ({}, {})


def test_an_error_on_a_rank_is_raised_with_its_name_and_text() -> None:
    with pytest.raises(StepZeroError, match="step 0: other weights"):
        heard(failure(0, text="Connection closed by peer"), failure(1, "StepZeroError", "step 0: other weights"))
    with pytest.raises(Declined, match="no room"):
        heard(failure(1, "Declined", "no room"), status=1)
    with pytest.raises(OSError, match="No space left") as full:
        heard(failure(1, text="No space left on device", errno=28), status=1)
    assert full.value.errno == 28
    with pytest.raises(RuntimeError, match="trace of 1"):
        heard(failure(0, elsewhere=True), failure(1), failure(0, "RankError", interrupted=True), status=1)
    with pytest.raises(RankError, match="by SIGTERM"):
        heard(failure(0, "RankError", "rank 0 was ended by SIGTERM", interrupted=True), failure(1), status=1)


KILLED = """
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 4711)
--
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 4712)
"""


def test_a_killed_rank_is_named_and_not_the_ranks_that_wait_for_it() -> None:
    with pytest.raises(RankError, match=r"rank 1 was ended by SIGKILL"):
        heard(failure(0, text="Connection closed by peer"), printed=KILLED, status=1)
    with pytest.raises(RankError, match=r"status 2.*no such option"):
        heard(printed="no such option", status=2)


def test_several_machines_need_a_rendezvous_and_a_launcher_on_each() -> None:
    for given, lacking in (({}, "rendezvous"), ({"rendezvous": "a:1"}, "through"), ({"through": "srun"}, "rendezvous")):
        with pytest.raises(SettingsError, match=rf"^{lacking}: "):
            Torchrun(devices=8, nodes=2, **given)
    launch = Torchrun(devices=8, nodes=2, rendezvous="a:1", through="srun -N 2")
    command = launch.command("key", Path("job.json"))
    assert command[:3] == ["srun", "-N", "2"]
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=a:1"} < set(command)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ((*TWO, "trainer.batch_size=1"), r"launch\.devices=2: .*trainer\.batch_size=1"),
        (("launch=torchrun", "launch.devices=3", "launch.nodes=1", "sft.batch_size=2"), r"sft\.batch_size=2"),
        ((*TWO, "rollout=live"), r"launch\.devices=2: rollout=live"),
        ((*TWO, "device=cuda:1"), r"device=cuda:1|sees"),
        (("trainer.parallel=sharded",), r"trainer\.parallel=sharded.*launch=torchrun"),
        ((*TWO, "trainer.parallel=sharded", "trainer.compile=true"), r"trainer\.parallel=sharded.*trainer\.compile"),
        ((*TWO, "trainer.parallel=sharded", "objective=refined"), r"trainer\.parallel=sharded: objective=Refined"),
        (
            (*TWO, "generate=server", "generate.engine.base_url=http://localhost:1/v1"),
            r"launch\.devices=2: generate\.engine",
        ),
        (("launch=torchrun",), r"launch\.devices: needs a value"),
    ],
)
def test_wrong_settings_are_refused_by_name(overrides: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = train(tmp_path, *SMOKE, *overrides)
    assert done.returncode == 1
    assert re.search(named, done.stderr), done.stderr
    assert not (tmp_path / "store").exists()


def test_launching_here_is_the_default_and_changes_nothing() -> None:
    assert dataclasses.fields(Here) == ()


def remove_last(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Remove these stages of the last iteration; return what the summary has of them."""
    stages = summary(folder)["stages"]
    last = max(stage["iteration"] for stage in stages if stage["iteration"] != "SFT")
    removed = [stage for stage in stages if stage["iteration"] == last and stage["stage"] in names]
    for stage in removed:
        shutil.rmtree(folder / "store" / stage["stage"] / stage["key"])
    return removed


@pytest.mark.long
def test_torchrun_starts_a_python_for_each_rank(tiny: Path, tmp_path: Path) -> None:
    """The started processes have imported nothing, unlike the processes that other tests fork."""
    shutil.copytree(tiny, tmp_path / "one", symlinks=True)
    (stage,) = remove_last(tmp_path / "one", "reference")
    succeed(tmp_path / "one", *SMOKE, *TINY, "launch=torchrun", "launch.devices=1")
    assert (tmp_path / "one" / "store" / "reference" / stage["key"] / "manifest.json").is_file()


@pytest.mark.long
def test_a_run_on_two_ranks_equals_one_process_up_to_rounding(tiny: Path, tmp_path: Path) -> None:
    """Real processes compute the last iteration again: generation, reference, hidden states, training."""
    shutil.copytree(tiny, tmp_path / "two", symlinks=True)
    before = summary(tiny)
    redone = remove_last(tmp_path / "two", *SHARED)
    process = Process(tmp_path / "two", *SMOKE, *TINY, *TWO)
    printed = process.communicate(300)
    assert process.returncode == 0, printed
    after = summary(tmp_path / "two")
    assert [stage["key"] for stage in after["stages"]] == [stage["key"] for stage in before["stages"]]
    for name, value in before["table"][-1].items():
        if isinstance(value, float) and name != "seconds":
            assert after["table"][-1][name] == pytest.approx(value, abs=1e-4, rel=1e-4), name
    for stage in redone:
        folder = tmp_path / "two" / "store" / stage["stage"] / stage["key"]
        assert manifest(folder)["made_by"]["ranks"] == "2"
    assert not list((tmp_path / "two" / "store" / ".launch").iterdir())


def find_started(process: Process) -> list[int]:
    """The ids of the processes that share a stage's work: torchrun, and the ranks in their order."""
    found = [process.pid]
    for number in found:  # grows
        for each in Path(f"/proc/{number}/task").glob("*/children"):
            with suppress(OSError):
                found += sorted(map(int, each.read_text().split()))
    return found[1:]


def are_gone(numbers: list[int]) -> bool:
    """Whether these processes have ended; one that nobody has waited for yet has ended too."""
    states = []
    for number in numbers:
        with suppress(OSError):
            states.append(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0])
    return set(states) <= {"Z"}


def wait_until(happens: Callable[[], object], seconds: float = 300) -> None:
    """Wait until something has happened."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
def test_no_rank_outlives_the_others_or_the_run(tiny: Path, tmp_path: Path) -> None:
    """A killed rank ends the run and is named; a run that is killed or interrupted ends its ranks."""
    shutil.copytree(tiny, tmp_path / "two", symlinks=True)
    folder = tmp_path / "two"
    endless = (*SMOKE, *TINY, *TWO, "trainer.steps=20000", "trainer.checkpoint_every=2", "tracking=off")

    def start() -> tuple[Process, Path, list[int]]:
        process = Process(folder, *endless)
        wait_until(lambda: list(folder.glob("store/optimise/*.partial/checkpoint.ckpt")))
        (checkpoint,) = folder.glob("store/optimise/*.partial/checkpoint.ckpt")
        checkpoint.unlink()
        wait_until(checkpoint.is_file)  # by these ranks
        return process, checkpoint, find_started(process)

    process, _, started = start()
    assert len(started) == 3
    os.kill(started[2], signal.SIGKILL)
    _, errors = process.communicate(60)
    assert process.returncode == 1
    assert "rank 1 was ended by SIGKILL" in errors
    assert are_gone(started)

    process, checkpoint, started = start()
    before = checkpoint.stat().st_mtime_ns
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(60)
    assert process.returncode == 128 + signal.SIGTERM
    assert checkpoint.stat().st_mtime_ns > before, "they end after a checkpoint"
    assert are_gone(started)

    process, _, started = start()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(60)
    wait_until(lambda: are_gone(started), 10)
