"""The win rate that two sides would have with responses of the same length.

Judges, and people, prefer longer responses, so a model can win by writing more. AlpacaEval 2 (Dubois et al. 2024,
"Length-controlled AlpacaEval: a simple way to debias automatic evaluators", equation 2) regresses the preference on the
difference in length and then asks what it would be without one. Its term for the difficulty of each instruction is left
out: it is estimated from many models, and here there are two.

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

ROUNDS = 200  # of Newton's method; five or six do, but where length decides nearly all
PRECISION = 1e-10  # of θ and φ
BATCH = 2_000_000  # numbers at once
MOST = 0.95  # of the resamples have to say something, or there is no interval

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LengthControlled:
    """A win rate without the effect of length.

    Attributes:
        rate: at equal length, with a 95 % interval over prompts.
        effect: φ, of tanh(difference / spread), in log-odds: positive where the longer response is preferred.
        spread: standard deviation of the differences in length.
        difference: their mean, ours less theirs.
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
    tie. Dividing by s makes the unit of length drop out, and tanh keeps a few very long responses from deciding φ. The
    fitted probabilities have the mean of y, so where length has no effect the result is the plain win rate.

    In 75 of 100 duels ours is 10 characters longer and wins 60 of them; in 25 it is 10 shorter and wins 5. Both kinds
    are fitted exactly, σ(θ + φt) = 0.8 and σ(θ − φt) = 0.2 (t = tanh(10/√75) = 0.819), so θ = 0 and φ = 1.692: of
    65 % wins nothing is left at equal length but 50 %.

    Prompts are resampled, each with all its duels; s stays. Where length alone decides all of a resample, its
    likelihood has no maximum, and its limit counts: at equal length always a win, always a loss, or the rate of
    the duels of equal length. Where that is open too, the resample is left out, and counted.

    Args:
        preferences: one a duel, 1, ½ or 0; None where there is none, and the duel is left out.
        differences: our length less theirs, in whatever unit; of a duel at the same place.
        prompts: what each duel is about; None: every duel has a different prompt.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        DataError: the lists are not aligned, a value makes no sense, no duel is left, all differ in length by the same
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
            f"length alone decides all {len(value_D):,} duels: on one side of a difference all are won, on the other "
            "all are lost, so the win rate at the same length is unknown"
        )
    (rate,), (effect,) = fit(x_K, won_1K, lost_1K)
    if np.isnan(rate):
        longer = "longer" if x_K[0] > 0 else "shorter"
        raise DataError(
            f"one side has won all {len(value_D):,} duels, and all responses of ours are {longer}, so the win "
            "rate at the same length is unknown"
        )
    estimate = Estimate(float(rate))
    if number > 1:
        drawn_B = _bootstrap(x_K, won_PK, lost_PK, derive(seed, "comparisons", "length"), resamples)
        said_B = drawn_B[~np.isnan(drawn_B)]
        if len(said_B) < resamples:
            notes.append(f"{resamples - len(said_B):,} of {resamples:,} resamples say nothing of the same length")
        if len(said_B) < MOST * resamples:
            notes.append("these are too many for an interval")
        else:
            estimate = percentiles(float(rate), said_B)
    return LengthControlled(estimate, float(effect), spread, float(delta_D.mean()), len(value_D), number, tuple(notes))


def fit(x_K: Array, won_BK: Array, lost_BK: Array) -> tuple[Array, Array]:
    """σ(θ) and φ of many regressions at once, each (B); Newton's method.

    Args:
        x_K: the different values of tanh(Δ / s), rising.
        won_BK, lost_BK: how much of the duels with each was won, and lost; half of a tie is either.

    Returns:
        Where there is no maximum: of σ(θ) its limit, NaN if there is none; of φ 0.
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
    """The changes of θ and φ in one round, at most 1 in log-odds, so that the likelihood never falls."""
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
    """Whether some length has all that was won on one side of it and all that was lost on the other (B).

    The border itself may have both. Then and only then has the likelihood no maximum (Albert and Anderson 1984).
    """
    last = won_BK.shape[1] - 1
    won, lost = won_BK > 0, lost_BK > 0
    first_won, last_won = won.argmax(1), last - won[:, ::-1].argmax(1)
    first_lost, last_lost = lost.argmax(1), last - lost[:, ::-1].argmax(1)
    found: Flags = (last_lost <= first_won) | (last_won <= first_lost)
    return found


def _limit(x_K: Array, won_K: Array, lost_K: Array) -> float:
    """The limit of σ(θ) where length decides every duel; NaN where it is open."""
    won, lost = x_K[won_K > 0], x_K[lost_K > 0]
    if not len(won) or not len(lost):  # the same length lies between those that there are, or else beyond them
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
    """σ(θ) of resamples (B)."""
    rng, number = np.random.default_rng(seed), won_PK.shape[0]
    size = max(BATCH // max(number, len(x_K)), 1)
    found = []
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        drawn = rng.integers(0, number, (count, number)) + np.arange(count)[:, None] * number
        weights_BP = np.bincount(drawn.ravel(), minlength=count * number).reshape(count, number).astype(float)
        found.append(fit(x_K, _weigh(weights_BP, won_PK), _weigh(weights_BP, lost_PK))[0])
    everything: Array = np.concatenate(found)
    return everything


def _weigh(weights_BP: Array, x_PK: csr_array) -> Array:
    found: Array = weights_BP @ x_PK
    return found


def _check(
    preferences: Sequence[float | None], differences: Sequence[float], prompts: Sequence[Hashable]
) -> tuple[Array, Array, npt.NDArray[np.int64], int]:
    """Values, differences and prompts' numbers of the duels that have a preference."""
    if not len(preferences) == len(differences) == len(prompts):
        lengths = f"{len(preferences)}, {len(differences)} and {len(prompts)}"
        raise DataError(f"a duel has a preference, a difference in length and a prompt; there are {lengths}")
    kept = [(v, d, p) for v, d, p in zip(preferences, differences, prompts, strict=True) if v is not None]
    if not kept:
        raise DataError(f"none of {len(preferences)} duels has a preference; nothing is left to compare")
    value_D, delta_D = (np.array([row[column] for row in kept], dtype=np.float64) for column in (0, 1))
    if not ((value_D >= 0) & (value_D <= 1)).all():
        raise DataError("a preference is 1, ½ or 0, or a probability between")
    if not np.isfinite(delta_D).all():
        raise DataError("a difference in length is no finite number")
    return value_D, delta_D, *number_labels([prompt for _, _, prompt in kept])


def _notes(dropped: int, total: int, number: int, plain: float) -> list[str]:
    notes = [f"{dropped:,} of {total:,} duels have no preference and are left out"] if dropped else []
    notes += ["one prompt: no interval"] if number == 1 else []
    return notes + (["one side has won every duel, whatever the length"] if plain in (0.0, 1.0) else [])
