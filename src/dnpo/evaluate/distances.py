"""Distances between two samples of numbers, and the divergence of a policy from its reference, as pure functions.

Stagnation is measured on log-probabilities, summed or per token, of rejected and of newly generated responses under one
model: a small distance and a large overlap mean that generation no longer changes. All functions need finite numbers,
at least one on each side, and raise a DataError otherwise.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import ks_2samp, wasserstein_distance

from dnpo.errors import DataError

BINS = 30

Array = npt.NDArray[np.float64]


def ks(first: Any, second: Any) -> float:
    """The Kolmogorov-Smirnov distance: the largest difference between the two cumulative shares, 0 to 1.

    It has no unit. For samples without overlap it is 1 at any distance. For [1, 2, 3, 4] and [3, 4, 5, 6] it is 0.5:
    half of the first values are at most 2, and none of the second.
    """
    return float(ks_2samp(_sample("first", first), _sample("second", second)).statistic)


def wasserstein(first: Any, second: Any) -> float:
    """The Wasserstein-1 distance, in the unit of the values: the area between the two cumulative shares.

    For samples of equal size it is the mean |difference| of the sorted values: [1, 2, 3, 4] and [3, 4, 5, 6] are 2
    apart, [0] and [0, 3] are 1.5 apart.
    """
    return float(wasserstein_distance(_sample("first", first), _sample("second", second)))


def overlap(first: Any, second: Any, bins: int = BINS) -> float:
    """The area under both densities, 0 (no overlap) to 1 (equal), with histograms as densities.

    Σ_b min(p_b, q_b), where p_b and q_b are the shares of each sample in bin b (the overlapping coefficient: Inman and
    Bradley 1989, Communications in Statistics 18(10)). The bins are equally wide and span both samples; each includes
    its lower end, and the last one its upper end too. [0, 1, 2, 3] and [2, 3, 4, 5] in 5 bins share the bins of 2 and
    3, each with a quarter of either sample: 0.5.

    Two samples of the same distribution stay below 1; :func:`overlap_by_chance` computes by how much.

    Raises:
        DataError: also for fewer bins than one.
    """
    p_b, q_b, _ = _shares(first, second, bins)
    return float(np.minimum(p_b, q_b).sum())


def overlap_by_chance(first: Any, second: Any, bins: int = BINS) -> float:
    """The expected overlap of two samples of these sizes, if both came from the distribution of the pooled samples.

    1 − ½ Σ_b E|p_b − q_b|. The difference of two shares is approximately normal with variance v_b = r_b (1 − r_b) (1/n
    + 1/m), where r_b is the pooled share, so E|p_b − q_b| = √(2 v_b / π). For two samples of 1,000 over 30 equally full
    bins: 1 − ½ · 30 · √(2/π · 29/900 · 2/1000) = 0.904. The approximation needs a few values in most bins.

    Raises:
        DataError: also for fewer bins than one.
    """
    p_b, q_b, (n, m) = _shares(first, second, bins)
    r_b = (n * p_b + m * q_b) / (n + m)
    variance_b = r_b * (1 - r_b) * (1 / n + 1 / m)
    return 1 - float(np.sqrt(2 * variance_b / math.pi).sum()) / 2


class Divergence(NamedTuple):
    """A Kullback-Leibler divergence in nats with its standard errors, which are None for a single sequence."""

    sequence: float
    sequence_error: float | None
    token: float
    token_error: float | None


def kl(policy: Any, reference: Any, tokens: Any) -> Divergence:
    """KL(policy ‖ reference), estimated from sequences that the policy sampled.

    Per sequence it is the mean of d_i = log p(y_i) − log q(y_i), which is unbiased and can be negative by chance. Per
    token it is Σ d_i / Σ T_i; the mean of d_i / T_i would give short sequences the weight of long ones. The standard
    errors are s(d) / √N and, for the ratio R, s(d − R·T) / (√N · mean T) (Cochran 1977, "Sampling Techniques", section
    2.11). They assume independent sequences, one for each prompt.

    For log-probabilities −1, −2 and −4 against −2, −2 and −6 with 2, 1 and 3 tokens, d = 1, 0, 2. Per sequence that is
    1 ± 0.577; per token 3/6 = 0.5 ± 0.144, since d − T/2 = 0, −½, ½ with s = ½.

    Args:
        policy: log p of every sequence, summed over its tokens, under the policy that sampled it, at temperature 1 and
            without truncation of the distribution. Otherwise the estimate is not the divergence.
        reference: log q of the same sequences, in the same order.
        tokens: number of tokens of each sequence, 1 or more.

    Raises:
        DataError: also if the three have different lengths or a sequence has no tokens.
    """
    p_N, q_N, tokens_N = _sample("policy", policy), _sample("reference", reference), _sample("tokens", tokens)
    if not len(p_N) == len(q_N) == len(tokens_N):
        raise DataError(
            "a divergence needs the same sequences in policy, reference and tokens; there are "
            f"{len(p_N)}, {len(q_N)} and {len(tokens_N)}"
        )
    if (tokens_N < 1).any():
        raise DataError(
            f"sequence {int(np.argmax(tokens_N < 1))} (from 0) has no tokens; expected one or more for each"
        )
    d_N = p_N - q_N
    sequence, token = float(d_N.mean()), float(d_N.sum() / tokens_N.sum())
    per_token = _error(d_N - token * tokens_N)
    return Divergence(sequence, _error(d_N), token, None if per_token is None else per_token / float(tokens_N.mean()))


def _error(x_N: Array) -> float | None:
    """The standard error of the mean."""
    return float(x_N.std(ddof=1)) / math.sqrt(len(x_N)) if len(x_N) > 1 else None


def _shares(first: Any, second: Any, bins: int) -> tuple[Array, Array, tuple[int, int]]:
    """Each sample's shares in the common bins, and the sizes of the samples."""
    if bins < 1:
        raise DataError(f"bins={bins}: expected 1 or more")
    samples = _sample("first", first), _sample("second", second)
    low, high = min(map(np.min, samples)), max(map(np.max, samples))
    # numpy's histogram fails if the values are almost equal.
    wide = (high - low) or 1.0
    places = [np.minimum(((x - low) / wide * bins).astype(int), bins - 1) for x in samples]
    p_b, q_b = (np.bincount(at, minlength=bins) / len(at) for at in places)
    return p_b, q_b, (len(samples[0]), len(samples[1]))


def _sample(name: str, values: Any) -> Array:
    try:
        array = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected a list of numbers ({error})") from error
    if array.ndim != 1 or not array.size:
        raise DataError(f"{name}: expected a list of numbers, one or more; the shape is {array.shape}")
    if not np.isfinite(array).all():
        place = int(np.argmin(np.isfinite(array)))
        raise DataError(f"{name}: number {place} (from 0) is {array[place]}; expected finite numbers")
    return array
