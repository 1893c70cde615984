"""Rows that are made during training: before a policy step, the policy responds to the next prompts.

``LiveSteps`` replaces ``Batches``. A source makes the rows of one rollout after another. They enter a buffer, first in,
first out; every policy step draws its rows from the buffer. Rows are on the disk before a checkpoint refers to them, so
a checkpoint has only counts, and a killed training finds its rows again.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dnpo.errors import DataError, StoreError
from dnpo.optimise.steps import Idle, Slice, Some, Steps
from dnpo.seeding import derive
from dnpo.store import Report
from dnpo.wording import percent

Row = TypeVar("Row")
Made = TypeVar("Made", covariant=True)


def require(paths: Sequence[Path]) -> None:
    """Check that the files of rollouts that a checkpoint refers to exist.

    Raises:
        StoreError: a file is missing.
    """
    for path in (path for path in paths if not path.is_file()):
        raise StoreError(
            f"{path}: is missing, and the policy that made it has been trained further since then; remove the "
            "training's checkpoint.ckpt too, and the training begins again"
        )


class Source(Protocol[Made]):
    """Makes the rows of rollouts, which are numbered from 0.

    Attributes:
        per_pass: number of rollouts in one pass over the prompts.
    """

    @property
    def per_pass(self) -> int: ...

    def ask(self, rollout: int) -> None:
        """Let the policy respond, as it is now. Judging may continue in the background."""

    def take(self, rollout: int, first: int, step: int) -> Sequence[Made]:
        """The rows of a rollout; if they are taken again, they are the same.

        Args:
            first: the number of its first row among all rows.
            step: the policy step before which the policy responded.
        """

    def check(self, rollouts: int) -> None:
        """Check that the first ``rollouts`` rollouts, which a checkpoint counts as taken, are on the disk.

        Raises:
            StoreError: one is missing; it cannot be made again, since the policy has changed.
        """

    def measure(self, rollout: int) -> Mapping[str, float]:
        """Metrics of a rollout that has been taken."""

    def describe(self, rollout: int) -> str:
        """A few words on the work so far, for the progress."""

    def explain(self) -> str:
        """Why the rollouts taken so far have no rows, for a message."""


@dataclass(frozen=True)
class Clock:
    """The times at which rows are made, and how long rows are kept.

    Attributes:
        every: policy steps from one rollout to the next; 0: a single rollout, which is trained on in epochs.
        capacity: number of rows in the buffer; 0: only the rows of the last rollout.
        ahead_by: number of rollouts that are made in advance, so that training does not wait for the judge.
    """

    every: int = 1
    capacity: int = 0
    ahead_by: int = 0


class _UsedUp(Exception):
    """All rollouts have been made, and no rows are left."""


class LiveSteps(Steps[Row, Some]):
    """The policy steps of a training whose rows are made during it.

    If a rollout has no rows, the next one is made at once. The number of rollouts is fixed: as many as are due if all
    have rows. If the last rollouts have no rows and the buffer is empty, the training ends early.

    Args:
        source: makes the rows.
        clock: decides when rows are made.
        batch_size: number of rows of a policy step, or all if the buffer has fewer.
        epochs: passes over the prompts.
        steps: number of policy steps, over as many passes as needed; 0: by epochs.
        order: returns the rows of every policy step, given the number of rows; used if there is a single rollout.
        seed: seed of the draws from the buffer.
        report: receives the state of the rollouts.
        micro_batch_size, collate: as in :class:`~dnpo.optimise.steps.Steps`.
    """

    def __init__(
        self,
        source: Source[Row],
        clock: Clock,
        *,
        batch_size: int,
        epochs: int,
        steps: int,
        order: Callable[[int], Sequence[tuple[int, ...]]],
        seed: int,
        report: Report,
        micro_batch_size: int,
        collate: Callable[[Slice[Row]], Some],
    ) -> None:
        super().__init__(micro_batch_size, collate)
        self.source, self.clock, self.batch_size, self.seed, self.report = source, clock, batch_size, seed, report
        self.buffer: dict[int, Row] = {}
        self.draws: list[int] = []  # how often each row has been drawn, also if it has left the buffer
        self.rollouts: list[tuple[int, int]] = []  # for each, its first row's number, and the step in ``asked``
        self.asked: list[int] = []  # for each rollout, the policy step before which the policy responded
        self.measured: dict[str, float] = {}
        self.drawn, self.numbers = -1, tuple[int, ...]()  # the present step, and the numbers of its rows
        if clock.every:
            self.order: Sequence[tuple[int, ...]] = ()
            self.total = steps or epochs * source.per_pass * clock.every
            self.most = -(-self.total // clock.every)
        else:
            self.most = 1
            self._roll(0)
            self.order = order(len(self.buffer))
            self.total = len(self.order)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[Some | Idle[Some]]]:
        try:
            yield from super().__iter__()
        except _UsedUp:
            ends = [*(first for first, _ in self.rollouts[1:]), len(self.draws)]
            empty = sum(first == end for (first, _), end in zip(self.rollouts, ends, strict=True))
            self.report.note(
                f"{empty:,} of {self.most:,} rollouts had nothing to train on, so training ends after {self.next:,} of "
                f"{self.total:,} policy steps; with more samples (rollout.samples) fewer have nothing"
            )
        unused = self.draws.count(0)
        if unused:
            self.report.note(
                f"{unused:,} of {len(self.draws):,} rows that were made were never trained on: a policy step takes at "
                f"most {self.batch_size:,} (trainer.batch_size); rollout.prompts, rollout.samples and rollout.every "
                "decide how many rows there are for it"
            )

    def group(self, step: int) -> list[Row]:
        """All rows of a policy step; if a rollout is due, it is made first."""
        if step != self.drawn:
            if self.clock.every and step % self.clock.every == 0:
                self._roll(step)
            self.numbers = self.order[step] if self.order else self._draw(step)
            for number in self.numbers:
                self.draws[number] += 1
            self.drawn = step
            self._tell()
        return [self.buffer[number] for number in self.numbers]

    @property
    def notes(self) -> dict[str, float]:
        """Metrics of the present policy step."""
        first = self.rollouts[-1][0]
        stale = sum(number < first for number in self.numbers)
        return {
            **self.measured,
            "rollout/buffer": float(len(self.buffer)),
            "rollout/stale": stale / max(len(self.numbers), 1),
            "rollout/count": float(len(self.rollouts)),
        }

    def _roll(self, step: int) -> None:
        """Take the next rollout that has rows, and drop the oldest rows.

        Raises:
            DataError: a pass over the prompts, or the whole training, has no rows.
        """
        empty = 0
        while len(self.rollouts) < self.most:
            rollout, first = len(self.rollouts), len(self.draws)
            due = (self.total - 1 - step) // self.clock.every if self.clock.every else 0  # rollouts after this one
            while len(self.asked) <= min(rollout + min(self.clock.ahead_by, due), self.most - 1):
                self.source.ask(len(self.asked))
                self.asked.append(step)
            rows = self.source.take(rollout, first, self.asked[rollout])
            self.rollouts.append((first, self.asked[rollout]))
            if rows:
                break
            empty += 1
            if empty >= self.source.per_pass or (len(self.rollouts) == self.most and not self.draws):
                raise DataError(f"step {step}: no pair is left to train on: {self.source.explain()}")
        else:
            if not self.clock.capacity:
                raise _UsedUp
            return  # the buffer has older rows
        self.draws += [0] * len(rows)
        self.measured = dict(self.source.measure(rollout))
        self.buffer |= dict(enumerate(rows, first))
        oldest = len(self.draws) - self.clock.capacity if self.clock.capacity else first
        self.buffer = {number: row for number, row in self.buffer.items() if number >= oldest}

    def _draw(self, step: int) -> tuple[int, ...]:
        """Draw the rows of a policy step without replacement, each with weight 1 / (1 + its draws so far).

        The rows with the largest u^(1/w), u uniform, are such a draw (Efraimidis and Spirakis 2006).
        """
        if len(self.buffer) <= self.batch_size:
            return tuple(self.buffer)
        uniform = random.Random(derive(self.seed, "draw", step))
        keys = {number: uniform.random() ** (1 + self.draws[number]) for number in self.buffer}
        return tuple(sorted(sorted(keys, key=lambda number: -keys[number])[: self.batch_size]))

    def _tell(self) -> None:
        """Show the rollouts, the buffer and the stale rows next to the progress of the policy steps."""
        notes, room = self.notes, self.clock.capacity
        fill = f"{len(self.buffer):,} of {room:,}" if room else f"{len(self.buffer):,}"
        words = [f"rollout {len(self.rollouts):,}", f"buffer {fill}", f"{percent(notes['rollout/stale'], 0)} stale"]
        more = self.source.describe(len(self.rollouts) - 1)
        self.report.status(" · ".join([*words, more] if more else words))

    def state_dict(self) -> dict[str, Any]:
        """The position and all counts; the rows are on the disk."""
        rollouts, asked = [list(each) for each in self.rollouts], list(self.asked)
        kept = {"draws": list(self.draws), "rollouts": rollouts, "asked": asked}
        oldest = min(self.buffer, default=0)
        return {**super().state_dict(), **kept, "oldest": oldest, "measured": dict(self.measured)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint: take the rows of the buffer again."""
        super().load_state_dict(state)
        self.draws, self.asked, self.measured = list(state["draws"]), list(state["asked"]), dict(state["measured"])
        self.rollouts = [(first, step) for first, step in state["rollouts"]]
        self.source.check(len(self.rollouts))
        ends = [*(first for first, _ in self.rollouts[1:]), len(self.draws)]
        self.buffer = {}
        for rollout, ((first, step), end) in enumerate(zip(self.rollouts, ends, strict=True)):
            if end > max(first, state["oldest"]):
                self.buffer |= dict(enumerate(self.source.take(rollout, first, step), first))
        self.buffer = {number: row for number, row in self.buffer.items() if number >= state["oldest"]}
