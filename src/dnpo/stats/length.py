"""The win rate that a side would have if both sides' responses had the same length.

Judges, and people, prefer longer responses, so a model can win by writing more. AlpacaEval 2 (Dubois et al. 2024,
"Length-controlled AlpacaEval: a simple way to debias automatic evaluators", equation 2) regresses the preference on the
difference in length and predicts it for a difference of 0. Its term for the difficulty of each instruction is left out
here: it is estimated from many models, and a duel has two.

Shapes: D duels, K different differences in length, P prompts, B resamples.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.special import expit, logit

from dnpo.errors import DataError
from dnpo.seeding import derive
from dnpo.stats.intervals import RESAMPLES, Array, Estimate, percentiles
from dnpo.stats.wins import number_labels

ROUNDS = 200  # of Newton's method; five or six are enough unless length decides nearly every duel
PRECISION = 1e-10  # of θ and φ
BATCH = 2_000_000  # numbers at once
MOST = 0.95  # share of the resamples that must give a win rate; with fewer there is no interval

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LengthControlled:
    """A win rate without the effect of length.

    Attributes:
        rate: at equal length, with a 95 % interval over prompts.
        effect: φ, the coefficient of tanh(difference / spread), in log-odds; positive if longer responses win more.
        spread: standard deviation of the differences in length.
        difference: mean difference in length, ours − theirs.
        notes: caveats to report with the numbers.
    """

    rate: Estimate
    effect: float
    spread: float
    difference: float
    duels: int
    prompts: int
    notes: tuple[str, ...]


def control_length(
    preferences: Sequence[float | None],
    differences: Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> LengthControlled:
    """The win rate at equal length: σ(θ) of the logistic regression

        P(ours is preferred | Δ) = σ(θ + φ · tanh(Δ / s)),   Δ = our length − theirs,  s = standard deviation of Δ,

    whose θ and φ maximise Σ y log P + (1 − y) log(1 − P) over the duels: y is 1 for a win, 0 for a loss and ½ for a
    tie. Dividing by s makes the unit of length irrelevant, and tanh keeps a few very long responses from dominating φ.
    The mean of the fitted probabilities is that of y, so if length has no effect the result is the plain win rate.

    Example: in 75 of 100 duels our response is 10 characters longer, and 60 of these are won; in 25 it is 10 shorter,
    and 5 are won. Both kinds are fitted exactly, σ(θ + φt) = 0.8 and σ(θ − φt) = 0.2 (t = tanh(10/√75) = 0.819), so
    θ = 0 and φ = 1.692: the win rate of 65 % is 50 % at equal length.

    The bootstrap resamples prompts, each with all its duels, and keeps s. Where length alone decides every duel of a
    resample, the likelihood has no maximum and the limit is taken: at equal length always a win, always a loss, or the
    rate of the duels of equal length. Where the limit is undetermined, the resample is left out and counted.

    Args:
        preferences: 1, ½ or 0 for each duel; None leaves the duel out.
        differences: our length − theirs for each duel, in any unit.
        prompts: prompt of each duel; None: every duel has a different prompt.
        seed: seed of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        DataError: the lists are not aligned, a value is out of range, no duel is left, all differ in length by the same
            amount, or length alone decides every duel, so that the rate at equal length is unknown.
    """
    prompts = range(len(preferences)) if prompts is None else prompts
    value_D, delta_D, at_D, number = _check(preferences, differences, prompts)
    notes = _notes(len(preferences) - len(value_D), len(preferences), number, float(value_D.mean()))
    spread = float(delta_D.std())
    if not spread and delta_D[0]:
        raise DataError(f"all differences in length are {delta_D[0]:g}: the effect of length cannot be estimated")
    kinds_K, kind_D = np.unique(delta_D, return_inverse=True)
    x_K = np.tanh(kinds_K / (spread or 1.0))
    shape = (number, len(x_K))
    won_PK = csr_array((value_D, (at_D, kind_D)), shape=shape)
    lost_PK = csr_array((1 - value_D, (at_D, kind_D)), shape=shape)
    won_1K, lost_1K = (_weigh(np.ones((1, number)), x_PK) for x_PK in (won_PK, lost_PK))
    mixed = bool(won_1K.any() and lost_1K.any())
    if spread and mixed and _separates(won_1K, lost_1K)[0]:
        raise DataError(
            f"length alone decides all {len(value_D):,} duels: on one side of some difference in length all are won, "
            "on the other all are lost, so the win rate at the same length is unknown"
        )
    (rate,), (effect,) = fit(x_K, won_1K, lost_1K)
    if np.isnan(rate):
        longer = "longer" if x_K[0] > 0 else "shorter"
        raise DataError(
            f"one side won all {len(value_D):,} duels, and all of our responses are {longer}, so the win rate at the "
            "same length is unknown"
        )
    estimate = Estimate(float(rate))
    if number > 1:
        drawn_B = _bootstrap(x_K, won_PK, lost_PK, derive(seed, "comparisons", "length"), resamples)
        rate_B = drawn_B[~np.isnan(drawn_B)]
        if len(rate_B) < resamples:
            notes.append(f"{resamples - len(rate_B):,} of {resamples:,} resamples give no win rate at the same length")
        if len(rate_B) < MOST * resamples:
            notes.append("these are too many for an interval")
        else:
            estimate = percentiles(float(rate), rate_B)
    return LengthControlled(estimate, float(effect), spread, float(delta_D.mean()), len(value_D), number, tuple(notes))


def fit(x_K: Array, won_BK: Array, lost_BK: Array) -> tuple[Array, Array]:
    """Fit many regressions at once by Newton's method.

    Args:
        x_K: the different values of tanh(Δ / s), ascending.
        won_BK, lost_BK: numbers of duels won and lost at each value; a tie counts half for either.

    Returns:
        σ(θ) and φ, each of shape B. Where the likelihood has no maximum, the limit of σ(θ), or NaN if there is none,
        and 0 for φ.
    """
    won_B, lost_B = won_BK.sum(1), lost_BK.sum(1)
    rates_B, effects_B = won_B / (won_B + lost_B), np.zeros(len(won_BK))
    separated_B = (won_B == 0) | (lost_B == 0) | _separates(won_BK, lost_BK)
    for b in np.flatnonzero(separated_B):
        rates_B[b] = _limit(x_K, won_BK[b], lost_BK[b])
    left = np.flatnonzero(~separated_B)
    theta_B, phi_B, going = logit(rates_B[left]), np.zeros(len(left)), np.arange(len(left))
    for _ in range(ROUNDS):
        if not len(going):
            break
        some = left[going]
        theta, phi = _newton(x_K, won_BK[some], lost_BK[some], theta_B[going], phi_B[going])
        theta_B[going] += theta
        phi_B[going] += phi
        going = going[np.abs(theta) + np.abs(phi) > PRECISION]
    rates_B[left], effects_B[left] = expit(theta_B), phi_B
    return rates_B, effects_B


def _newton(x_K: Array, won_BK: Array, lost_BK: Array, theta_B: Array, phi_B: Array) -> tuple[Array, Array]:
    """The changes of θ and φ in one round, limited to 1 in log-odds so that the likelihood never falls."""
    total_BK = won_BK + lost_BK
    p_BK = expit(theta_B[:, None] + phi_B[:, None] * x_K)
    off_BK, curve_BK = won_BK - total_BK * p_BK, total_BK * p_BK * (1 - p_BK)
    slope_0, slope_1 = off_BK.sum(1), off_BK @ x_K
    curve_00, curve_01, curve_11 = curve_BK.sum(1), curve_BK @ x_K, curve_BK @ x_K**2
    determinant = np.maximum(curve_00 * curve_11 - curve_01**2, np.finfo(float).tiny)
    theta = (curve_11 * slope_0 - curve_01 * slope_1) / determinant
    phi = (curve_00 * slope_1 - curve_01 * slope_0) / determinant
    shrink = 1 / np.maximum(np.abs(theta) + np.abs(phi), 1.0)
    return theta * shrink, phi * shrink


def _separates(won_BK: Array, lost_BK: Array) -> Flags:
    """Whether some length separates all won duels from all lost ones; at that length both may occur. Shape B.

    The likelihood has no maximum in this case, and only in this case (Albert and Anderson 1984).
    """
    last = won_BK.shape[1] - 1
    won, lost = won_BK > 0, lost_BK > 0
    first_won, last_won = won.argmax(1), last - won[:, ::-1].argmax(1)
    first_lost, last_lost = lost.argmax(1), last - lost[:, ::-1].argmax(1)
    separated: Flags = (last_lost <= first_won) | (last_won <= first_lost)
    return separated


def _limit(x_K: Array, won_K: Array, lost_K: Array) -> float:
    """The limit of σ(θ) where length decides every duel; NaN if it is undetermined."""
    won, lost = x_K[won_K > 0], x_K[lost_K > 0]
    if not len(won) or not len(lost):  # equal length lies between the lengths that occur, or beyond them
        every = (won, lost)[len(lost) > 0]
        return float(len(won) > 0) if every.min() <= 0 <= every.max() else np.nan
    longer_wins, shorter_wins = lost.max() <= won.min(), won.max() <= lost.min()
    if not longer_wins:
        return 1.0 - _limit(x_K, lost_K, won_K)
    below, above = float(lost.max()), float(won.min())
    if below == above == 0:
        here = x_K == 0
        return float(won_K[here].sum() / (won_K[here] + lost_K[here]).sum())
    if shorter_wins:
        return np.nan  # a single difference in length
    return 1.0 if above <= 0 else 0.0 if below >= 0 else np.nan


def _bootstrap(x_K: Array, won_PK: csr_array, lost_PK: csr_array, seed: int, resamples: int) -> Array:
    """σ(θ) of bootstrap resamples. Shape B."""
    rng, number = np.random.default_rng(seed), won_PK.shape[0]
    size = max(BATCH // max(number, len(x_K)), 1)
    rates = []
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        drawn = rng.integers(0, number, (count, number)) + np.arange(count)[:, None] * number
        weights_BP = np.bincount(drawn.ravel(), minlength=count * number).reshape(count, number).astype(float)
        rates.append(fit(x_K, _weigh(weights_BP, won_PK), _weigh(weights_BP, lost_PK))[0])
    everything: Array = np.concatenate(rates)
    return everything


def _weigh(weights_BP: Array, x_PK: csr_array) -> Array:
    sums: Array = weights_BP @ x_PK
    return sums


def _check(
    preferences: Sequence[float | None], differences: Sequence[float], prompts: Sequence[Hashable]
) -> tuple[Array, Array, npt.NDArray[np.int64], int]:
    """Values, differences and prompt numbers of the duels with a preference, and the number of prompts."""
    if not len(preferences) == len(differences) == len(prompts):
        lengths = f"{len(preferences)}, {len(differences)} and {len(prompts)}"
        raise DataError(f"each duel needs a preference, a difference in length and a prompt; there are {lengths}")
    duels = [(v, d, p) for v, d, p in zip(preferences, differences, prompts, strict=True) if v is not None]
    if not duels:
        raise DataError(f"none of {len(preferences)} duels has a preference; nothing is left to compare")
    value_D, delta_D = (np.array([row[column] for row in duels], dtype=np.float64) for column in (0, 1))
    if not ((value_D >= 0) & (value_D <= 1)).all():
        raise DataError("preferences must be between 0 and 1")
    if not np.isfinite(delta_D).all():
        raise DataError("a difference in length is not a finite number")
    return value_D, delta_D, *number_labels([prompt for _, _, prompt in duels])


def _notes(dropped: int, total: int, number: int, plain: float) -> list[str]:
    notes = [f"{dropped:,} of {total:,} duels have no preference and are left out"] if dropped else []
    notes += ["one prompt: no interval"] if number == 1 else []
    return notes + (["one side won every duel, at any length"] if plain in (0.0, 1.0) else [])
