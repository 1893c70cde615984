"""Decide the outcome of a claim: the rule, as pure functions.

A claim states a region for an effect, an open interval: above or below a target (``greater``, ``less``), not below or
not above it by more than a margin (``at_least``, ``at_most``), or within a margin around it (``within``). Except for
``within``, it also states the smallest effect of interest (SESOI): a deviation from the target that is smaller, in
either direction, is negligible. One model of seeds and items gives the 95 % interval and every p, so a p ≤ 0.05 means
that the interval excludes the bound that is tested. The claim is

    negligible     if the interval lies within the SESOI around the target (two one-sided tests), with p ≤ 0.05 after
                   the correction, or at its strictest level if the effect differs from the target too;
    supported      if the interval lies inside the region, with p ≤ 0.05 after the correction;
    contradicted   if the interval lies outside the region, with the same p;
    undecided      otherwise, and always with fewer than three seeds.

p comes from two-sided tests against the bounds; with two bounds it is the larger p. It is corrected over all claims of
the same role in the file: Holm's correction for primary claims, Benjamini and Hochberg's for secondary ones. The
correction is applied to both questions separately, whether there is an effect and whether it is negligible. A claim
that was not measured counts with p = 1, so a claim does not become easier to support if fewer claims are measured.

``at_least`` and ``at_most`` are non-inferiority. Their margin is below the SESOI, and they are supported only if a
positive control is: another claim by the same measure on the same runs, with a known effect. Without the control, a
measure that detects nothing would support them.

Checks follow from the construction or from the mathematics. They have no correction: their interval lies inside the
region, as expected, or it does not.

If nothing varies, there is no t test. A measure that counts units, such as answers or steps, has an exact bound instead
(:class:`dnpo.stats.intervals.Unvaried`); any other claim is undecided.

Shapes: S seeds, I items.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dnpo.errors import DataError
from dnpo.stats.intervals import Array, Components, Estimate, Mean, Unvaried, estimate_components, estimate_mean, still
from dnpo.stats.significance import benjamini_hochberg, holm
from dnpo.stats.table import ALPHA
from dnpo.wording import plural

Relation = Literal["greater", "less", "at_least", "at_most", "within"]
Role = Literal["primary", "secondary", "check"]
Outcome = Literal[
    "supported", "contradicted", "negligible", "undecided", "not measured", "as expected", "not as expected"
]
OUTCOMES: tuple[Outcome, ...] = ("supported", "contradicted", "negligible", "undecided", "not measured")
CHECKED: tuple[Outcome, ...] = ("as expected", "not as expected")
ROLES: tuple[Role, ...] = ("primary", "secondary", "check")
LEAST_SEEDS = 3
POWER = 0.8

RULE = (
    "Supported: the whole 95 % interval lies where the claim says, and p ≤ {alpha} after the correction. Contradicted: "
    "the whole interval lies elsewhere, with the same p. Negligible: the whole interval lies within the smallest "
    "effect of interest (SESOI), with p ≤ {alpha} in two one-sided tests after the correction, or at its strictest "
    "level if the effect differs from the target too. Undecided: everything else, and every claim measured with fewer "
    "than {least} seeds. Correction, over both questions separately: {corrections}. A "
    "claim that was not measured counts with p = 1. Interval and p are from one model of seeds and, if there are any, "
    "items. Detectable is the smallest true difference from the target that would be found in {power} % of such "
    "comparisons at the strictest level of the correction."
)
CORRECTIONS = {"primary": "Holm's over {}", "secondary": "Benjamini and Hochberg's over {}", "check": "none of {}"}
NOUNS = {"primary": "primary claim", "secondary": "secondary claim", "check": "check"}


@dataclass(frozen=True)
class Region:
    """The region of an effect according to a claim: between low and high, both excluded."""

    low: float
    high: float

    @property
    def bounds(self) -> tuple[float, ...]:
        """The finite bounds."""
        return tuple(bound for bound in (self.low, self.high) if math.isfinite(bound))

    def includes(self, estimate: Estimate) -> bool:
        """Whether the whole interval lies inside."""
        ends = (estimate.low, estimate.high)
        return ends[0] is not None and ends[1] is not None and self.low < ends[0] and ends[1] < self.high

    def excludes(self, estimate: Estimate) -> bool:
        """Whether the whole interval lies outside."""
        ends = (estimate.low, estimate.high)
        return ends[0] is not None and ends[1] is not None and (ends[1] <= self.low or self.high <= ends[0])


@dataclass(frozen=True)
class Sample:
    """The values of both sides, seeds × items; the effect is a − b.

    Attributes:
        by_item: whether the columns are items; otherwise there is one column, with one value for each seed.
        ends: least and largest possible effect, if the values count units; None for other values.
        units: number of these units.
    """

    a_SI: Array
    b_SI: Array
    by_item: bool
    ends: tuple[float, float] | None = None
    units: int = 0

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return int(self.a_SI.shape[0])

    @property
    def whole_I(self) -> npt.NDArray[np.bool_]:
        """Which items have a value on both sides for every seed."""
        return np.asarray(np.isfinite(self.a_SI + self.b_SI).all(0), bool)

    def means(self) -> list[tuple[float, float]]:
        """The means of a and b for each seed, over the items that count."""
        sides = (self.a_SI[:, self.whole_I].mean(1), self.b_SI[:, self.whole_I].mean(1))
        return [(float(a), float(b)) for a, b in zip(*sides, strict=True)]


@dataclass(frozen=True)
class Effect:
    """An effect with its uncertainty.

    Attributes:
        model: gives the interval and every p; None if it cannot be tested.
        items: number of items; None for a measure without items.
        components: the variances of seeds, items and the rest; None with one seed.
    """

    estimate: Estimate
    model: Mean | Unvaried | None
    seeds: int
    items: int | None
    notes: tuple[str, ...] = ()
    components: Components | None = None

    def p(self, where: Region) -> float:
        """The largest p of two-sided tests against the bounds of a region; 1 if it cannot be tested."""
        return 1.0 if self.model is None else max(map(self.model.p, where.bounds), default=1.0)

    def detectable(self, level: float, sesoi: float = 0.0) -> float | None:
        """The smallest difference that is found at this level in 80 % of cases; None if nothing varies."""
        return self.model.detectable(level, POWER, sesoi) if isinstance(self.model, Mean) else None


def region(relation: Relation, target: float, margin: float) -> Region:
    """The region of a claim, as the head of this file defines it."""
    low = {"greater": target, "at_least": target - margin, "within": target - margin}
    high = {"less": target, "at_most": target + margin, "within": target + margin}
    return Region(low.get(relation, -math.inf), high.get(relation, math.inf))


def estimate_effect(sample: Sample) -> Effect:
    """Estimate the effect of a sample.

    Raises:
        DataError: no item has a value on both sides for every seed.
    """
    difference_SI = (sample.a_SI - sample.b_SI)[:, sample.whole_I]
    seeds, items = difference_SI.shape
    notes = []
    prompts = sample.a_SI.shape[1]
    if prompts > items:
        notes.append(f"{prompts - items} of {prompts} prompts lack a result and were left out")
    if not items:
        raise DataError("no prompt has a result on both sides for every seed")
    if seeds == 1:
        notes.append("one seed: the variation between trainings is unknown")
    counted = items if sample.by_item else None
    mean = estimate_mean(difference_SI if sample.by_item else difference_SI.T)
    model: Mean | Unvaried | None = mean if mean is not None and mean.error else None
    if model is None and (mean is not None or sample.units > 1) and still(difference_SI):
        units = difference_SI.size if sample.by_item else sample.units
        value = float(difference_SI.flat[0])
        if sample.ends is None or units < 2:
            notes.append("nothing varies, so there is no interval")
        else:
            model = Unvaried(value, *sample.ends, units)
            notes.append(f"nothing varies: exact interval, from {units:,} units as if they were independent")
    estimate = Estimate(float(difference_SI.mean())) if model is None else model.estimate()
    components = estimate_components(difference_SI) if seeds > 1 else None
    return Effect(estimate, model, seeds, counted, tuple(notes), components)


def decide(
    effect: Effect, where: Region, band: Region | None, p: float, p_negligible: float, strictly: bool
) -> Outcome:
    """Decide the outcome of a primary or secondary claim by the rule at the head of this file.

    Args:
        band: the effects that are negligible; None if the claim has no SESOI.
        p, p_negligible: corrected p of the test against the region, and of the test against the band.
        strictly: whether the test against the band is significant at the strictest level of the correction.
    """
    if effect.seeds < LEAST_SEEDS:
        return "undecided"
    within = band is not None and p_negligible <= ALPHA and band.includes(effect.estimate)
    if not (within and strictly) and p <= ALPHA:
        if where.includes(effect.estimate):
            return "supported"
        if where.excludes(effect.estimate):
            return "contradicted"
    return "negligible" if within else "undecided"


def check(effect: Effect, where: Region) -> Outcome:
    """The outcome of a check: whether the interval lies inside the region."""
    return "as expected" if where.includes(effect.estimate) else "not as expected"


def correct(ps: Sequence[float], role: Role) -> list[float]:
    """Correct the p values of all claims of a role."""
    if role == "check":
        return list(ps)
    return holm(ps) if role == "primary" else benjamini_hochberg(ps)


def strictest(role: Role, claims: int) -> float:
    """The level that the smallest p of so many claims of a role must reach; larger ones may have a higher level."""
    return ALPHA if role == "check" else ALPHA / claims


def rule(roles: Sequence[Role]) -> str:
    """State the rule for a caption.

    Args:
        roles: the role of each claim of the file.
    """
    counts = {role: roles.count(role) for role in ROLES if role in roles}
    named = [CORRECTIONS[role].format(plural(count, NOUNS[role])) for role, count in counts.items()]
    return RULE.format(alpha=ALPHA, least=LEAST_SEEDS, power=round(100 * POWER), corrections="; ".join(named))


def count_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Count the outcomes of each kind, in words; those of checks only if there are any."""
    shown = (*OUTCOMES, *(CHECKED if set(CHECKED) & set(outcomes) else ()))
    return ", ".join(f"{outcomes.count(one)} {one}" for one in shown)
