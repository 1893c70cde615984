"""How sure a label is: p(y⁺ ≻ y⁻) of every pair, after the pairs are made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from dnpo.errors import DataError
from dnpo.records import Pair, Prompt

Compare = Callable[[Sequence[Prompt], Sequence[Pair]], Sequence[float]]
"""(prompts of the pairs, pairs) → the probability that each chosen response is the better one."""


@dataclass(frozen=True)
class HardLabels:
    """Labels count as certain."""

    asks: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False

    def __call__(self, prompts: Mapping[str, Prompt], pairs: Sequence[Pair], compare: Compare | None) -> list[float]:
        """1 for each pair."""
        return [1.0] * len(pairs)


@dataclass(frozen=True)
class RewardStrength:
    """The strength σ(r₁ − r₂), for judges whose scores r are rewards in nats (SPA, equation 7)."""

    asks: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = True

    def __call__(self, prompts: Mapping[str, Prompt], pairs: Sequence[Pair], compare: Compare | None) -> list[float]:
        """The Bradley-Terry probability of each pair.

        Raises:
            DataError: a pair lacks a score.
        """
        return [sigmoid(self._gap(pair)) for pair in pairs]

    def _gap(self, pair: Pair) -> float:
        if pair.chosen_score is None or pair.rejected_score is None:
            raise DataError(
                f"strength=implicit: a response of the pair {pair.id} has no score; it needs dsl=… by scores, and "
                "a judge that gives rewards (judge=implicit)"
            )
        return pair.chosen_score - pair.rejected_score


@dataclass(frozen=True)
class AskedStrength:
    """The probability that a judge gives when it is shown both responses (OSP paper, section 3)."""

    asks: ClassVar[bool] = True
    reads_scores: ClassVar[bool] = False

    def __call__(self, prompts: Mapping[str, Prompt], pairs: Sequence[Pair], compare: Compare | None) -> list[float]:
        """The judge's probability of each pair."""
        assert compare is not None, "a judge that compares"
        return list(compare([prompts[pair.id] for pair in pairs], pairs))


def with_strengths(pairs: Sequence[Pair], strengths: Sequence[float]) -> list[Pair]:
    """The pairs with their strengths. A pair with p below ½ is turned around, so that p is at least ½.

    The loss of a pair is the same for (y⁺, y⁻, p) and (y⁻, y⁺, 1 − p); hard labels and noise need the more likely
    order.
    """
    return [
        replace(pair, strength=p) if p >= 0.5 else replace(turn(pair), strength=1 - p)
        for pair, p in zip(pairs, strengths, strict=True)
    ]


def turn(pair: Pair) -> Pair:
    """The same pair with its sides exchanged."""
    return replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_ids=pair.rejected_ids,
        rejected_ids=pair.chosen_ids,
        chosen_source=pair.rejected_source,
        rejected_source=pair.chosen_source,
        chosen_score=pair.rejected_score,
        rejected_score=pair.chosen_score,
        chosen_sample=pair.rejected_sample,
        rejected_sample=pair.chosen_sample,
        flipped="human" in (pair.chosen_source, pair.rejected_source) and not pair.flipped,
    )


def sigmoid(x: float) -> float:
    """σ(x), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
