"""Choose and weigh the pairs that an iteration is trained on: the parts that ``curriculum=…`` configures.

A curriculum takes the pairs that this iteration and earlier ones labelled, and returns the pairs to train on. It never
gets the result of an earlier iteration's curriculum, and never changes a label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dnpo.errors import SettingsError
from dnpo.records import Pair
from dnpo.settings import part_key, require

if TYPE_CHECKING:
    import numpy as np

Counts = dict[str, float]
"""Facts about the result, by name: counts of pairs, and losses in nats."""

Embed = Callable[[Sequence[Pair]], "np.ndarray"]
"""Turns pairs into embeddings of their prompts with their chosen responses, pairs × width."""


class Context(NamedTuple):
    """What a curriculum may use in addition to pairs.

    Attributes:
        seed: seed of its random draws.
        iteration: number of the iteration that trains on the result.
        embed: embeds pairs; only parts whose ``embeds`` is true may call it.
    """

    seed: int
    iteration: int
    embed: Embed


class Curriculum:
    """Chooses and weighs the pairs of an iteration."""

    @property
    def reads_history(self) -> int:
        """The number of earlier iterations whose pairs it reads."""
        return 0

    @property
    def needs_scores(self) -> bool:
        """Whether every pair must have the scores of both sides."""
        return False

    @property
    def embeds(self) -> bool:
        """Whether it needs embeddings."""
        return False

    def check(self, iteration: int, iterations: int) -> None:
        """Raise if it cannot work in this iteration, before anything is computed.

        Args:
            iteration: an iteration that uses it, from 0.
            iterations: the number of iterations of the run.

        Raises:
            DnpoError: names the setting.
        """

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        """The pairs to train on, and facts about them.

        Args:
            pairs: the pairs that this iteration labelled.
            history: the pairs that each earlier iteration labelled, the newest iteration first; at most
                ``reads_history`` iterations.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class NoCurriculum(Curriculum):
    """The iteration's pairs, unchanged."""

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        """The same pairs."""
        return list(pairs), {}


@dataclass(frozen=True)
class InTurn(Curriculum):
    """Several curricula in a row, each applied to the result of the one before.

    Args:
        parts: the curricula, in their order, under any names. Counts of the same name are added up.

    Raises:
        SettingsError: there are no parts.
    """

    parts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.parts:
            raise SettingsError("parts: has none; expected one curriculum or more (curriculum=off is no curriculum)")
        for name, part in self.parts.items():
            require(f"parts.{name}", part, Curriculum)

    @property
    def reads_history(self) -> int:
        """The largest number that any part reads."""
        return max(int(part.reads_history) for part in self.parts.values())

    @property
    def needs_scores(self) -> bool:
        """Whether any part needs scores."""
        return any(part.needs_scores for part in self.parts.values())

    @property
    def embeds(self) -> bool:
        """Whether any part needs embeddings."""
        return any(part.embeds for part in self.parts.values())

    def identity(self) -> Mapping[str, Any]:
        """The values that determine the result: the parts in their order, without their names."""
        return {"in turn": [part_key(part) for part in self.parts.values()]}

    def check(self, iteration: int, iterations: int) -> None:
        """Check every part."""
        for part in self.parts.values():
            part.check(iteration, iterations)

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        """Apply the parts in turn."""
        counts: Counts = {}
        rows = list(pairs)
        for part in self.parts.values():
            rows, own = part(rows, history, context)
            counts |= {what: counts.get(what, 0) + number for what, number in own.items()}
        return rows, counts
