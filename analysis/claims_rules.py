"""Decide whether a claim is supported, contradicted or undecided: the rule, as pure functions.

A claim states a region for an effect, an open interval: above or below a target (``greater``, ``less``), not below or
not above it by more than a margin (``at_least``, ``at_most``), or within a margin around it (``within``). The effect
has a 95 % t interval over seeds and items, which is wide if there are few seeds. The claim is

    supported      if the interval lies inside the region, and p ≤ 0.05 after Holm's correction;
    contradicted   if the interval lies outside the region, with the same p;
    undecided      otherwise, and always with fewer than three seeds.

p comes from a two-sided test against the region's bound; with two bounds it is the larger p. If a paired difference
over items is compared with 0, p comes from ``dnpo.stats.paired``. Holm's correction is over all claims of the file. A
claim that was not measured counts with p = 1, so a claim does not become easier to support if fewer claims are
measured.

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
    "Supported: the whole 95 % interval lies where the claim says, and p ≤ {alpha} after Holm's correction over all "
    "{claims} claims (one that was not measured counts with p = 1). Contradicted: the whole interval lies elsewhere, "
    "with the same p. Undecided: everything else, and every claim measured with fewer than {least} seeds. Intervals "
    "are t intervals over seeds and, if there are any, items; detectable is the smallest true difference from the "
    "bound that would be found in 80 % of such comparisons at α = {alpha}, before the correction."
)


@dataclass(frozen=True)
class Region:
    """The region of an effect according to a claim: between low and high, both excluded."""

    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, ...]:
        """The finite bounds."""
        return tuple(bound for bound in (self.low, self.high) if math.isfinite(bound))


@dataclass(frozen=True)
class Sample:
    """The values of both sides, seeds × items; the effect is a − b.

    Attributes:
        by_item: whether the columns are items; otherwise there is one column, with one value for each seed.
    """

    a_SI: Array
    b_SI: Array
    by_item: bool

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return int(self.a_SI.shape[0])


@dataclass(frozen=True)
class Effect:
    """An effect with its uncertainty.

    Attributes:
        p: before any correction; 1 if it cannot be tested.
        detectable: smallest detectable difference; None if the values do not vary.
        items: number of items; None for a measure without items.
    """

    estimate: Estimate
    p: float
    detectable: float | None
    seeds: int
    items: int | None
    notes: tuple[str, ...]


def region(relation: Relation, target: float, margin: float) -> Region:
    """The region of a claim, as the head of this file defines it."""
    low = {"greater": target, "at_least": target - margin, "within": target - margin}
    high = {"less": target, "at_most": target + margin, "within": target + margin}
    return Region(low.get(relation, -math.inf), high.get(relation, math.inf))


def estimate_effect(sample: Sample, where: Region) -> Effect:
    """Estimate the effect of a sample and test it against the bounds of a region.

    Raises:
        DataError: no item has a value on both sides for every seed.
    """
    kept_I = np.isfinite(sample.a_SI + sample.b_SI).all(0)
    a_SI, b_SI = sample.a_SI[:, kept_I], sample.b_SI[:, kept_I]
    seeds, items = a_SI.shape
    notes = []
    prompts = sample.a_SI.shape[1]
    if prompts > items:
        notes.append(f"{prompts - items} of {prompts} prompts lack a result and were left out")
    if not items:
        raise DataError("no prompt has a result on both sides for every seed")
    if seeds == 1:
        notes.append("one seed: the variation between trainings is unknown")
    difference_SI = a_SI - b_SI
    mean = estimate_mean(difference_SI if sample.by_item else difference_SI.T)
    counted = items if sample.by_item else None
    if mean is None:
        return Effect(Estimate(float(difference_SI.mean())), 1.0, None, seeds, counted, tuple(notes))
    if not mean.error:
        notes.append("the values do not vary, so the interval has no width; that is not certainty")
    if sample.by_item and where.bounds == (0.0,):
        p = compare_paired(a_SI, b_SI, kind="scores", interval="t").p
    else:
        p = p_against(mean, where)
    return Effect(mean.estimate(), p, mean.detectable() if mean.error else None, seeds, counted, tuple(notes))


def p_against(mean: Mean, where: Region) -> float:
    """The largest p of two-sided t tests against the bounds of a region."""
    return max((replace(mean, value=mean.value - bound).p() for bound in where.bounds), default=1.0)


def decide(effect: Estimate, where: Region, p_holm: float, seeds: int) -> Outcome:
    """Decide the outcome by the rule at the head of this file."""
    if effect.low is None or effect.high is None or seeds < LEAST_SEEDS or not p_holm <= ALPHA:
        return "undecided"
    if where.low < effect.low and effect.high < where.high:
        return "supported"
    if effect.high <= where.low or where.high <= effect.low:
        return "contradicted"
    return "undecided"


def rule(claims: int) -> str:
    """State the rule for a caption."""
    return RULE.format(alpha=ALPHA, claims=claims, least=LEAST_SEEDS)


def count_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Count the outcomes of each kind, in words."""
    return ", ".join(f"{outcomes.count(one)} {one}" for one in OUTCOMES)
