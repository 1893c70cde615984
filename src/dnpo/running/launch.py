"""Do the work of stages in this process, or in several that torchrun starts, as ``launch=…`` says.

This process keeps the stage's lock, starts ``dnpo.worker`` for each rank, and shows the progress that the ranks report
line by line. The ranks end when their standard input is closed, so they also end when this process is killed. An error
on a rank is raised again in this process.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypedDict

from dnpo import errors
from dnpo.errors import Declined, DnpoError, SettingsError
from dnpo.optimise.parts import watches
from dnpo.settings import Count, neutral
from dnpo.store import Compute, Made, Report, Stage, compute_here, write_json

if TYPE_CHECKING:
    from dnpo.stages.plan import Run

FOLDER = ".launch"  # folder in the store for the jobs of ranks
MARK = "dnpo:"  # begins every line from a rank; other lines come from libraries
LONGEST = 3000  # characters of a line: short enough that a pipe takes it whole, so lines of several ranks do not mix
GRACE = 20.0  # seconds that processes have to end
SHOWN = 2000  # number of last characters shown of the output of a failed process

Kind = Literal["begin", "advance", "note", "status", "steps", "made", "error"]


class Job(TypedDict):
    """The work of ranks.

    Attributes:
        settings: the composed settings of the run.
        name: the name under which the ledger records calls.
        stage: the key of the stage.
        folder: folder for its results.
        inputs: folders of its inputs, by name.
    """

    settings: dict[str, Any]
    name: str
    stage: str
    folder: str
    inputs: dict[str, str]


class Launch(Protocol):
    """The place where the work of stages is done.

    Attributes:
        world: number of processes that share the work of a stage.
    """

    @property
    def world(self) -> int: ...

    def check(self, run: "Run") -> None:
        """Refuse a run that cannot be computed in this way.

        Raises:
            SettingsError: names the settings.
        """

    def open(self, settings: Mapping[str, Any], name: str) -> Compute:
        """Return the function that does the work of a run's stages.

        Args:
            settings: the run's composed settings.
            name: the name under which the ledger records calls.
        """


@dataclass(frozen=True)
class Here:
    """Every stage is computed in this process."""

    world: ClassVar[int] = 1

    def check(self, run: "Run") -> None:
        """Refuse trainings that need several processes."""
        for name, training in run.trainings():
            if training.parallel == "sharded":
                raise SettingsError(
                    f"{name}.parallel=sharded: shares the weights among several processes; give launch=torchrun "
                    f"launch.devices=…, or {name}.parallel=replicated"
                )

    def open(self, settings: Mapping[str, Any], name: str) -> Compute:
        """Return the function that does the work in this process."""
        return compute_here


@dataclass(frozen=True)
class Torchrun:
    """Stages whose work can be shared are computed by several processes (ranks), one for each device.

    Args:
        devices: number of processes on each machine.
        nodes: number of machines, which all see the store under the same path.
        rendezvous: host:port of one of the machines, where the processes find each other.
        through: command that starts torchrun once on every machine.
    """

    devices: Count = neutral()
    nodes: Count = neutral(1)
    rendezvous: str | None = neutral(None)
    through: str | None = neutral(None)

    def __post_init__(self) -> None:
        if self.nodes > 1 and not (self.rendezvous and self.through):
            missing = "through" if self.rendezvous else "rendezvous"
            what = "the command that starts torchrun on each" if self.rendezvous else "host:port of one of them"
            raise SettingsError(f"{missing}: needs a value with launch.nodes={self.nodes}: {what}")

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.devices * self.nodes

    def check(self, run: "Run") -> None:
        """Refuse work that only one process can do, and training steps with fewer rows than ranks."""
        if run.device not in ("auto", "cpu", "cuda"):
            raise SettingsError(
                f"device={run.device}: is one device, but launch=torchrun gives every process its own; take device=cuda"
            )
        for name, training in run.trainings():
            if training.batch_size < self.world:
                raise SettingsError(
                    f"launch.devices={self.devices}: with launch.nodes={self.nodes} there are {self.world} ranks, but "
                    f"a step of {name}.batch_size={training.batch_size} rows leaves some without any; expected at most "
                    f"{training.batch_size} ranks"
                )
            if training.parallel != "sharded":
                continue
            if training.compile:
                raise SettingsError(f"{name}.parallel=sharded: does not go together with {name}.compile=true")
            if run.model.quantization is not None:
                raise SettingsError(
                    f"{name}.parallel=sharded: does not go together with model.quantization={run.model.quantization}"
                )
        for plan in run.plans:
            if plan.trainer.parallel == "sharded" and (plan.reads_average or watches(plan.objective, 1)):
                what = "ema=on" if plan.reads_average else f"objective={type(plan.objective).__name__}"
                raise SettingsError(
                    f"trainer.parallel=sharded: {what} reads all weights or states of all pairs, but each process has "
                    f"only a part; take trainer.parallel=replicated (in iteration {plan.k})"
                )
            if plan.rollout.live and self.world > 1:
                raise SettingsError(
                    f"launch.devices={self.devices}: rollout=live generates in training, which only one process can "
                    f"do; take launch=here, or rollout=ahead (in iteration {plan.k})"
                )
        samplings = [("generate", run.generate), *(("rollout", plan.rollout) for plan in run.plans)]
        for name, sampling in samplings:
            if self.world > 1 and getattr(sampling, "engine", None) is not None:
                raise SettingsError(
                    f"launch.devices={self.devices}: {name}.engine asks a server, which only one process can do; take "
                    f"launch=here, or {name}.engine=null"
                )
        self._check_gpus(run)

    def _check_gpus(self, run: "Run") -> None:
        """Refuse more processes than GPUs of this machine, if they compute on GPUs."""
        if run.device == "cpu" or self.nodes > 1:
            return
        import torch

        there = torch.cuda.device_count()
        if there and self.devices > there:
            raise SettingsError(
                f"launch.devices={self.devices}: torch sees {there} GPUs, but each process needs its own"
            )

    def open(self, settings: Mapping[str, Any], name: str) -> Compute:
        """Return the function that lets ranks do the work if it can be shared."""

        def compute(stage: Stage, folder: Path, inputs: Mapping[str, Path], report: Report) -> Made:
            if not stage.shared:
                return compute_here(stage, folder, inputs, report)
            job: Job = {
                "settings": dict(settings),
                "name": name,
                "stage": stage.key,
                "folder": str(folder),
                "inputs": {each: str(path) for each, path in inputs.items()},
            }
            file = folder.parent.parent / FOLDER / f"{stage.name}-{stage.key}.json"
            file.parent.mkdir(exist_ok=True)
            write_json(file, job)
            try:
                return _run(self.command(stage.key, file), int(settings["threads"]), report)
            finally:
                file.unlink(missing_ok=True)

        return compute

    def command(self, key: str, file: Path) -> list[str]:
        """The command that starts the ranks for a stage."""
        meeting = ["--standalone", "--local-addr=localhost"]
        if self.nodes > 1:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.rendezvous}", f"--rdzv-id={key}"]
        return [
            *shlex.split(self.through or ""),
            *(sys.executable, "-m", "torch.distributed.run"),
            *(f"--nnodes={self.nodes}", f"--nproc-per-node={self.devices}", *meeting),
            *("-m", "dnpo.worker", str(file)),
        ]


def _run(command: list[str], threads: int, report: Report) -> Made:
    """Run the ranks until they end, pass on their reports, and raise the error that one of them raised."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    listener = _Listener(report)
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # ranks end when it is closed
            stdout=subprocess.PIPE,
            stderr=printed,
            env=environment,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        try:
            listener.hear_all(process)
        except KeyboardInterrupt:
            process.terminate()  # torchrun ends the ranks in the same way
            report.note(
                "the processes are ending; a training writes a checkpoint first. Ctrl-C again ends them at once"
            )
            listener.hear_all(process)
            raise
        finally:
            _end(process)
        printed.seek(0)
        return listener.finish(process.returncode, printed.read())


def _end(process: "subprocess.Popen[str]") -> None:
    """End the ranks that have not ended."""
    assert process.stdin is not None, "a pipe"
    with suppress(OSError):
        process.stdin.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.send_signal(number)  # does nothing once it has ended
    process.wait()


class _Listener:
    """Parses the lines of all ranks.

    Args:
        report: receives the progress.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.parts: dict[int, str] = {}  # the beginning of each rank's present message
        self.begun, self.early = False, 0  # whether the total is known, and the amount done before it was known
        self.made: Made | None = None
        self.failures: list[Mapping[str, Any]] = []
        self.other = ""  # all other output

    def hear_all(self, process: "subprocess.Popen[str]") -> None:
        """Read the ranks' lines until they have ended."""
        assert process.stdout is not None, "a pipe"
        for line in process.stdout:
            self._hear(line)
        process.wait()

    def _hear(self, line: str) -> None:
        mark, found, rest = line.rstrip("\n").partition(MARK)
        if not found or mark:
            self.other = (self.other + line)[-SHOWN:]
            return
        rank, more, text = rest.split(" ", 2)
        self.parts[int(rank)] = self.parts.get(int(rank), "") + text
        if more == ".":
            kind, values = json.loads(self.parts.pop(int(rank)))
            self._pass_on(kind, values)

    def _pass_on(self, kind: Kind, values: list[Any]) -> None:
        if kind == "made":
            self.made = Made(*values)
        elif kind == "error":
            if not (self.failures and values[0]["interrupted"]):  # when one rank fails, the others are ended
                self.failures += values
        elif kind == "advance" and not self.begun:
            self.early += values[0]
        else:
            getattr(self.report, kind)(*values)
        if kind == "begin" and not self.begun:
            self.begun = True
            if self.early:
                self.report.advance(self.early)

    def finish(self, status: int, printed: str) -> Made:
        """Return what was made, or raise the ranks' error."""
        named = [failure for failure in self.failures if failure["kind"] in NAMED]
        if named:
            raise NAMED[named[0]["kind"]](named[0]["text"])
        for failure in self.failures:
            if failure["errno"]:
                raise OSError(failure["errno"], failure["text"], *failure["files"])
        killed = re.findall(r"rank +: (\d+).*\n +exitcode +: -(\d+)", printed)  # as torchrun reports it
        if killed:  # torchrun ends the others by SIGTERM
            rank, number = min(killed, key=lambda found: int(found[1]) == signal.SIGTERM)
            lack = ", perhaps for lack of memory" if int(number) == signal.SIGKILL else ""
            raise errors.RankError(
                f"launch=torchrun: rank {rank} was ended by {signal.Signals(int(number)).name}{lack}. Finished stages "
                "are kept, and the same command continues this one"
            )
        for failure in sorted(self.failures, key=lambda failure: bool(failure["elsewhere"])):
            raise RuntimeError(f"rank {failure['rank']} failed:\n{failure['trace']}")
        if status or self.made is None:
            last = (self.other + printed)[-SHOWN:].strip()
            raise errors.RankError(f"launch=torchrun: the processes ended with status {status}: {last}")
        return self.made


NAMED: dict[str, Callable[[str], Exception]] = {
    "Declined": Declined,
    **{name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, DnpoError)},
}
"""The errors of dnpo by name: they mean the same in every process."""
