"""When is a claim supported, contradicted or undecided? The rule and the numbers it goes by, all pure.

A claim says where a number lies: above or below a target (``greater``, ``less``), at least or at most at one but for a
margin (``at_least``, ``at_most``: no worse than), or around it (``within``). That is an open interval, its region. With
the 95 % interval of the number over seeds and items (t, which is honest about few seeds) the claim is

    supported      the interval lies in the region, and p ≤ 0.05 after Holm's correction;
    contradicted   it lies wholly outside of it, with the same p;
    undecided      everything else, and whatever was measured under fewer than three seeds.

p is that of a two-sided test against the region's bound, the larger where there are two. A difference of two sides over
items that is compared with 0 has the p of ``dnpo.stats.paired``: no test there may object. Holm's correction is
over all claims of the file: one that was not measured counts with p = 1, so that measuring fewer makes none easier.

Shapes: S seeds, I items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dnpo.errors import DataError
from dnpo.stats.intervals import Array, Estimate, Mean, estimate_mean
from dnpo.stats.paired import compare_paired
from dnpo.stats.table import ALPHA

Relation = Literal["greater", "less", "at_least", "at_most", "within"]
Outcome = Literal["supported", "contradicted", "undecided", "not measured"]
OUTCOMES: tuple[Outcome, ...] = ("supported", "contradicted", "undecided", "not measured")
LEAST_SEEDS = 3

RULE = (
    "Supported: the 95 % interval lies wholly where the claim says, and p ≤ {alpha} after Holm's correction over all "
    "{claims} claims (one that was not measured counts with p = 1). Contradicted: it lies wholly elsewhere, with the "
    "same p. Undecided: everything else, and whatever was measured under fewer than {least} seeds. Intervals are t "
    "intervals over seeds and, where there are items, items; detectable is the smallest true difference from the bound "
    "that would be found in 80 % of such comparisons at α = {alpha}, before the correction."
)


@dataclass(frozen=True)
class Region:
    """Where a claim says that a number lies: between low and high, both excluded."""

    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, ...]:
        """Those that are finite."""
        return tuple(bound for bound in (self.low, self.high) if math.isfinite(bound))


@dataclass(frozen=True)
class Sample:
    """What was measured, seeds × items; the effect is a less b.

    Attributes:
        by_item: whether the columns are items; if not, there is one column, a number a seed.
    """

    a_SI: Array
    b_SI: Array
    by_item: bool

    @property
    def seeds(self) -> int:
        """How many."""
        return int(self.a_SI.shape[0])


@dataclass(frozen=True)
class Finding:
    """An effect with what is known of its certainty.

    Attributes:
        p: before any correction; 1 where nothing can be told.
        detectable: None where nothing varies.
        items: None where there are none.
    """

    effect: Estimate
    p: float
    detectable: float | None
    seeds: int
    items: int | None
    notes: tuple[str, ...]


def region(relation: Relation, target: float, margin: float) -> Region:
    """The region of a claim; see the head of this file."""
    low = {"greater": target, "at_least": target - margin, "within": target - margin}
    high = {"less": target, "at_most": target + margin, "within": target + margin}
    return Region(low.get(relation, -math.inf), high.get(relation, math.inf))


def find(sample: Sample, where: Region) -> Finding:
    """The effect of a sample and its certainty with respect to a region.

    Raises:
        DataError: no item has a result everywhere.
    """
    kept_I = np.isfinite(sample.a_SI + sample.b_SI).all(0)
    a_SI, b_SI = sample.a_SI[:, kept_I], sample.b_SI[:, kept_I]
    seeds, items = a_SI.shape
    notes = []
    prompts = sample.a_SI.shape[1]
    if prompts > items:
        notes.append(f"{prompts - items} of {prompts} prompts lack a result and were left out")
    if not items:
        raise DataError("no prompt has a result on both sides and under every seed")
    if seeds == 1:
        notes.append("one seed: nothing is known of training again")
    difference_SI = a_SI - b_SI
    mean = estimate_mean(difference_SI if sample.by_item else difference_SI.T)
    counted = items if sample.by_item else None
    if mean is None:
        return Finding(Estimate(float(difference_SI.mean())), 1.0, None, seeds, counted, tuple(notes))
    if not mean.error:
        notes.append("nothing varies: the interval has no width, which is no certainty")
    if sample.by_item and where.bounds == (0.0,):
        p = compare_paired(a_SI, b_SI, kind="scores", interval="t").p
    else:
        p = p_against(mean, where)
    return Finding(mean.estimate(), p, mean.detectable() if mean.error else None, seeds, counted, tuple(notes))


def p_against(mean: Mean, where: Region) -> float:
    """Of two-sided t tests against the bounds of a region, the largest."""
    return max((replace(mean, value=mean.value - bound).p() for bound in where.bounds), default=1.0)


def decide(effect: Estimate, where: Region, p_holm: float, seeds: int) -> Outcome:
    """The outcome by the rule at the head of this file."""
    if effect.low is None or effect.high is None or seeds < LEAST_SEEDS or not p_holm <= ALPHA:
        return "undecided"
    if where.low < effect.low and effect.high < where.high:
        return "supported"
    if effect.high <= where.low or where.high <= effect.low:
        return "contradicted"
    return "undecided"


def rule(claims: int) -> str:
    """The rule in words, for a caption."""
    return RULE.format(alpha=ALPHA, claims=claims, least=LEAST_SEEDS)


def count_outcomes(outcomes: Sequence[Outcome]) -> str:
    """How many of each, in words."""
    return ", ".join(f"{outcomes.count(one)} {one}" for one in OUTCOMES)
