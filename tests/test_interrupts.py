"""Signals that end a run: a training writes a checkpoint first, and every other stage ends as at Ctrl-C."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from transformers import LlamaForCausalLM

from dnpo import interrupts
from dnpo.interrupts import Ended, Held
from dnpo.optimise.training import CHECKPOINT
from dnpo.policy.complete import load_complete
from tests.commands import SMOKE, TINY, Process, numbers, succeed, summary
from tests.conftest import Report, World
from tests.delays import AT
from tests.test_optimise import MakePolicy, how, same, timeless, torch_optimizer, train, trainable, weights
from tests.test_train import first

STEPS = 6


def send(number: signal.Signals) -> None:
    """Send this process a signal, and wait until Python calls its handler."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


class Signalling(Report):
    """Sends this process a signal at the end of a step, just before its checkpoint would be due."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        super().__init__()
        self.number, self.step = number, step

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Receive the metrics; send the signal at the step."""
        super().steps(rows)
        if rows and rows[-1]["step"] == self.step:
            send(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
def test_a_signal_in_training_is_answered_by_a_checkpoint_that_continues_bit_for_bit(
    number: signal.Signals, step: int, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    def run(folder: Path, report: Report) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
        folder.mkdir(exist_ok=True)
        policy = make_policy()
        noise = trainable(policy, alpha=0.3, learning_rate=0.01)
        settings = how(epochs=1, checkpoint_every=100, optimizer=torch_optimizer("AdamW", lr=1e-3))
        history = train(policy, world.pairs(4 * STEPS), folder, noise, settings, report)
        return weights(policy, noise), timeless(history)

    undisturbed = run(tmp_path / "a", Report())
    with interrupts.raised():
        before = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt) as raised:
            run(tmp_path / "b", Signalling(number, step))
        expected = 128 + number
        assert interrupts.exit_status(raised.value) == expected
        if number == signal.SIGINT:
            assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "b" / CHECKPOINT, weights_only=True)["training"]["policy_step"] == step + 1
    report = Report()
    continued = run(tmp_path / "b", report)
    assert report.done == report.total == STEPS
    assert same(undisturbed[0], continued[0])
    assert undisturbed[1] == continued[1]


def test_a_handler_that_returns_lets_the_training_continue(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """As submitit's handler of SIGTERM does; the checkpoint exists before the process can be killed."""
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: called.append(number))
    try:
        history = train(
            make_policy(),
            world.pairs(16),
            tmp_path,
            optimisation=how(checkpoint_every=100),
            report=Signalling(signal.SIGTERM, 1),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [signal.SIGTERM]
    assert len(history) == 4
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["training"]["policy_step"] == 2


def test_a_second_ctrl_c_does_not_wait_for_the_step(capfd: pytest.CaptureFixture[str]) -> None:
    held = Held("a checkpoint is written first")
    held.hold()
    try:
        send(signal.SIGINT)
        assert "SIGINT: a checkpoint is written first; Ctrl-C again ends it at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    finally:
        held.release()


def test_a_second_signal_does_not_stop_what_the_first_one_started() -> None:
    with interrupts.raised():
        with pytest.raises(Ended, match="SIGTERM"):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_model_is_loaded_is_answered_afterwards(
    number: signal.Signals, make_policy: MakePolicy, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library loads in threads, whose locks must not be left by an exception."""
    make_policy().causal_lm.save_pretrained(tmp_path)
    world.tokenizer.save_pretrained(tmp_path)
    loaded = []

    class Interrupted:
        @staticmethod
        def from_pretrained(*arguments: Any, **options: Any) -> Any:
            send(number)
            loaded.append(LlamaForCausalLM.from_pretrained(*arguments, **options))
            return loaded[0]

    with interrupts.raised():
        with pytest.raises(KeyboardInterrupt) as raised:
            load_complete(Interrupted, str(tmp_path), "a model")
        assert interrupts.exit_status(raised.value) == 128 + number
    assert loaded
    assert f"{number.name}: a model is loaded first" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_during_a_finalizer_is_not_lost(number: signal.Signals) -> None:
    class Finalized:
        def __del__(self) -> None:
            send(number)
            pytest.fail("the handler raises before this line")

    def finalize_and_wait() -> None:
        Finalized()
        time.sleep(5)

    with interrupts.raised():
        with pytest.raises(KeyboardInterrupt) as raised:
            finalize_and_wait()
        assert interrupts.exit_status(raised.value) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_during_an_import_is_answered_after_it(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Libraries catch what is raised in their imports, or cannot be used afterwards."""
    outer, inner = f"outer_{number.name}", f"inner_{number.name}"
    (tmp_path / f"{outer}.py").write_text(f"try:\n    import {inner}\nexcept BaseException:\n    pass\nwhole = True\n")
    signalled = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.2)\nwhole = True\n"
    (tmp_path / f"{inner}.py").write_text(signalled)
    monkeypatch.syspath_prepend(tmp_path)

    def load_and_wait() -> None:
        import_module(outer)
        time.sleep(5)

    with interrupts.raised():
        with pytest.raises(KeyboardInterrupt) as raised:
            load_and_wait()
        assert interrupts.exit_status(raised.value) == 128 + number
    assert sys.modules[outer].whole
    assert sys.modules[inner].whole
    assert capfd.readouterr().err.count(f"{number.name}: the libraries are loaded first") == 1


def test_a_second_ctrl_c_does_not_wait_for_an_import(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(30)\n")
    code = "from dnpo import interrupts\nwith interrupts.raised():\n    import slow"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    while "Ctrl-C again ends it at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_that_compiled_code_turns_into_an_error_is_not_lost(number: signal.Signals) -> None:
    def turn() -> None:
        try:
            send(number)
        except KeyboardInterrupt:
            raise ValueError("of the library") from None

    with pytest.raises(KeyboardInterrupt) as raised, interrupts.raised():
        turn()
    assert interrupts.exit_status(raised.value) == 128 + number


def test_an_error_long_after_a_signal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a chat, in which Ctrl-C ends only an answer."""
    with interrupts.raised():
        with suppress(KeyboardInterrupt):
            send(signal.SIGINT)
        monkeypatch.setattr(interrupts, "JUST_AFTER", 0.0)
        with pytest.raises(ValueError, match="another"), interrupts.raised():
            raise ValueError("another")


def test_other_exceptions_of_finalizers_are_reported_as_usual(capsys: pytest.CaptureFixture[str]) -> None:
    class Faulty:
        def __del__(self) -> None:
            raise ValueError("of no consequence")

    before = sys.unraisablehook
    sys.unraisablehook = sys.__unraisablehook__
    try:
        with interrupts.raised():
            Faulty()
    finally:
        sys.unraisablehook = before
    assert "ValueError: of no consequence" in capsys.readouterr().err


def test_a_forked_process_is_ended_by_the_signal_itself() -> None:
    """It would print a traceback if its parent's exception were raised in it."""
    with interrupts.raised():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


# --- whole runs


def wait_for(path: Path, text: str, process: Process) -> None:
    """Wait until a file has this text."""
    deadline = time.monotonic() + 120
    while not path.is_file() or path.read_text() != text:
        assert time.monotonic() < deadline
        assert process.returncode is None, process.communicate(1)
        time.sleep(0.02)


@pytest.fixture
def begun(tmp_path: Path, tiny: Path) -> Path:
    """A folder with the first stages of the shared run."""
    for stage in ("prompts", "tokenizer", "sft"):
        if (tiny / "store" / stage).is_dir():
            shutil.copytree(tiny / "store" / stage, tmp_path / "store" / stage)
    shutil.copy(tiny / "store" / ".layout", tmp_path / "store")
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_a_training_loses_no_step_of_a_run(
    number: signal.Signals, tiny: Path, begun: Path, migrated: Path
) -> None:
    """The run continues at the step of the signal, with the numbers of an uninterrupted run."""
    shutil.copy(migrated, begun / "mlflow.db")
    given = ("scale=smoke", *TINY, "trainer.checkpoint_every=1000")
    process = Process(begun, *given, before="tests.delays.delay_steps")
    wait_for(begun / AT, "optimise step 1", process)
    process.signal_group(number)
    out, err = process.communicate(60)
    assert process.returncode == 128 + number
    assert f"Interrupted by {number.name}" in out
    assert "run the same command again" in out
    assert "Traceback" not in err
    (partial,) = (begun / "store" / "optimise").glob("*.partial")
    reached = torch.load(partial / CHECKPOINT, weights_only=True)["training"]["policy_step"]
    assert reached in (2, 3)
    client = MlflowClient(f"sqlite:///{begun / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dnpo").experiment_id])
    assert run.info.status == "KILLED"
    assert (
        "**Interrupted** at iteration 0 · optimise. Finished stages are kept: the same command"
        in run.data.tags["mlflow.note.content"]
    )
    (begun / AT).unlink()
    again = Process(begun, *given, before="tests.delays.delay_steps")
    wait_for(begun / AT, f"optimise step {reached}", again)
    again.communicate(120)
    assert again.returncode == 0
    assert numbers(summary(begun)) == numbers(first(tiny))


@pytest.mark.long
def test_a_signal_in_any_other_stage_ends_the_run_as_ctrl_c_does(tiny: Path, begun: Path) -> None:
    """It ends within seconds and keeps finished parts; the next run ends with the same numbers."""
    hit = []
    for stage in ("generate", "judge", "pairs", "reference", "evaluate"):
        process = Process(begun, *SMOKE, *TINY, before="tests.delays.delay")
        wait_for(begun / AT, stage, process)
        process.signal_group(signal.SIGTERM)
        asked = time.monotonic()
        out, err = process.communicate(60)
        assert time.monotonic() - asked < 10
        assert process.returncode == 143, out + err
        assert "Interrupted by SIGTERM" in out
        assert "Traceback" not in err
        hit.append((begun / AT).read_text())
    assert hit == ["generate", "judge", "pairs", "reference", "evaluate"]
    succeed(begun, *SMOKE, *TINY)
    assert numbers(summary(begun)) == numbers(first(tiny))


def test_a_signal_before_the_first_stage_ends_a_command(tmp_path: Path) -> None:
    """Nothing is set up yet: the signal itself or its default handler ends the process."""
    command = [sys.executable, "-m", "dnpo.train", *SMOKE]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (-signal.SIGTERM, 143)
