"""How far apart two samples of numbers are, and a policy from its reference: pure functions of arrays.

For stagnation the numbers are log-probabilities, summed or per token, of rejected and of newly generated responses
under one model: a small distance and a large overlap mean that generation no longer changes. All functions take
finite numbers, at least one on each side, and raise a DataError otherwise.
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

    It has no unit and does not say how far apart values lie: 1 as soon as the samples are apart. [1, 2, 3, 4] and
    [3, 4, 5, 6]: up to 2 lies half of the first and none of the second, 0.5.
    """
    return float(ks_2samp(_sample("first", first), _sample("second", second)).statistic)


def wasserstein(first: Any, second: Any) -> float:
    """The Wasserstein-1 distance, in the unit of the values: the area between the two cumulative shares.

    With as many values on both sides it is the mean of |difference| after sorting each: [1, 2, 3, 4] and [3, 4, 5, 6]
    are 2 apart; [0] and [0, 3] are 1.5.
    """
    return float(wasserstein_distance(_sample("first", first), _sample("second", second)))


def overlap(first: Any, second: Any, bins: int = BINS) -> float:
    """The area under both densities, 0 (apart) to 1 (the same), with histograms as densities.

    Σ_b min(p_b, q_b), where p_b and q_b are the shares of each sample in bin b (the overlapping coefficient: Inman and
    Bradley 1989, Communications in Statistics 18(10)). The bins are equally wide, lie between the smallest and the
    largest value of both samples and hold their lower end, the last one both. [0, 1, 2, 3] and [2, 3, 4, 5] in 5 bins
    share the bins of 2 and 3, which hold a quarter of each: 0.5.

    Two samples of one distribution stay below 1, as :func:`overlap_by_chance` says.

    Raises:
        DataError: also for fewer bins than one.
    """
    p_b, q_b, _ = _shares(first, second, bins)
    return float(np.minimum(p_b, q_b).sum())


def overlap_by_chance(first: Any, second: Any, bins: int = BINS) -> float:
    """The overlap to be expected if both samples were drawn from one distribution, that of both taken together.

    1 − ½ Σ_b E|p_b − q_b|, and the difference of two shares is about normal with variance v_b = r_b (1 − r_b) (1/n +
    1/m), r_b the common share, so that E|p_b − q_b| = √(2 v_b / π). Two samples of 1,000 over 30 equally full bins:
    1 − ½ · 30 · √(2/π · 29/900 · 2/1000) = 0.904. It needs a few values in most bins.

    Raises:
        DataError: also for fewer bins than one.
    """
    p_b, q_b, (n, m) = _shares(first, second, bins)
    r_b = (n * p_b + m * q_b) / (n + m)
    variance_b = r_b * (1 - r_b) * (1 / n + 1 / m)
    return 1 - float(np.sqrt(2 * variance_b / math.pi).sum()) / 2


class Divergence(NamedTuple):
    """A Kullback-Leibler divergence in nats with its standard errors, None for one sequence alone."""

    sequence: float
    sequence_error: float | None
    token: float
    token_error: float | None


def kl(policy: Any, reference: Any, tokens: Any) -> Divergence:
    """KL(policy ‖ reference), estimated from sequences that the policy sampled.

    Per sequence it is the mean of d_i = log p(y_i) − log q(y_i): without bias, and negative at times by chance. Per
    token it is Σ d_i / Σ T_i, which is not the mean of d_i / T_i, where short sequences would weigh as much as long
    ones. The standard errors are s(d) / √N and, for the ratio R, s(d − R·T) / (√N · mean T) (Cochran 1977, "Sampling
    Techniques", section 2.11).

    Log-probabilities −1, −2 and −4 against −2, −2 and −6 with 2, 1 and 3 tokens: d = 1, 0, 2; a sequence 1 ± 0.577; a
    token 3/6 = 0.5 ± 0.144, since d − T/2 = 0, −½, ½ with s = ½.

    Args:
        policy: log p of every sequence, summed over its tokens, under the policy as it sampled: at temperature 1 and
            with no token left out. Otherwise the samples are not the policy's and this is no divergence.
        reference: log q of the same sequences, in the same order.
        tokens: how many each has, 1 or more.

    The errors take sequences as independent: one a prompt.

    Raises:
        DataError: also where the three are not equally many or a sequence has no tokens.
    """
    p_N, q_N, tokens_N = _sample("policy", policy), _sample("reference", reference), _sample("tokens", tokens)
    if not len(p_N) == len(q_N) == len(tokens_N):
        raise DataError(
            "a divergence needs the same sequences throughout; policy, reference and tokens are "
            f"{len(p_N)}, {len(q_N)} and {len(tokens_N)}"
        )
    if (tokens_N < 1).any():
        raise DataError(f"sequence {int(np.argmax(tokens_N < 1))} (from 0) has no tokens; expected one or more of each")
    d_N = p_N - q_N
    sequence, token = float(d_N.mean()), float(d_N.sum() / tokens_N.sum())
    per_token = _error(d_N - token * tokens_N)
    return Divergence(sequence, _error(d_N), token, None if per_token is None else per_token / float(tokens_N.mean()))


def _error(x_N: Array) -> float | None:
    """The standard error of the mean."""
    return float(x_N.std(ddof=1)) / math.sqrt(len(x_N)) if len(x_N) > 1 else None


def _shares(first: Any, second: Any, bins: int) -> tuple[Array, Array, tuple[int, int]]:
    """Each sample's shares of the common bins, and how many values there are."""
    if bins < 1:
        raise DataError(f"bins={bins}: expected 1 or more")
    samples = _sample("first", first), _sample("second", second)
    low, high = min(map(np.min, samples)), max(map(np.max, samples))
    # Not numpy's histogram, which fails where the values are almost the same.
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
