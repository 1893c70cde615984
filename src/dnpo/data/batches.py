"""Rows → micro-batches in a fixed order that a killed run can continue.

The whole training is one pass over a list of micro-batches that is known beforehand: epochs are permutations drawn from
the seed, groups of ``batch_size`` rows make one policy step each, and a group is cut into micro-batches that fit in
memory. The position in that list is all the state there is.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dnpo.seeding import derive

Row = TypeVar("Row")
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Slice:
    """Which rows a micro-batch holds.

    Attributes:
        rows: indices of its rows.
        group: indices of all rows of its group.
        first, last: whether it begins or ends its group; after the last one the players step.
    """

    rows: tuple[int, ...]
    group: tuple[int, ...]
    first: bool
    last: bool

    @property
    def share(self) -> float:
        """Its share of its group's rows, the weight of a mean over its rows in the group's."""
        return len(self.rows) / len(self.group)


def schedule(
    rows: int, batch_size: int, micro_batch_size: int, epochs: int, seed: int, steps: int | None
) -> list[Slice]:
    """The micro-batches of a whole training, in order.

    Args:
        rows: how many rows there are.
        batch_size: rows of one policy step; the last group of an epoch may be smaller.
        micro_batch_size: rows at most that go through the model at once.
        epochs: passes over the rows, each in an order of its own.
        seed: draws the orders.
        steps: policy steps at which to stop, however many epochs that takes; overrides ``epochs``.
    """
    if not rows:
        return []
    groups: list[list[int]] = []
    epoch = 0
    while (len(groups) < steps) if steps is not None else (epoch < epochs):
        order = list(range(rows))
        random.Random(derive(seed, "epoch", epoch)).shuffle(order)
        groups += [order[i : i + batch_size] for i in range(0, rows, batch_size)]
        epoch += 1
    found = []
    for group in groups[:steps]:
        parts = [group[i : i + micro_batch_size] for i in range(0, len(group), micro_batch_size)]
        for i, part in enumerate(parts):
            found.append(Slice(tuple(part), tuple(group), i == 0, i == len(parts) - 1))
    return found


class Batches(Generic[Row, Batch]):
    """The micro-batches as an iterable for Lightning, with its position as state.

    Lightning saves ``state_dict`` in a checkpoint and gives it back before it iterates again; iteration then goes on
    where the checkpoint was made.
    """

    def __init__(
        self, rows: Sequence[Row], slices: Sequence[Slice], collate: Callable[[Sequence[Row], Slice], Batch]
    ) -> None:
        self.rows, self.slices, self.collate = rows, slices, collate
        self.next = 0

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[Batch]:
        while self.next < len(self.slices):
            piece = self.slices[self.next]
            self.next += 1
            yield self.collate([self.rows[i] for i in piece.rows], piece)

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self.next = state["next"]
