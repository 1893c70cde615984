"""Tests of paired differences, their correction over a table, and sizes of effects."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dnpo.errors import DataError
from dnpo.stats.intervals import Array, still

DIGITS = 9  # of the largest difference: what is beyond them is rounding, which must not break ties


def mcnemar(only_a: int, only_b: int, variant: Literal["exact", "mid-p", "chi-square"] = "exact") -> float:
    """The two-sided p of as many items right on one side only and on the other only, if either were as likely.

    ``exact``: binomial (McNemar 1947), never above its level. ``mid-p``: half of the observed outcome's probability is
    left out, nearer to the level and seldom above it. ``chi-square``: (b − c)²/(b + c), without a correction for
    continuity. The variants are compared in Fagerland, Lydersen and Laake (2013). 1 where the sides differ nowhere.

    Raises:
        DataError: a count is negative.
    """
    if min(only_a, only_b) < 0:
        raise DataError(f"McNemar's test takes two counts; these are {only_a} and {only_b}")
    count = only_a + only_b
    if not count:
        return 1.0
    from scipy.stats import binom, chi2

    if variant == "chi-square":
        return float(chi2.sf((only_a - only_b) ** 2 / count, 1))
    fewer = min(only_a, only_b)
    p = 2 * binom.cdf(fewer, count, 0.5) - (binom.pmf(fewer, count, 0.5) if variant == "mid-p" else 0.0)
    return min(float(p), 1.0)


def mcnemar_clustered(difference_SI: Array) -> float:
    """McNemar's test where every item was answered under several seeds: answers to one item are not independent.

    With d an item's sum of differences (−1, 0, 1), (Σ d)² / Σ d² is compared with χ² of one degree of freedom:
    Durkalski et al. (2003), Statistics in Medicine 22, with clusters of one size. With one seed it is the chi-square
    variant of ``mcnemar``. It is about new items for these very runs and says nothing about other seeds.
    """
    from scipy.stats import chi2

    item_I = difference_SI.sum(0)
    squares = float((item_I**2).sum())
    return float(chi2.sf(float(item_I.sum()) ** 2 / squares, 1)) if squares else 1.0


def wilcoxon(difference_I: Array) -> float:
    """The two-sided p of Wilcoxon's signed-rank test, by scipy.

    Zeros are ranked with the others and then left out (Pratt 1959), so that every difference keeps the rank it has
    among all items; among very many zeros it becomes the sign test. Exact up to 50 items without zeros and ties and up
    to 13 with them, else a normal approximation that allows for both. 1 where all is zero.
    """
    from scipy.stats import wilcoxon as exact_or_normal

    largest = float(np.abs(difference_I).max(initial=0.0))
    rounded = np.round(difference_I / largest, DIGITS) if largest else difference_I
    if not rounded.any():
        return 1.0
    return float(exact_or_normal(rounded, zero_method="pratt").pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, in the order given: the largest so far of (m − i + 1) · p₍ᵢ₎, at most 1 (Holm 1979).

    Those that are at most α make up a set in which not even one is false, with probability 1 − α or more, however the
    tests depend on one another.

    Raises:
        DataError: one is no probability.
    """
    adjusted, least = [0.0] * len(ps), 0.0
    if not all(0 <= p <= 1 for p in ps):  # NaN is neither
        raise DataError(f"Holm's correction takes p values between 0 and 1; these are {list(ps)}")
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min((len(ps) - rank) * ps[i], 1.0))
        adjusted[i] = least
    return adjusted


def cohens_dz(difference_I: Array) -> float | None:
    """Mean over standard deviation of paired differences (Cohen 1988, section 2.3.5).

    0.2, 0.5, 0.8: small, medium, large. 0 where all is zero; None where there is no deviation to divide by.
    """
    if not difference_I.any():
        return 0.0
    if len(difference_I) < 2 or still(difference_I):
        return None
    return float(difference_I.mean() / difference_I.std(ddof=1))


def cohens_g(only_a: int, only_b: int) -> float:
    """How far from half is the share of a's among the items that one side alone has right (Cohen 1988, chapter 5).

    Between −0.5 and 0.5; 0.05, 0.15, 0.25: small, medium, large. 0 where the sides differ nowhere.
    """
    return only_a / (only_a + only_b) - 0.5 if only_a + only_b else 0.0
