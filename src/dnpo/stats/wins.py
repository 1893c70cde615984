"""Shares of wins, ties and losses between two sides' scores, duel by duel, with intervals."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dnpo.errors import DataError
from dnpo.seeding import derive
from dnpo.stats.intervals import RESAMPLES, Array, Estimate, bootstrap, percentiles
from dnpo.stats.significance import mcnemar, mcnemar_clustered


@dataclass(frozen=True)
class Wins:
    """Shares of the duels with scores, with 95 % intervals over prompts.

    Attributes:
        win, tie, lose: shares of the first side; their sum is 1.
        rate: the win rate, win + tie/2.
        p: two-sided p of the hypothesis that wins and losses are equally likely: the exact sign test if every prompt
            has one duel, otherwise McNemar's test clustered by prompt.
        duels: number of duels with a score on both sides.
        unscored: number of duels left out because a score is missing.
        prompts: number of prompts of the duels.
        notes: caveats to report with the numbers.
    """

    win: Estimate
    tie: Estimate
    lose: Estimate
    rate: Estimate
    p: float
    duels: int
    unscored: int
    prompts: int
    notes: tuple[str, ...]


def preferences(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float | None]:
    """For each duel: 1 if our score is higher, ½ for a tie, 0 if theirs is higher, None if a score is missing.

    To test over prompts and seeds at once, compare preferences (seeds × items) with ½ by ``compare_paired``.

    Raises:
        DataError: the sides have different lengths.
    """
    if len(ours) != len(theirs):
        raise DataError(f"each duel needs a score on both sides; there are {len(ours)} and {len(theirs)}")
    pairs = zip(_numbers(ours), _numbers(theirs), strict=True)
    return [None if np.isnan(a) or np.isnan(b) else 0.5 * (1 + (a > b) - (a < b)) for a, b in pairs]


def wins(
    ours: Sequence[float | None],
    theirs: Sequence[float | None],
    prompts: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Wins:
    """The shares of duels in which our score is higher than, equal to or lower than theirs.

    Duels that lack a score (None or NaN) are left out and counted. Duels about the same prompt are not independent, so
    the bootstrap resamples prompts, each with all its duels. Every duel counts the same, so a prompt with more duels
    weighs more. The interval generalises to new prompts for the two given models; it does not cover the variation
    between trainings.

    Scores 80, 70, None, 60 against 70, 70, 70, 90: of 3 duels one is won, one tied and one lost; the win rate is ½.

    Args:
        ours, theirs: scores, in the same order of duels.
        prompts: prompt of each duel; None: every duel has a different prompt.
        seed: seed of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        DataError: the lists are not aligned, or no duel has a score on both sides.
    """
    outcomes = preferences(ours, theirs)
    prompts = range(len(outcomes)) if prompts is None else prompts
    if len(prompts) != len(outcomes):
        raise DataError(f"{len(outcomes)} duels have {len(prompts)} prompts; expected one prompt for each duel")
    decided = [(prompt, value) for prompt, value in zip(prompts, outcomes, strict=True) if value is not None]
    if not decided:
        raise DataError(f"none of {len(outcomes)} duels has a score on both sides; nothing is left to compare")
    at_D, number = number_labels([prompt for prompt, _ in decided])
    value_D = np.array([value for _, value in decided])
    counts_XI = np.stack(
        [np.bincount(at_D, weights=value_D == value, minlength=number) for value in (1.0, 0.5, 0.0)]
        + [np.bincount(at_D, minlength=number).astype(float)]
    )
    won, tied, lost, duels = counts_XI.sum(1)
    values = [won / duels, tied / duels, lost / duels, (won + tied / 2) / duels]
    if number == 1:
        estimates = [Estimate(float(value)) for value in values]
    else:
        drawn_BX = bootstrap(counts_XI[:, None], derive(seed, "comparisons", "bootstrap"), resamples)
        shares_BX = drawn_BX[:, :3] / drawn_BX[:, 3:]
        drawn = [*shares_BX.T, shares_BX[:, 0] + shares_BX[:, 1] / 2]
        estimates = [percentiles(float(value), some) for value, some in zip(values, drawn, strict=True)]
    unscored = len(outcomes) - len(decided)
    win, tie, lose, rate = estimates
    notes = _notes(counts_XI, unscored)
    return Wins(win, tie, lose, rate, _p(counts_XI), len(decided), unscored, number, notes)


def number_labels(labels: Sequence[Hashable]) -> tuple[npt.NDArray[np.int64], int]:
    """Number labels from 0 in the order of their first appearance; return the numbers and how many labels there are."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([number[label] for label in labels], dtype=np.int64), len(number)


def _numbers(scores: Sequence[float | None]) -> Array:
    given: Any = scores
    try:
        numbers: Array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"scores must be numbers, or None if one is missing ({error})") from error
    return numbers


def _p(counts_XI: Array) -> float:
    won_I, _, lost_I, duels_I = counts_XI
    if duels_I.max() > 1:
        return mcnemar_clustered((won_I - lost_I)[None])
    return mcnemar(int(won_I.sum()), int(lost_I.sum()))


def _notes(counts_XI: Array, unscored: int) -> tuple[str, ...]:
    notes = []
    number = counts_XI.shape[1]
    if number == 1:
        notes.append("one prompt: no interval")
    elif (counts_XI[:3].sum(1) > 0).sum() == 1:
        notes.append("all duels have the same outcome, so the interval has no width; that is not certainty")
    if unscored:
        notes.append(f"{unscored:,} of {int(counts_XI[3].sum()) + unscored:,} duels lack a score and are left out")
    return tuple(notes)
