"""Means of scores over items and seeds, with intervals from a bootstrap or a t distribution.

**Bootstrap** (``bootstrap``): resamples items and, if there are several, seeds; assumes no distribution. With few
seeds it is too narrow if seeds vary more than items, for any number of resamples: three seeds can be drawn in
only ten different ways (``tests/test_comparisons.py`` measures the effect).

**t** (``estimate_mean``): assumes means that are approximately normal; its intervals are wide if seeds are few.

Shapes: S seeds, I items, K different columns of items, B resamples, X sides.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
RESAMPLES = 10_000
TOLERANCE = 1e-12  # of the largest number
BATCH = 4_000_000  # weights at once: 32 MB

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
    """A mean with its standard error and the error's degrees of freedom."""

    value: float
    error: float
    df: float

    def estimate(self) -> Estimate:
        """The mean with its t interval."""
        from scipy.special import stdtrit  # Student's quantiles

        wide = float(stdtrit(self.df, (1 + LEVEL) / 2)) * self.error
        return Estimate(self.value, self.value - wide, self.value + wide)

    def share(self, items: int) -> Estimate:
        """A share with Wilson's interval, which lies between 0 and 1.

        Wilson (1927), with t instead of normal quantiles and with the effective number of independent answers,
        n = v(1 − v)/error², as Korn and Graubard (1998), "Confidence intervals for proportions with small expected
        number of positive counts estimated from survey data", Survey Methodology 24(2), count clustered answers.

        Args:
            items: number of items, which is n for a share of exactly 0 or 1.
        """
        from scipy.special import stdtrit

        spread = self.value * (1 - self.value)
        whole = spread <= TOLERANCE  # a share of 0 or 1
        quantile = float(stdtrit(max(items - 1, 1) if whole else self.df, (1 + LEVEL) / 2))
        a = quantile**2 / items if whole else (quantile * self.error) ** 2 / spread  # quantile² / n
        half = math.sqrt(a * max(spread, 0.0) + a**2 / 4) / (1 + a)
        centre = (self.value + a / 2) / (1 + a)
        return Estimate(self.value, min(max(centre - half, 0.0), self.value), max(min(centre + half, 1.0), self.value))

    def amount(self) -> Estimate:
        """A quantity that cannot be negative, with the t interval of its logarithm, so that no end is negative.

        The logarithm's error is error/value (the delta method). If the mean is 0, all values are 0.
        """
        from scipy.special import stdtrit

        if self.value <= 0:
            return self.estimate()
        factor = math.exp(min(float(stdtrit(self.df, (1 + LEVEL) / 2)) * self.error / self.value, 700.0))
        return Estimate(self.value, self.value / factor, self.value * factor)

    def p(self) -> float:
        """The p of a two-sided t test against 0; 1 if the mean is exactly 0."""
        if self.error == 0:
            return float(self.value == 0)
        from scipy.special import stdtr  # Student's distribution

        return float(2 * stdtr(self.df, -abs(self.value) / self.error))

    def detectable(self, alpha: float = 0.05, power: float = 0.8) -> float:
        """The smallest true mean that a two-sided test at level ``alpha`` detects with this power.

        (t_{1−α/2} + t_{power}) · standard error (Bloom 1995, "Minimum detectable effects", Evaluation Review 19(5)).
        With many degrees of freedom this approaches 2.80 · standard error.
        """
        from scipy.special import stdtrit

        return float(stdtrit(self.df, 1 - alpha / 2) + stdtrit(self.df, power)) * self.error


def estimate_mean(x_SI: Array) -> Mean | None:
    """Estimate the mean over items and seeds. Both are samples, so the interval generalises to new items and seeds.

    Clark (1973), "The language-as-fixed-effect fallacy": with V₁ the variance of the mean computed from the items'
    means and V₂ the one computed from the seeds' means, the error is √(V₁ + V₂) and the degrees of freedom are
    Satterthwaite's, (V₁ + V₂)² / (V₁²/(I−1) + V₂²/(S−1)). The square of mean/error is min F′ = F₁F₂/(F₁ + F₂). The
    interaction of items and seeds is counted twice, so the error is too large rather than too small. With one seed the
    variance is V₁ alone (the one-sample t test); with one item V₁ cannot be computed, and the result is None.
    """
    if x_SI.shape[1] < 2:
        return None
    parts = [_variance_of_mean(x_SI.mean(axis)) for axis in (0, 1) if x_SI.shape[1 - axis] > 1]
    whole = sum(v for v, _ in parts)
    below = sum(v**2 / df for v, df in parts)
    # Without variance the degrees of freedom make no difference; take the fewest.
    df = whole**2 / below if below else float(min(df for _, df in parts))
    return Mean(float(x_SI.mean()), math.sqrt(whole), df)


def still(x: Array) -> bool:
    """Whether all numbers are equal, up to the rounding errors of means."""
    return bool(np.ptp(x) <= TOLERANCE * np.abs(x).max())


def _variance_of_mean(x: Array) -> tuple[float, int]:
    if still(x):
        return 0.0, len(x) - 1
    return float(x.var(ddof=1)) / len(x), len(x) - 1


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
