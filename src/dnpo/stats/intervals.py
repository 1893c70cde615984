"""Means of scores over items and seeds, with intervals from a bootstrap or a t distribution.

**t** (``estimate_mean``): one model of crossed random effects gives the interval and the p of a test, so the two cannot
contradict each other. It assumes that means are approximately normal. Its intervals are wide if there are few seeds.

**Bootstrap** (``bootstrap``): resamples items and, if there are several, seeds. It assumes no distribution. With few
seeds its intervals are too narrow if seeds vary more than items, for any number of resamples: three seeds can be drawn
in only ten different ways (``tests/test_comparisons.py`` measures the effect).

Shapes: S seeds, I items, K different columns of items, B resamples, X sides, Q quantiles.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 10_000
TOLERANCE = 1e-12  # relative to the largest number
BATCH = 4_000_000  # weights at once: 32 MB
QUANTILES = 2_000  # of a standard error's distribution, over which averages are taken

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; the ends are None if they cannot be computed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half of the interval's width, shown after ±. A percentile interval need not be symmetric."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error and the error's degrees of freedom; the error is 0 if nothing varies."""

    value: float
    error: float
    df: float

    def estimate(self) -> Estimate:
        """The mean with its t interval; without an interval if nothing varies."""
        if self.error == 0:
            return Estimate(self.value)
        from scipy.special import stdtrit  # Student's quantiles

        wide = float(stdtrit(self.df, (1 + LEVEL) / 2)) * self.error
        return Estimate(self.value, self.value - wide, self.value + wide)

    def share(self, items: int) -> Estimate:
        """A share with Wilson's interval, which lies between 0 and 1.

        Wilson (1927), with t instead of normal quantiles and with the effective number of independent answers,
        n = v(1 − v)/error², as Korn and Graubard (1998), "Confidence intervals for proportions with small expected
        number of positive counts estimated from survey data", Survey Methodology 24(2), count clustered answers.

        Args:
            items: number of items, which is n for a share of exactly 0 or 1. Any other share has no interval if its
                error is 0 because nothing varies.
        """
        from scipy.special import stdtrit

        spread = self.value * (1 - self.value)
        whole = spread <= TOLERANCE  # a share of 0 or 1
        if self.error == 0 and not whole:
            return Estimate(self.value)
        quantile = float(stdtrit(max(items - 1, 1) if whole else self.df, (1 + LEVEL) / 2))
        a = quantile**2 / items if whole else (quantile * self.error) ** 2 / spread  # quantile² / n
        half = math.sqrt(a * max(spread, 0.0) + a**2 / 4) / (1 + a)
        centre = (self.value + a / 2) / (1 + a)
        return Estimate(self.value, min(max(centre - half, 0.0), self.value), max(min(centre + half, 1.0), self.value))

    def amount(self) -> Estimate:
        """A quantity that cannot be negative, with the t interval of its logarithm, so that no end is negative.

        The logarithm's error is error/value (the delta method). There is no interval if nothing varies.
        """
        from scipy.special import stdtrit

        if self.value <= 0 or self.error == 0:
            return self.estimate()
        factor = math.exp(min(float(stdtrit(self.df, (1 + LEVEL) / 2)) * self.error / self.value, 700.0))
        return Estimate(self.value, self.value / factor, self.value * factor)

    def p(self, bound: float = 0.0) -> float:
        """The p of a two-sided t test against a bound: at most 0.05 if and only if the interval excludes the bound.

        1 if nothing varies, since equal numbers say nothing about further numbers.
        """
        if self.error == 0:
            return 1.0
        from scipy.special import stdtr  # Student's distribution

        return float(2 * stdtr(self.df, -abs(self.value - bound) / self.error))

    def detectable(self, alpha: float = 0.05, power: float = 0.8, negligible: float = 0.0) -> float:
        """The smallest true mean that a two-sided test at level ``alpha`` detects with this power.

        With many degrees of freedom and α = 0.05 this approaches 2.80 · standard error.

        Args:
            negligible: a mean does not count as detected if its interval, of level 1 − ``alpha``, lies within ± this.
        """
        if self.error == 0:
            return 0.0
        if not negligible:
            from scipy.special import nctdtrinc, stdtrit  # the noncentral t in closed form

            return float(nctdtrinc(self.df, 1 - power, stdtrit(self.df, 1 - alpha / 2))) * self.error
        from scipy.optimize import brentq

        most = negligible + self.error
        while self.power(most, alpha, negligible) < power:
            most *= 2
        return float(brentq(lambda effect: self.power(effect, alpha, negligible) - power, 0.0, most))

    def power(self, effect: float, alpha: float = 0.05, negligible: float = 0.0) -> float:
        """The probability that a true mean of this size is detected, with its sign; arguments as in :meth:`detectable`.

        The mean is normal with the standard error, whose estimate s has a χ² distribution: P(mean > s · t_{1−α/2}),
        averaged over s, is the upper tail of a noncentral t.
        """
        if self.error == 0:
            return 0.0
        from scipy.special import ndtr

        half_Q = self._half_widths(alpha)
        least_Q = np.maximum(half_Q, negligible - half_Q)
        return float(ndtr((abs(effect) - least_Q) / self.error).mean())

    def power_of_equivalence(self, bound: float, alpha: float = 0.05) -> float:
        """The probability that the interval of level 1 − ``alpha`` lies within ± ``bound`` if the true mean is 0."""
        if self.error == 0:
            return 0.0
        from scipy.special import ndtr

        room_Q = np.maximum(bound - self._half_widths(alpha), 0.0)
        return float((2 * ndtr(room_Q / self.error) - 1).mean())

    def _half_widths(self, alpha: float) -> Array:
        """Half the width of intervals of level 1 − ``alpha``, at ``QUANTILES`` quantiles of their distribution."""
        from scipy.special import chdtri, stdtrit

        shares_Q = (np.arange(QUANTILES) + 0.5) / QUANTILES
        estimates_Q = self.error * np.sqrt(chdtri(self.df, shares_Q) / self.df)
        half_Q: Array = float(stdtrit(self.df, 1 - alpha / 2)) * estimates_Q
        return half_Q


@dataclass(frozen=True)
class Components:
    """Variances of values x_si = μ + seed s + item i + rest, crossed random effects.

    Attributes:
        seeds: variance of the seeds' effects; with one value for each seed, the variance of these values.
        items: variance of the items' effects.
        rest: variance of what remains, the interaction of seed and item.
    """

    seeds: float
    items: float
    rest: float

    def mean(self, seeds: int, items: int, value: float = 0.0) -> Mean:
        """The mean over these numbers of seeds and items, with its expected error and degrees of freedom."""
        rest = self.rest / (seeds * items)
        by_seed, by_item = self.seeds / seeds + rest, self.items / items + rest
        return _crossed(value, by_seed, by_item, rest, seeds, items)


def estimate_mean(x_SI: Array) -> Mean | None:
    """Estimate the mean over items and seeds. Both are samples, so the interval generalises to new items and seeds.

    Crossed random effects of seeds and items: with V₁ the variance of the mean computed from the seeds' means, V₂ from
    the items' means, and V₁₂ from the residuals, which affect both, the error is √(V₁ + V₂ − V₁₂) and the degrees of
    freedom are Satterthwaite's, (V₁ + V₂ − V₁₂)² / (V₁²/(S−1) + V₂²/(I−1) + V₁₂²/((S−1)(I−1))). V₁ + V₂ − V₁₂
    is below both V₁ and V₂ only by random error, so the variance is at least the smaller of the two, and the degrees of
    freedom are at least the smaller of S−1 and I−1.

    ``benchmarks/claims_power.py`` simulates the size of the test: nominally 5 %, it is 3.5 to 6.5 % with 5 to 12 seeds;
    with three seeds it is up to 7.6 % where seeds and items vary equally.

    With one seed the variance is V₂ alone (the one-sample t test over items); with one item it cannot be computed, and
    the result is None.
    """
    seeds, items = x_SI.shape
    if items < 2:
        return None
    value, by_item = float(x_SI.mean()), _variance_of_mean(x_SI.mean(0))
    if seeds == 1:
        return Mean(value, math.sqrt(by_item), items - 1)
    by_seed = _variance_of_mean(x_SI.mean(1))
    rest = _squares_of_residuals(x_SI) / ((seeds - 1) * (items - 1) * seeds * items)
    return _crossed(value, by_seed, by_item, rest, seeds, items)


def estimate_components(x_SI: Array) -> Components:
    """Estimate the variances of seeds, items and the rest, by equating mean squares; a negative estimate is 0.

    With one column, the values by seed, there is only the variance of seeds.
    """
    seeds, items = x_SI.shape
    if items == 1:
        return Components(_variance(x_SI[:, 0]), 0.0, 0.0)
    rest = _squares_of_residuals(x_SI) / ((seeds - 1) * (items - 1))
    by_seed, by_item = _variance(x_SI.mean(1)), _variance(x_SI.mean(0))
    return Components(max(by_seed - rest / items, 0.0), max(by_item - rest / seeds, 0.0), rest)


def _crossed(value: float, by_seed: float, by_item: float, rest: float, seeds: int, items: int) -> Mean:
    """The mean of crossed random effects, from the variances V₁, V₂ and V₁₂ of the mean."""
    df_seed, df_item = seeds - 1, items - 1
    if items == 1:
        return Mean(value, math.sqrt(by_seed), df_seed)
    fewest = float(min(df_seed, df_item))
    whole = max(by_seed + by_item - rest, min(by_seed, by_item))
    below = by_seed**2 / df_seed + by_item**2 / df_item + rest**2 / (df_seed * df_item)
    return Mean(value, math.sqrt(whole), max(whole**2 / below, fewest) if whole else fewest)


@dataclass(frozen=True)
class Unvaried:
    """A mean of equal values, with an exact bound instead of a standard error.

    If a share π of all units differs from the others, ``units`` units are alike with probability (1 − π)^units. So π is
    at most 1 − 0.05^(1/units) with 95 % confidence (Clopper and Pearson 1934, for 0 of ``units``), and the mean is
    within π · (low − value) and π · (high − value) of the value. Units count as independent.

    Attributes:
        low, high: the least and the largest possible value of a unit.
        units: the number of units, such as answers or training steps.
    """

    value: float
    low: float
    high: float
    units: int

    def estimate(self) -> Estimate:
        """The value with its exact interval."""
        share = 1 - (1 - LEVEL) ** (1 / self.units)
        return Estimate(self.value, *(self.value + share * (end - self.value) for end in (self.low, self.high)))

    def p(self, bound: float = 0.0) -> float:
        """The probability that all units are alike if the mean is at the bound, or beyond it."""
        if bound == self.value:
            return 1.0
        end = self.high if bound > self.value else self.low
        share = (bound - self.value) / (end - self.value) if end != self.value else math.inf
        return float((1 - share) ** self.units) if share < 1 else 0.0


def still(x: Array) -> bool:
    """Whether all numbers are equal, up to the rounding errors of means."""
    return bool(np.ptp(x) <= TOLERANCE * np.abs(x).max())


def _variance(x: Array) -> float:
    return 0.0 if still(x) else float(x.var(ddof=1))


def _variance_of_mean(x: Array) -> float:
    return _variance(x) / len(x)


def _squares_of_residuals(x_SI: Array) -> float:
    """The sum of squares of what is neither the seed's nor the item's effect; 0 if these are rounding errors."""
    residuals_SI = x_SI - x_SI.mean(0) - x_SI.mean(1, keepdims=True) + x_SI.mean()
    scale = TOLERANCE * float(np.abs(x_SI).max())
    return float((residuals_SI**2).sum()) if float(np.abs(residuals_SI).max()) > scale else 0.0


def bootstrap(x_XSI: Array, seed: int, resamples: int = RESAMPLES) -> Array:
    """Means of bootstrap resamples, the same resamples for all sides. Shape B × X.

    Items and seeds are drawn with replacement, independently of each other because every seed has the same items (Owen
    2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)). With one seed it is Efron's bootstrap over
    items.

    Items with equal results on every side and under every seed are drawn together, as one category of a multinomial.
    The distribution is the same, and a million right and wrong answers cost no more than four.
    """
    sides, seeds, items = x_XSI.shape
    alike, counts = np.unique(x_XSI.reshape(-1, items), axis=1, return_counts=True)
    x_XSK = alike.reshape(sides, seeds, -1)
    rng = np.random.default_rng(seed)
    means = []
    size = max(BATCH // len(counts), 1)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        items_BK = _multinomial(rng, counts, count) / items
        seeds_BS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        means.append(np.stack([((seeds_BS @ x_SK) * items_BK).sum(1) for x_SK in x_XSK], axis=1))
    drawn: Array = np.concatenate(means)
    return drawn


def _multinomial(rng: np.random.Generator, counts_K: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """How often each kind is drawn in a resample of all items. Shape size × K."""
    items, kinds = int(counts_K.sum()), len(counts_K)
    if kinds < items:
        return rng.multinomial(items, counts_K / items, size=size)
    # if all items differ, counting single draws is several times faster
    drawn = rng.integers(0, kinds, (size, items)) + np.arange(size)[:, None] * kinds
    return np.bincount(drawn.ravel(), minlength=size * kinds).reshape(size, kinds)


def percentiles(value: float, drawn_B: Array) -> Estimate:
    """The percentile interval of a bootstrap (Efron 1979)."""
    low, high = np.percentile(drawn_B, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value, float(low), float(high))
