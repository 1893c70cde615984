"""Train on pairs of earlier iterations too: in addition to the new ones, or in place of some of them."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dnpo.data.curriculum import Context, Counts, Curriculum
from dnpo.errors import SettingsError
from dnpo.records import Pair
from dnpo.settings import Count, NonNegative


@dataclass(frozen=True)
class Accumulate(Curriculum):
    """The pairs of this iteration and of the last few before it (one in the SPIN paper, section 6.1).

    A pair of an earlier iteration that a newer one repeats token for token is left out, so that it counts once, with
    its newest label; ``repeated`` is the number of such pairs. Repetitions within an iteration are kept: the data
    contain them.

    Args:
        last: how many earlier iterations; the first iterations use as many as exist.
    """

    last: Count = 1

    @property
    def reads_history(self) -> int:
        """The number of earlier iterations that it adds."""
        return self.last

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        """New pairs first, then pairs of earlier iterations, the newest iteration first."""
        kept, seen = list(pairs), {tokens_of(pair) for pair in pairs}
        repeated = 0
        for earlier in history[: self.last]:
            new = [pair for pair in earlier if tokens_of(pair) not in seen]
            repeated += len(earlier) - len(new)
            seen.update(map(tokens_of, new))
            kept += new
        return kept, {"earlier": len(kept) - len(pairs), "repeated": repeated}


@dataclass(frozen=True)
class Mix(Curriculum):
    """The iteration's pairs, some of them replaced by as many pairs of earlier iterations (α-SPIN: half of them).

    Each iteration gives its share of the pairs. A hash of the id decides which iteration gives the pairs of this id, so
    iterations with the same ids give pairs of different ids. If an earlier iteration has too few pairs, the present one
    gives more (``short`` counts these). If an earlier iteration does not exist, the other shares are scaled to a sum of
    1: iteration 0 uses only its own pairs. So with two halves a pair is trained on once, in the iteration that labelled
    it or in the next one; but half of the pairs of iteration 0 are trained on twice, and half of the last iteration's
    not at all.

    Args:
        shares: the iterations' shares of the pairs, the newest iteration's first; they are scaled to a sum of 1.

    Raises:
        SettingsError: the shares sum to 0.
    """

    shares: list[NonNegative] = field(default_factory=lambda: [0.5, 0.5])

    def __post_init__(self) -> None:
        if not all(share >= 0 for share in self.shares):
            raise SettingsError(f"shares={self.shares}: expected numbers that are not negative")
        if sum(self.shares) <= 0:
            raise SettingsError(f"shares={self.shares}: they sum to 0; expected a positive share of some iteration")

    @property
    def reads_history(self) -> int:
        """The number of earlier iterations in ``shares``."""
        return len(self.shares) - 1

    def check(self, iteration: int, iterations: int) -> None:
        """Refuse shares of iterations that the run does not have, and a first iteration without a share.

        Raises:
            SettingsError: the run has fewer iterations than shares, or only iterations without a share exist.
        """
        if len(self.shares) > iterations:
            raise SettingsError(
                f"curriculum.shares={self.shares}: has shares of {len(self.shares)} iterations, but with "
                f"iterations={iterations} there are never more than {iterations} to mix; give at most that many shares"
            )
        self._shares_of(iteration + 1, iteration)

    def _shares_of(self, count: int, iteration: int) -> list[float]:
        """The shares of the ``count`` newest iterations, scaled to a sum of 1."""
        shares = self.shares[:count]
        if sum(shares) <= 0:
            raise SettingsError(
                f"curriculum.shares={self.shares}: in iteration {iteration} only the first {len(shares)} of these "
                "shares have an iteration, and they sum to 0; expected a positive one among them, or no curriculum in "
                "this iteration"
            )
        return [share / sum(shares) for share in shares]

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        """The pairs that each iteration gives, the newest iteration first; within one, in the order of labelling."""
        shares = self._shares_of(1 + len(history), context.iteration)
        wanted = apportion(len(pairs), shares)
        given: list[list[int]] = []
        used: set[str] = set()
        iterations = [pairs, *history][: len(shares)]
        for rows, number in zip(iterations, wanted, strict=True):
            order = sorted(range(len(rows)), key=lambda i: (rows[i].id in used, hash_of(rows[i].id), i))
            given.append(order[:number])
            used.update(rows[i].id for i in given[-1])
        short = len(pairs) - sum(map(len, given))
        if short:
            given[0] = _more(pairs, given[0], short, used)
        kept = [rows[i] for rows, some in zip(iterations, given, strict=True) for i in sorted(some)]
        return kept, {"earlier": len(kept) - len(given[0]), "short": short}


def _more(pairs: Sequence[Pair], taken: Sequence[int], number: int, used: set[str]) -> list[int]:
    """Take further pairs; first the pairs whose ids no iteration has given yet."""
    left = sorted(set(range(len(pairs))) - set(taken), key=lambda i: (pairs[i].id in used, hash_of(pairs[i].id), i))
    return [*taken, *left[:number]]


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Divide a number by shares that sum to 1, by largest remainders; at equal remainders the first gets more.

    Shares of ½ and ½ divide 5 into 3 and 2; shares of .55, .3 and .15 divide 10 into 6 (5.5), 3 and 1 (1.5).
    """
    exact = [total * share for share in shares]
    parts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def tokens_of(pair: Pair) -> tuple[tuple[int, ...], ...]:
    """The tokens of a pair (prompt, chosen, rejected). Pairs with the same tokens have the same effect in training."""
    return tuple(pair.prompt_ids), tuple(pair.chosen_ids), tuple(pair.rejected_ids)


def hash_of(text: str) -> bytes:
    """A hash of an id, the same everywhere."""
    return hashlib.sha256(text.encode()).digest()
