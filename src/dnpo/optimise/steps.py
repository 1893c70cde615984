"""Arrange rows into policy steps, in a fixed order that a killed run can continue.

The whole training is one pass over a fixed list of groups. Epochs are permutations drawn from the seed, and each group
makes one policy step of ``batch_size`` rows, or fewer if they do not divide evenly. A group is cut into micro-batches
just before its step, so their size does not affect the order. The number of the next step is the only state. If several
processes train together (``ranks.py``), each takes its share of every group.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

from dnpo import ranks
from dnpo.errors import SettingsError
from dnpo.optimise.parts import Optimisation
from dnpo.seeding import derive

Row = TypeVar("Row")
Some = TypeVar("Some")  # a micro-batch


@dataclass(frozen=True)
class Slice(Generic[Row]):
    """The rows of a micro-batch.

    Attributes:
        step: its policy step, from 0.
        rows: its rows.
        group: all rows of that step.
    """

    step: int
    rows: tuple[Row, ...]
    group: tuple[Row, ...]

    @property
    def share(self) -> float:
        """The micro-batch's share of the group's rows, which is the weight of its mean in the group's mean."""
        return len(self.rows) / len(self.group)


def schedule(rows: int, batch_size: int, epochs: int, seed: int, steps: int | None) -> list[tuple[int, ...]]:
    """The rows of every policy step of a whole training, in order.

    An epoch is cut into as few groups as possible, whose sizes differ by at most one row. A small last group would give
    its few rows too much weight.

    Args:
        rows: number of rows.
        batch_size: maximum number of rows in a policy step.
        epochs: passes over the rows, each in a new order.
        seed: seed of the orders.
        steps: number of policy steps, over as many epochs as needed; overrides ``epochs``.
    """
    if not rows:
        return []
    count = math.ceil(rows / batch_size)
    borders = [rows * group // count for group in range(count + 1)]
    groups: list[tuple[int, ...]] = []
    epoch = 0
    while (len(groups) < steps) if steps is not None else (epoch < epochs):
        order = list(range(rows))
        random.Random(derive(seed, "epoch", epoch)).shuffle(order)
        groups += [tuple(order[first:end]) for first, end in pairwise(borders)]
        epoch += 1
    return groups[:steps]


def arrange(how: Optimisation, rows: int, seed: int) -> list[tuple[int, ...]]:
    """The rows of each policy step of a training on ``rows`` rows."""
    return schedule(rows, how.batch_size, how.epochs, seed, how.steps or None)


@dataclass(frozen=True)
class Idle(Generic[Some]):
    """A micro-batch of another rank's rows, which a rank computes without effect while other ranks still have work."""

    batch: Some


class Steps(ABC, Generic[Row, Some]):
    """An iterable of policy steps for Lightning; every step is a list of micro-batches.

    Lightning saves ``state_dict`` in a checkpoint and restores it before iterating again, so iteration continues where
    the checkpoint was made.

    Attributes:
        next: the number of the next step.
        even: whether all ranks have the same number of micro-batches in a step; then some are :class:`Idle`.
        over: whether no further step is made.

    Args:
        micro_batch_size: maximum number of rows in a micro-batch.
        collate: makes a micro-batch of rows.
    """

    def __init__(self, micro_batch_size: int, collate: Callable[[Slice[Row]], Some]) -> None:
        self.micro_batch_size, self.collate = micro_batch_size, collate
        self.next, self.even = 0, False
        self.over: Callable[[], bool] = lambda: False

    @abstractmethod
    def __len__(self) -> int:
        """The number of policy steps."""

    @abstractmethod
    def group(self, step: int) -> Sequence[Row]:
        """All rows of a policy step, which must be the next or the present one."""

    def __iter__(self) -> Iterator[list[Some | Idle[Some]]]:
        while self.next < len(self) and not self.over():
            step = self.next
            batch = self.step(step, self.micro_batch_size)
            self.next += 1
            yield batch

    def step(self, step: int, micro_batch_size: int) -> list[Some | Idle[Some]]:
        """The micro-batches of this rank's share of a policy step's rows; the share may be empty."""
        group = tuple(self.group(step))
        own = tuple(ranks.share(group))
        parts = [own[i : i + micro_batch_size] for i in range(0, len(own), micro_batch_size)]
        batches: list[Some | Idle[Some]] = [self.collate(Slice(step, part, group)) for part in parts]
        if self.even:
            most = math.ceil(math.ceil(len(group) / ranks.world()) / micro_batch_size)  # on rank 0
            batches += [Idle(self.collate(Slice(step, group[:1], group)))] * (most - len(batches))
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self.next = state["next"]


class Batches(Steps[Row, Some]):
    """The policy steps of a training whose rows all exist before it begins.

    Args:
        rows: the rows.
        groups: the result of :func:`schedule`, indices of the rows of each step.
        micro_batch_size, collate: as in :class:`Steps`.

    Raises:
        SettingsError: there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        groups: Sequence[tuple[int, ...]],
        micro_batch_size: int,
        collate: Callable[[Slice[Row]], Some],
    ) -> None:
        if not rows:
            raise SettingsError("there is nothing to train on: no rows are left")
        super().__init__(micro_batch_size, collate)
        self.rows, self.groups = rows, groups

    def __len__(self) -> int:
        return len(self.groups)

    def group(self, step: int) -> list[Row]:
        """All rows of a policy step."""
        return [self.rows[i] for i in self.groups[step]]
