"""Measures of a judge's agreement with people, as functions of arrays.

Every measure is a function of weights: how often each row occurs in each of several samples. Weights of 1 give the
measure itself. Multinomial draws give its bootstrap, with one matrix product for all resamples.

Shapes: S samples, R rows, V persons, C categories, N responses.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dnpo.stats.intervals import Mean

CATEGORIES = ("A", "B", "tie")
A, B, TIE = range(3)
TOLERANCE = 1e-9  # points; scores are sums of a few floats
BATCH = 4_000_000  # weights in a batch: 32 MB

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AgreementMeasure:
    """A measure over rows.

    Attributes:
        of: computes values (shape S) from weights (S × R); NaN if the measure is not defined.
        rows: number of rows that the measure uses.
        undefined: the reason to report if the measure is not defined.
        is_share: whether it is a share of rows, which has an interval even if all resamples are equal.
    """

    of: Callable[[Array], Array]
    rows: int
    undefined: str
    is_share: bool = False


@dataclass(frozen=True)
class AgreementEstimate:
    """A measure with its 95 % interval; numbers that cannot be computed are None, with the ``reason``."""

    value: float | None
    low: float | None = None
    high: float | None = None
    rows: int = 0
    reason: str = ""


# --- measures ---------------------------------------------------------------------------------------------------------


def absent(reason: str) -> AgreementMeasure:
    """A measure that is not defined, for this reason."""
    return AgreementMeasure(lambda w_SR: np.full(len(w_SR), np.nan), 0, reason)


def ratio(over_R: Any, under_R: Any, undefined: str) -> AgreementMeasure:
    """Σ over / Σ under, each summed over rows."""
    over, under = np.asarray(over_R, float), np.asarray(under_R, float)
    return AgreementMeasure(lambda w_SR: _divide(w_SR @ over, w_SR @ under), int((under > 0).sum()), undefined)


def share(hit_R: Any, among_R: Any, undefined: str) -> AgreementMeasure:
    """The share of hits (0 to 1 for each row) among some of the rows."""
    return replace(ratio(np.where(among_R, hit_R, 0.0), among_R, undefined), is_share=True)


def cohen(one_R: Labels, other_R: Labels) -> AgreementMeasure:
    """Cohen's κ = (p_o − p_e) / (1 − p_e) of two raters (Cohen 1960, equation 1).

    p_o is the share of rows in which they agree, p_e the expected share if each drew categories independently with its
    own frequencies. Not defined if both use the same single category (p_e = 1).
    """
    joint = (_one_hot(one_R)[:, :, None] * _one_hot(other_R)[:, None, :]).reshape(len(one_R), -1)
    count = len(CATEGORIES)

    def of(w_SR: Array) -> Array:
        joint_SCC = (w_SR @ joint).reshape(-1, count, count)
        rows_S = joint_SCC.sum((1, 2))
        agreed_S = np.einsum("scc->s", joint_SCC)
        expected_S = (joint_SCC.sum(1) * joint_SCC.sum(2)).sum(1)
        # times rows²: whole numbers, so that 1 − p_e is exactly 0 where it must be
        return _divide(rows_S * agreed_S - expected_S, rows_S**2 - expected_S)

    return AgreementMeasure(of, len(one_R), "both use the same single category, so chance explains everything")


def fleiss(votes_RV: Labels) -> AgreementMeasure:
    """Fleiss' κ = (P̄ − P̄_e) / (1 − P̄_e) of several raters (Fleiss 1971, equations 1 to 7).

    P̄ is the share of agreeing pairs of raters, averaged over rows; P̄_e the sum of squared shares of the categories.
    Not defined if all use only one category.
    """
    persons = votes_RV.shape[1]
    counts_RC = _one_hot(votes_RV).sum(1)
    agreeing_R = (counts_RC**2).sum(1) - persons  # ordered pairs of persons who agree

    def of(w_SR: Array) -> Array:
        said_S = w_SR.sum(1) * persons
        expected_S = ((w_SR @ counts_RC) ** 2).sum(1)  # times (rows · persons)²
        observed_S = _divide((w_SR @ agreeing_R) * said_S, np.full(len(w_SR), persons - 1.0))
        return _divide(observed_S - expected_S, said_S**2 - expected_S)

    return AgreementMeasure(of, len(votes_RV), "everybody uses only one category, so chance explains everything")


def mean(measures: Sequence[AgreementMeasure]) -> AgreementMeasure:
    """The mean of several measures; defined if all of them are."""
    first = measures[0]
    return AgreementMeasure(lambda w_SR: np.mean([m.of(w_SR) for m in measures], axis=0), first.rows, first.undefined)


def difference(one: AgreementMeasure, other: AgreementMeasure) -> AgreementMeasure:
    """One measure minus the other, in the same samples."""
    reason = f"{one.undefined}, or {other.undefined}"
    return AgreementMeasure(lambda w_SR: one.of(w_SR) - other.of(w_SR), min(one.rows, other.rows), reason)


def _one_hot(labels: Labels) -> Array:
    one_hot: Array = np.eye(len(CATEGORIES))[labels]
    return one_hot


def _divide(over: Array, under: Array) -> Array:
    quotient: Array = np.divide(over, under, out=np.full(np.shape(over), np.nan), where=under != 0)
    return quotient


# --- from verdicts to measures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Rows judged by people and by a judge.

    Attributes:
        judge_R, label_R: categories.
        votes_RV: categories by person; no columns if only the label is known.
        longer_R: the longer response; ``TIE`` if they are equally long.
        scores_RN: scores of both responses, for a judge that scores single responses.
        orders_RN: for a judge that compares, its scores of ``b`` in both orders, the lower first; NaN if the responses
            are identical, so that it was not asked.
    """

    judge_R: Labels
    label_R: Labels
    votes_RV: Labels
    longer_R: Labels
    scores_RN: Array | None = None
    orders_RN: Array | None = None


def preference(score_a: float, score_b: float) -> int:
    """The preferred category by two scores."""
    apart = score_b - score_a
    return TIE if abs(apart) <= TOLERANCE else B if apart > 0 else A


def orders(score: float, disagreement: float | None) -> tuple[float, float]:
    """The scores of a comparison in its two orders, the lower first, from their mean and difference."""
    half = np.nan if disagreement is None else disagreement / 2
    return score - half, score + half


def measures(rows: Judged) -> dict[str, AgreementMeasure]:
    """All measures by name."""
    judge, label, longer = rows.judge_R, rows.label_R, rows.longer_R
    everywhere, decided, prefers, unequal = label >= 0, judge != TIE, label != TIE, longer != TIE
    none_right, none_there = "people have no preference in any row", "there are no rows"
    result = {
        "accuracy": share(np.where(judge == TIE, 0.5, judge == label), prefers, none_right),
        "accuracy_strict": share(judge == label, prefers, none_right),
        "accuracy_three_way": share(judge == label, everywhere, none_there),
        "ties_judge": share(~decided, everywhere, none_there),
        "ties_people": share(~prefers, everywhere, none_there),
        "kappa": cohen(judge, label),
        **_with_persons(judge, rows.votes_RV),
        "longer_judge": share(
            judge == longer, decided & unequal, "the judge never prefers one of two responses of unequal length"
        ),
        "longer_people": share(
            label == longer, prefers & unequal, "people never prefer one of two responses of unequal length"
        ),
    }
    result["length_bias"] = difference(result["longer_judge"], result["longer_people"])
    for name, they in (("longer", label == longer), ("shorter", label != longer)):
        among = prefers & unequal & they
        right = np.where(judge == TIE, 0.5, judge == label)
        result[f"accuracy_{name}"] = share(right, among, f"people never prefer the {name} one")
    return result | _of_orders(rows.orders_RN) | _of_scores(rows.scores_RN)


def _with_persons(judge_R: Labels, votes_RV: Labels) -> dict[str, AgreementMeasure]:
    persons = [votes_RV[:, v] for v in range(votes_RV.shape[1])]
    couples = [cohen(one, other) for i, one in enumerate(persons) for other in persons[:i]]
    alone = absent("the rows have no votes of single persons" if not persons else "only one person has voted")
    both = np.column_stack([votes_RV, judge_R])
    return {
        "kappa_persons": mean([cohen(judge_R, one) for one in persons]) if persons else alone,
        "kappa_between_persons": mean(couples) if couples else alone,
        "fleiss_persons": fleiss(votes_RV) if couples else alone,
        "fleiss_with_judge": fleiss(both) if couples else alone,
    }


def _of_orders(orders_RN: Array | None) -> dict[str, AgreementMeasure]:
    """How often the verdict depends on the order: any change of the verdict, and reversals."""
    if orders_RN is None:
        no = absent("nothing is compared in two orders")
        return {"flips": no, "reversals": no}
    asked = ~np.isnan(orders_RN).any(1)
    away = np.nan_to_num(orders_RN, nan=50.0) - 50.0
    side = np.where(np.abs(away) <= TOLERANCE, 0.0, np.sign(away))
    reason = "no two different responses were compared"
    return {
        "flips": share(side[:, 0] != side[:, 1], asked, reason),
        "reversals": share(side[:, 0] * side[:, 1] < 0, asked, reason),
    }


def _of_scores(scores_RN: Array | None) -> dict[str, AgreementMeasure]:
    """Shares of round scores. Among whole numbers from 0 to 100, 21/101 are multiples of 5 and 11/101 of 10."""
    if scores_RN is None:
        no = absent("no scores of single responses")
        return {"multiples_of_5": no, "multiples_of_10": no}
    each = np.full(len(scores_RN), scores_RN.shape[1])
    return {f"multiples_of_{n}": ratio(multiples(scores_RN, n).sum(1), each, "there are no rows") for n in (5, 10)}


def multiples(scores: Array, of: int) -> npt.NDArray[np.bool_]:
    """Which scores are multiples of a whole number."""
    hits: npt.NDArray[np.bool_] = np.abs(scores - of * np.rint(scores / of)) <= TOLERANCE
    return hits


def entropy(scores_N: Array) -> float:
    """Shannon entropy in bits of scores rounded to whole numbers; log2(101) ≈ 6.66 if all 101 are equally frequent."""
    from scipy.stats import entropy as shannon

    return float(shannon(np.unique(np.rint(scores_N), return_counts=True)[1], base=2))


def distinct(scores_N: Array) -> int:
    """The number of different scores."""
    return len(np.unique(np.round(scores_N, 9)))


# --- intervals --------------------------------------------------------------------------------------------------------


def estimates(
    measures: Mapping[str, AgreementMeasure], rows: int, resamples: int, seed: int, level: float = 0.95
) -> dict[str, AgreementEstimate]:
    """Estimate every measure with a percentile bootstrap interval over rows (Efron 1979), on the same resamples.

    If a measure is not defined in some resamples, the interval uses the other resamples; if these are fewer than 95 %
    of all, there is no interval. A share of 0 or 1 has Wilson's interval, since all its resamples are equal.
    """
    rng = np.random.default_rng(seed)
    size = max(BATCH // rows, 1)
    drawn: dict[str, list[Array]] = {name: [] for name in measures}
    for start in range(0, resamples, size):
        w_SR = rng.multinomial(rows, np.full(rows, 1 / rows), size=min(size, resamples - start)).astype(np.float64)
        for name, measure in measures.items():
            drawn[name].append(measure.of(w_SR))
    whole = np.ones((1, rows))
    return {
        name: _estimate(m, float(m.of(whole)[0]), np.concatenate(drawn[name]), level) for name, m in measures.items()
    }


def _estimate(measure: AgreementMeasure, value: float, drawn_S: Array, level: float) -> AgreementEstimate:
    if np.isnan(value):
        return AgreementEstimate(None, rows=measure.rows, reason=measure.undefined)
    defined = drawn_S[~np.isnan(drawn_S)]
    if len(defined) < 0.95 * len(drawn_S):
        return AgreementEstimate(value, rows=measure.rows, reason="no interval: not defined in many of the resamples")
    tail = 50 * (1 - level)
    low, high = np.percentile(defined, [tail, 100 - tail])
    if measure.is_share and low == high and value in (0.0, 1.0):  # none or all of the rows: resamples cannot differ
        wilson = Mean(value, 0.0, measure.rows - 1).share(measure.rows)
        return AgreementEstimate(value, wilson.low, wilson.high, measure.rows)
    return AgreementEstimate(value, float(low), float(high), measure.rows)
