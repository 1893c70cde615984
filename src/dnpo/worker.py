"""Do a stage's work as one of several processes, which ``launch=torchrun`` starts.

    python -m dnpo.worker JOB.json

It builds the run from the same settings as the process that started it, finds the stage by its key and does its work.
Progress, result and errors are written to standard output as lines; see ``running/launch.py``.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dnpo import interrupts, ranks
from dnpo.errors import Declined, DnpoError, RankError
from dnpo.running.launch import LONGEST, MARK, Job, Kind


def main() -> None:
    """Run ``python -m dnpo.worker``."""
    threading.Thread(target=_end_with_starter, daemon=True).start()
    lines = Lines(int(os.environ["RANK"]))
    status = 0
    try:
        with interrupts.raised():
            _work(json.loads(Path(sys.argv[1]).read_text()), lines)
    except BaseException as error:
        status = 1
        lines.report_error(error)
    sys.stderr.flush()
    os._exit(status)  # without waiting for ranks that will not answer


def _work(job: Job, lines: "Lines") -> None:
    from omegaconf import OmegaConf

    from dnpo import garbage
    from dnpo.commands.common import prepare_torch
    from dnpo.commands.train import build
    from dnpo.loop import chain
    from dnpo.store import Stage, compute_here

    garbage.collect_less_often()
    prepare_torch(job["settings"]["threads"])
    ranks.join(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    run, _, _ = build(OmegaConf.create(job["settings"]), job["name"])
    run = replace(run, device=_own_device(run.device))

    def with_needed(stages: Iterable[Stage]) -> Iterator[Stage]:
        for stage in stages:
            yield stage
            yield from with_needed([*stage.inputs.values(), *stage.caches.values()])

    stages = (stage for iteration in chain(run) for stage in iteration.stages)
    stage = next(each for each in with_needed(stages) if each.key == job["stage"])
    inputs = {name: Path(path) for name, path in job["inputs"].items()}
    with run.ledger:
        made = compute_here(stage, Path(job["folder"]), inputs, lines)
    if ranks.leads():
        lines.send("made", *made)


def _own_device(setting: str) -> str:
    """The device of this rank."""
    import torch

    from dnpo.policy.model import device_of

    if device_of(setting) != "cuda":
        return setting
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def _end_with_starter() -> None:
    """End this process as soon as its starter closes the pipe or ends."""
    while os.read(0, 1):
        pass
    os._exit(1)


class Lines:
    """Writes what a stage reports as lines; implements :class:`dnpo.store.Report`.

    Rank 0 reports everything, the other ranks only the amount of work they did.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def send(self, kind: Kind, *values: Any) -> None:
        """Write a message, in several lines if it is long."""
        text = json.dumps([kind, values])  # has no line breaks
        for first in range(0, len(text), LONGEST):
            more = "." if first + LONGEST >= len(text) else "+"
            os.write(1, f"{MARK}{self.rank} {more} {text[first : first + LONGEST]}\n".encode())

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Report the amount of work."""
        self._lead("begin", total, unit, done)

    def advance(self, amount: int = 1) -> None:
        """Report that this further amount of work is done."""
        self.send("advance", amount)

    def note(self, text: str) -> None:
        """Report a line of text."""
        self._lead("note", text)

    def status(self, text: str) -> None:
        """Show a few words next to the progress bar."""
        self._lead("status", text)

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Hand over metrics of training steps."""
        self._lead("steps", rows)

    def report_error(self, error: BaseException) -> None:
        """Report the error that ended the work."""
        interrupted = isinstance(error, KeyboardInterrupt)
        if isinstance(error, KeyboardInterrupt):
            error = RankError(f"launch=torchrun: rank {self.rank} was ended by {interrupts.name(error) or 'SIGINT'}")
        number = error.errno if isinstance(error, OSError) else None
        files = [str(name) for name in (getattr(error, "filename", None),) if name is not None]
        named = isinstance(error, DnpoError | Declined)
        self.send(
            "error",
            {
                "rank": self.rank,
                "interrupted": interrupted,
                "elsewhere": isinstance(error, ranks.FailedElsewhere)
                or isinstance(error.__cause__, ranks.FailedElsewhere),
                "kind": type(error).__name__ if named else "",
                "text": str(error) if number is None else os.strerror(number),
                "errno": number,
                "files": files,
                "trace": "".join(traceback.format_exception(error)),
            },
        )

    def _lead(self, kind: Kind, *values: Any) -> None:
        if self.rank == 0:
            self.send(kind, *values)


if __name__ == "__main__":
    main()
