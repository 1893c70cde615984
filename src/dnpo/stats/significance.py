"""Tests of paired differences, the correction for multiple tests, and effect sizes."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dnpo.errors import DataError
from dnpo.stats.intervals import Array, still

DIGITS = 9  # significant digits of the largest difference; the rest is rounding error, which must not break ties
FLIPPED = 13  # with zeros or ties, scipy tries all signs of at most this many items


def mcnemar(only_a: int, only_b: int, variant: Literal["exact", "mid-p", "chi-square"] = "exact") -> float:
    """McNemar's two-sided p, from the numbers of items that only a or only b has right; 1 if the sides never differ.

    ``exact``: binomial (McNemar 1947); its error rate never exceeds the level. ``mid-p``: counts half of the observed
    outcome's probability; its error rate is nearer to the level and seldom above it. ``chi-square``: (b − c)²/(b + c),
    without a continuity correction. Fagerland, Lydersen and Laake (2013) compare the variants.

    Raises:
        DataError: a count is negative.
    """
    if min(only_a, only_b) < 0:
        raise DataError(f"McNemar's test needs counts of 0 or more; these are {only_a} and {only_b}")
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
    """McNemar's test for items answered under several seeds, where the answers to one item are not independent.

    With d the sum of an item's differences (−1, 0, 1), (Σ d)² / Σ d² is compared with χ² with one degree of freedom:
    Durkalski et al. (2003), Statistics in Medicine 22, for clusters of one size. With one seed it equals the chi-square
    variant of ``mcnemar``. It generalises to new items for the same runs, not to other seeds.
    """
    from scipy.stats import chi2

    item_I = difference_SI.sum(0)
    squares = float((item_I**2).sum())
    return float(chi2.sf(float(item_I.sum()) ** 2 / squares, 1)) if squares else 1.0


def wilcoxon(difference_I: Array) -> float:
    """The two-sided p of Wilcoxon's signed-rank test, by scipy.

    Zeros are ranked with the other differences and then left out (Pratt 1959), so every difference keeps its rank among
    all items; with very many zeros this approaches the sign test. The p is exact up to 50 items without zeros and ties
    and up to 13 with them, otherwise from a normal approximation that accounts for both. It is 1 if all differences are
    zero.
    """
    from scipy.stats import permutation_test
    from scipy.stats import wilcoxon as exact_or_normal

    largest = float(np.abs(difference_I).max(initial=0.0))
    rounded = np.round(difference_I / largest, DIGITS) if largest else difference_I
    if not rounded.any():
        return 1.0
    if len(rounded) <= FLIPPED and (np.diff(np.sort(np.abs(rounded)), prepend=0.0) == 0.0).any():  # zeros or ties
        found = permutation_test((rounded,), _positive_ranks, permutation_type="samples", vectorized=True)
    else:
        found = exact_or_normal(rounded, zero_method="pratt")
    return float(found.pvalue)


def _positive_ranks(difference_XI: Array, axis: int) -> Array:
    """The sum of the ranks of the positive differences in each row. scipy's function computes one row at a time."""
    from scipy.stats import rankdata

    sums_X: Array = np.where(difference_XI > 0, rankdata(np.abs(difference_XI), axis=axis), 0.0).sum(axis)
    return sums_X


def holm(ps: Sequence[float]) -> list[float]:
    """Adjust p values for multiple tests (Holm 1979): the running maximum of (m − i + 1) · p₍ᵢ₎, at most 1.

    If every adjusted p up to α is called significant, the probability of one or more false positives is at most α, for
    any dependence between the tests.

    Args:
        ps: p values; the adjusted ones have the same order.

    Raises:
        DataError: a value is not a probability.
    """
    _check(ps, "Holm's")
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min((len(ps) - rank) * ps[i], 1.0))
        adjusted[i] = least
    return adjusted


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """Adjust p values for multiple tests (Benjamini and Hochberg 1995): the least m · p₍ⱼ₎ / j over j ≥ i.

    If every adjusted p up to α is called significant, false positives are on average at most a share α of all
    positives, for tests that are independent or positively dependent.

    Args:
        ps: p values; the adjusted ones have the same order.

    Raises:
        DataError: a value is not a probability.
    """
    _check(ps, "Benjamini and Hochberg's")
    adjusted, most = [1.0] * len(ps), 1.0
    for rank, i in reversed(list(enumerate(sorted(range(len(ps)), key=ps.__getitem__), 1))):
        most = min(most, len(ps) * ps[i] / rank)
        adjusted[i] = most
    return adjusted


def _check(ps: Sequence[float], whose: str) -> None:
    if not all(0 <= p <= 1 for p in ps):  # NaN is neither
        raise DataError(f"{whose} correction needs p values between 0 and 1; these are {list(ps)}")


def cohens_dz(difference_I: Array) -> float | None:
    """Cohen's d_z: mean divided by standard deviation of paired differences (Cohen 1988, section 2.3.5).

    0.2 is small, 0.5 medium and 0.8 large. It is 0 if all differences are zero, and None if they are all equal but not
    zero.
    """
    if not difference_I.any():
        return 0.0
    if len(difference_I) < 2 or still(difference_I):
        return None
    return float(difference_I.mean() / difference_I.std(ddof=1))


def cohens_g(only_a: int, only_b: int) -> float:
    """Cohen's g: a's share of the items that only one side has right, minus one half (Cohen 1988, chapter 5).

    It is between −0.5 and 0.5; 0.05 is small, 0.15 medium and 0.25 large. It is 0 if the sides never differ.
    """
    return only_a / (only_a + only_b) - 0.5 if only_a + only_b else 0.0
