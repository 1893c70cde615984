"""Compare a judge's verdicts with people's.

``rows.py`` defines the rows, ``stats.py`` the measures. ``dnpo.stages.agreement`` keeps verdicts and measures in the
store.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dnpo.errors import JudgeError
from dnpo.judges import Judge, judge_responses
from dnpo.judges.agreement.rows import LabelledRow
from dnpo.judges.agreement.stats import (
    CATEGORIES,
    TIE,
    A,
    AgreementEstimate,
    B,
    Judged,
    distinct,
    entropy,
    estimates,
    measures,
    orders,
    preference,
)
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import HUMAN, Response, Verdict, policy_source
from dnpo.store import Report

OTHER = policy_source(0)  # the source of ``b``: judges that compare expect a policy's response


def judge_both(judge: Judge, rows: Sequence[LabelledRow], ledger: Ledger, report: Report) -> list[Verdict]:
    """Judge both responses of every row: first all ``a``, which count as human, then all ``b``.

    Raises:
        JudgeError: too many responses lack a score.
    """
    prompts = [row.prompt for row in rows]
    first = [Response(p.id, HUMAN, p.human, [], 0, "eos") for p in prompts]
    second = [Response(row.prompt.id, OTHER, row.b, [], 0, "eos") for row in rows]
    return judge_responses(judge, prompts, [*first, *second], ledger, report)


def compare(
    rows: Sequence[LabelledRow], verdicts: Sequence[Verdict], pairwise: bool, resamples: int, seed: int
) -> tuple[dict[str, Any], list[float]]:
    """Compute measures and counts from rows and the verdicts on them, and the points for a histogram.

    There are three modes. ``score``: single responses are scored, and the points are scores. ``pairwise``: two
    responses are compared in both orders, and the points are differences between the orders. ``relative``: ``b`` is
    scored against ``a``, without separate results for the orders (ensembles of judges that compare), and the points are
    the scores of ``b``.

    A row is left out, and counted by reason, if one of its responses lacks a score.

    Args:
        pairwise: whether a verdict's disagreement is the difference between two orders.

    Raises:
        JudgeError: no row is left.
    """
    first = {v.id: v for v in verdicts if v.source == HUMAN}
    second = {v.id: v for v in verdicts if v.source == OTHER}
    scored: list[tuple[LabelledRow, float, float, float | None]] = []
    reasons: Counter[str] = Counter()
    for row in rows:
        a, b = first[row.prompt.id], second[row.prompt.id]
        if a.score is None or b.score is None:
            reasons[a.reason if a.score is None else b.reason] += 1
        else:
            scored.append((row, a.score, b.score, b.disagreement))
    if not scored:
        ((reason, count),) = reasons.most_common(1)
        raise JudgeError(
            f"judge: none of the {len(rows):,} rows has a verdict, so there is nothing to compare; most often "
            f"({count:,} ×): {reason}. Correct that, or choose another judge"
        )
    scores = np.array([[a, b] for _, a, b, _ in scored])
    both = np.array([orders(b, apart) for _, _, b, apart in scored])
    # A judge that compares gives ``a`` 50 points, so in all modes the better response has the higher score.
    against = bool((scores[:, 0] == 50.0).all() and (scores[:, 1] != 50.0).any())
    mode = "pairwise" if pairwise else "relative" if against else "score"
    judged = Judged(
        judge_R=np.array([preference(a, b) for _, a, b, _ in scored]),
        label_R=np.array([row.label for row, *_ in scored]),
        votes_RV=np.array([row.votes for row, *_ in scored], dtype=np.int64).reshape(len(scored), -1),
        longer_R=np.array([_longer(row) for row, *_ in scored]),
        scores_RN=scores if mode == "score" else None,
        orders_RN=both if mode == "pairwise" else None,
    )
    numbers = estimates(measures(judged), len(scored), resamples, seed)
    if mode == "score":
        # No intervals: resampling repeats scores, which lowers both measures for any judge.
        numbers["entropy"] = AgreementEstimate(entropy(scores), rows=len(scored))
        numbers["distinct"] = AgreementEstimate(float(distinct(scores)), rows=len(scored))
    facts = {
        "mode": mode,
        "rows": len(rows),
        "unscored": len(rows) - len(scored),
        "reasons": dict(reasons),
        "persons": int(judged.votes_RV.shape[1]),
        "labels": {name: int((judged.label_R == i).sum()) for i, name in enumerate(CATEGORIES)},
        "verdicts": {name: int((judged.judge_R == i).sum()) for i, name in enumerate(CATEGORIES)},
        "measures": {name: dataclasses.asdict(estimate) for name, estimate in numbers.items()},
    }
    apart = (both[:, 1] - both[:, 0])[~np.isnan(both).any(1)]
    points = {"score": scores.ravel(), "pairwise": apart, "relative": scores[:, 1]}[mode]
    return facts, [float(point) for point in points]


def _longer(row: LabelledRow) -> int:
    a, b = len(row.prompt.human), len(row.b)
    return TIE if a == b else A if a > b else B


def sentence(entry: Mapping[str, Any]) -> str:
    """Describe an entry of :func:`dnpo.stages.agreement.read_agreement` in a sentence."""
    accuracy = entry["accuracy"]
    if accuracy["value"] is None:
        return f"agreement on {entry['data']} is unknown: {accuracy['reason']}"
    between = "" if accuracy["low"] is None else f" ({100 * accuracy['low']:.0f} to {100 * accuracy['high']:.0f})"
    share = f"{100 * accuracy['value']:.0f} %"
    without = f", and {entry['unscored']:,} more have no verdict" if entry["unscored"] else ""
    return f"agrees with people in {share} of {accuracy['rows']:,} rows of {entry['data']}{between}{without}"
