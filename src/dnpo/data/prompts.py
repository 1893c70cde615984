"""Choose the training prompts of an iteration: the parts that ``prompts=…`` configures.

Prompts are divided by a hash of their conversations, not of their ids. So rows with the same conversation are always in
the same part, even if their ids differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

from dnpo.data.seen import hash_conversation
from dnpo.errors import DataError, SettingsError
from dnpo.records import Prompt
from dnpo.settings import Fraction, Positive
from dnpo.tables import take, values
from dnpo.wording import plural

SeedPairs = Literal["all", "share"]


class Prompts(Protocol):
    """Chooses the prompts of an iteration, configured by ``prompts=…``."""

    def check(self, iterations: int) -> None:
        """Raise if, for any data, one of the iterations would have no prompts.

        Raises:
            SettingsError: names the setting.
        """

    def __call__(self, prompts: Sequence[Prompt], k: int) -> Sequence[Prompt]:
        """Select the prompts of iteration ``k`` from all training prompts, in their order.

        Raises:
            DataError: there are none.
        """


@dataclass(frozen=True)
class All:
    """All training prompts, in every iteration."""

    def check(self, iterations: int) -> None:
        """Accept any number of iterations."""

    def __call__(self, prompts: Sequence[Prompt], k: int) -> Sequence[Prompt]:
        """All of them."""
        return prompts


@dataclass(frozen=True)
class Seed:
    """The seed: a few prompts, the same ones in every iteration.

    If some prompts, but not all, have pairs in the data, these prompts are the seed. Otherwise the seed is a share of
    all prompts.

    Args:
        share: size of the seed as a share of all training prompts; a hash of the conversation chooses its prompts.
        pairs: if only some prompts have pairs, ``all`` makes all of these the seed; ``share`` limits them to ``share``
            of all training prompts.
    """

    share: Fraction = 0.0333
    pairs: SeedPairs = "all"

    def check(self, iterations: int) -> None:
        """Refuse an empty seed.

        Raises:
            SettingsError: the share is 0.
        """
        if not self.share:
            raise SettingsError(f"prompts.share={self.share}: the seed would have no prompts; expected a share above 0")

    def __call__(self, prompts: Sequence[Prompt], k: int) -> Sequence[Prompt]:
        """The seed.

        Raises:
            DataError: the seed has no prompts.
        """
        self.check(k + 1)
        seed, _ = self.divide(prompts)
        if not seed:
            raise DataError(
                f"prompts.share={self.share}: of {len(prompts):,} training prompts ({_count(prompts):,} different "
                "conversations) this is none; raise it, or take more rows"
            )
        return seed

    def divide(self, prompts: Sequence[Prompt]) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
        """The seed, and the prompts whose conversations are not in it."""
        paired = take(prompts, [i for i, other in enumerate(values(prompts, "rejected")) if other is not None])
        seed: Sequence[Prompt]
        if self.pairs == "all" and 0 < len(paired) < len(prompts):
            seed = paired
        else:
            some = paired or prompts
            share = min(self.share * len(prompts) / max(len(some), 1), 1.0)
            seed = divide(some, [share, 1 - share])[0]
        used = {hash_conversation(messages) for messages in values(seed, "messages")}
        others = (hash_conversation(messages) not in used for messages in values(prompts, "messages"))
        return seed, take(prompts, [i for i, other in enumerate(others) if other])


@dataclass(frozen=True)
class Fresh:
    """New prompts in every iteration: iteration ``k`` has part ``k`` of the training prompts.

    With a seed, part 0 is the seed, and the other parts divide the remaining prompts.

    Args:
        shares: sizes of the parts in proportion, such as 8, 20 and 30.
        seed_share: the ``share`` of :class:`Seed`; 0: there is no seed, and part 0 is the first of ``shares``.
        seed_pairs: the ``pairs`` of :class:`Seed`.

    Raises:
        SettingsError: there are no shares.
    """

    shares: list[Positive]
    seed_share: Fraction = 0.0
    seed_pairs: SeedPairs = "all"

    def __post_init__(self) -> None:
        if not self.shares:
            raise SettingsError(f"shares={self.shares}: expected at least one size, such as [8, 20, 30]")

    def check(self, iterations: int) -> None:
        """Refuse more iterations than parts.

        Raises:
            SettingsError: there are fewer parts than iterations.
        """
        parts = len(self.shares) + bool(self.seed_share)
        if iterations > parts:
            beside = " in addition to the seed" if self.seed_share else ""
            needed = iterations - bool(self.seed_share)
            raise SettingsError(
                f"prompts.shares={self.shares}: has {plural(len(self.shares), 'part')}{beside}, but "
                f"iterations={iterations} needs {needed}; add shares, or run at most {plural(parts, 'iteration')}"
            )

    def __call__(self, prompts: Sequence[Prompt], k: int) -> Sequence[Prompt]:
        """Part ``k``.

        Raises:
            DataError: the part has no prompts.
        """
        self.check(k + 1)
        parts = self.parts(prompts)
        if not parts[k]:
            raise DataError(
                f"prompts.shares={self.shares}: {len(prompts):,} training prompts ({_count(prompts):,} different "
                f"conversations) leave none for iteration {k} of {plural(len(parts), 'part')}; take more rows, or "
                "fewer parts"
            )
        return parts[k]

    def parts(self, prompts: Sequence[Prompt]) -> list[Sequence[Prompt]]:
        """All parts, the seed first if there is one."""
        if not self.seed_share:
            return divide(prompts, self.shares)
        seed, others = Seed(self.seed_share, self.seed_pairs).divide(prompts)
        return [seed, *divide(others, self.shares)]


def divide(prompts: Sequence[Prompt], shares: Sequence[float]) -> list[Sequence[Prompt]]:
    """Divide prompts into parts in proportion to ``shares``, counted in rows; each part keeps the order of the rows.

    Conversations are sorted by their hashes. If a conversation has n of N rows and the earlier conversations have b
    rows, it is in the part that contains the position (b + n/2)/N. Example: conversations with 1, 1, 4 and 2 rows have
    the positions 1/16, 3/16, 1/2 and 7/8, so with the shares 1:3 the first two are in the first part.
    """
    rows: dict[str, list[int]] = {}
    for i, messages in enumerate(values(prompts, "messages")):
        rows.setdefault(hash_conversation(messages), []).append(i)
    ends = [end / sum(shares) for end in accumulate(shares)]
    parts: list[list[int]] = [[] for _ in shares]
    before = 0
    for _, some in sorted(rows.items()):
        place = (before + len(some) / 2) / len(prompts)
        parts[sum(end <= place for end in ends[:-1])] += some
        before += len(some)
    return [take(prompts, sorted(part)) for part in parts]


def _count(prompts: Sequence[Prompt]) -> int:
    """The number of different conversations."""
    return len({hash_conversation(messages) for messages in values(prompts, "messages")})
