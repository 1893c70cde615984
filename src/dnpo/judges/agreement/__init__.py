"""Can this judge be trusted? Its verdicts against those of people.

    python -m dnpo.judges.agreement judge=longer data=some.jsonl

What rows look like stands in ``rows.py``, what is measured in ``stats.py``. The verdicts and what is made of them are
stages in the store: a rerun finds them, and a run with the same judge shows its agreement in its summary.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnpo.errors import JudgeError
from dnpo.judges import Judge, judged, tally
from dnpo.judges.agreement.rows import Comparison, Labelled
from dnpo.judges.agreement.stats import (
    CATEGORIES,
    TIE,
    A,
    B,
    Estimate,
    Judged,
    distinct,
    entropy,
    estimates,
    measures,
    orders,
    preference,
)
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import HUMAN, Response, Verdict, policy_source, read, write
from dnpo.settings import part_key
from dnpo.store import MANIFEST, Report, Stage, Store, manifest, write_json

STAGE, VERSION = "agreement", 1
POINTS = "points.json"
OTHER = policy_source(0)  # the source of ``b``, as judges that compare expect it

# --- stages -----------------------------------------------------------------------------------------------------------


def verdicts(judge: Judge, data: Labelled, rows: Sequence[Comparison], ledger: Ledger) -> Stage:
    """What the judge says of both responses of every row."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        prompts = [row.prompt for row in rows]
        first = [Response(p.id, HUMAN, p.human, [], 0, "eos") for p in prompts]
        second = [Response(row.prompt.id, OTHER, row.b, [], 0, "eos") for row in rows]
        said = judged(judge, prompts, [*first, *second], ledger, report)
        write(folder / "verdicts.parquet", said, Verdict)
        return tally(said)

    settings = {"judge": part_key(judge), "data": data.content()}
    return Stage("verdicts", "verdicts", 1, settings, {}, work)


def agreement(
    judge: Judge, data: Labelled, rows: Sequence[Comparison], said: Stage, resamples: int, seed: int
) -> Stage:
    """What the verdicts have to do with those of people; the measures are the stage's facts."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        facts, points = compared(
            rows, read(inputs["verdicts"] / "verdicts.parquet", Verdict), pairwise, resamples, seed
        )
        write_json(folder / POINTS, points)
        return {"data": data.path.name, **facts}

    pairwise = getattr(judge, "mode", "score") == "pairwise"
    settings = {"judge": part_key(judge), "data": data.content(), "resamples": resamples, "seed": seed}
    return Stage(STAGE, "agreement with people", VERSION, settings, {"verdicts": said}, work)


def compared(
    rows: Sequence[Comparison], said: Sequence[Verdict], pairwise: bool, resamples: int, seed: int
) -> tuple[dict[str, Any], list[float]]:
    """Measures and counts from rows and the verdicts on them, and the points that a histogram shows.

    The mode is ``score`` where every response has a score of its own, ``pairwise`` where two are compared in both
    orders, and ``relative`` where one has a score against the other and nothing tells of orders (ensembles and
    majorities of judges that compare). Points are the scores, the differences between orders, or the scores of ``b``.

    A row counts as unscored if one of its responses is: it is left out, and counted by reason.

    Args:
        pairwise: whether a verdict's disagreement is that between two orders.

    Raises:
        JudgeError: no row is left.
    """
    first = {v.id: v for v in said if v.source == HUMAN}
    second = {v.id: v for v in said if v.source == OTHER}
    scored: list[tuple[Comparison, float, float, float | None]] = []
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
            f"({count:,} ×): {reason}. Put that right, or choose another judge"
        )
    scores = np.array([[a, b] for _, a, b, _ in scored])
    both = np.array([orders(b, apart) for _, _, b, apart in scored])
    # A judge that compares gives the first response 50, so that always the higher score is the better response.
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
    found = estimates(measures(judged), len(scored), resamples, seed)
    if mode == "score":
        # Without intervals: resampling repeats scores, which lowers both whatever the judge is like.
        found["entropy"] = Estimate(entropy(scores), rows=len(scored))
        found["distinct"] = Estimate(float(distinct(scores)), rows=len(scored))
    facts = {
        "mode": mode,
        "rows": len(rows),
        "unscored": len(rows) - len(scored),
        "reasons": dict(reasons),
        "persons": int(judged.votes_RV.shape[1]),
        "labels": {name: int((judged.label_R == i).sum()) for i, name in enumerate(CATEGORIES)},
        "verdicts": {name: int((judged.judge_R == i).sum()) for i, name in enumerate(CATEGORIES)},
        "measures": {name: dataclasses.asdict(estimate) for name, estimate in found.items()},
    }
    apart = (both[:, 1] - both[:, 0])[~np.isnan(both).any(1)]
    points = {"score": scores.ravel(), "pairwise": apart, "relative": scores[:, 1]}[mode]
    return facts, [float(point) for point in points]


def _longer(row: Comparison) -> int:
    a, b = len(row.prompt.human), len(row.b)
    return TIE if a == b else A if a > b else B


def known_agreement(store: Store, judge_key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the store knows of a judge's agreement with people: one entry for each set of rows, the newest of each.

    Args:
        judge_key: see :func:`dnpo.settings.part_key`.
    """
    wanted = json.loads(json.dumps(judge_key))
    newest: dict[str, dict[str, Any]] = {}
    for path in (store.root / STAGE).glob(f"*/{MANIFEST}"):
        if path.parent.suffix == ".partial":
            continue
        content = manifest(path.parent)
        data = content["settings"]["data"]
        if content["version"] != VERSION or content["settings"]["judge"] != wanted:
            continue
        if data not in newest or content["started"] > newest[data]["started"]:
            newest[data] = content
    return [_entry(content) for content in sorted(newest.values(), key=lambda content: str(content["facts"]["data"]))]


def _entry(content: Mapping[str, Any]) -> dict[str, Any]:
    facts = content["facts"]
    kept = ("accuracy", "kappa", "kappa_between_persons", "length_bias", "flips")
    shown = {name: facts["measures"][name] for name in kept}
    return {"data": facts["data"], "stage": f"{STAGE}/{content['key']}", "unscored": facts["unscored"], **shown}


def sentence(entry: Mapping[str, Any]) -> str:
    """One entry of :func:`known_agreement` in words."""
    accuracy = entry["accuracy"]
    if accuracy["value"] is None:
        return f"agreement on {entry['data']} is unknown: {accuracy['reason']}"
    between = "" if accuracy["low"] is None else f" ({100 * accuracy['low']:.0f} to {100 * accuracy['high']:.0f})"
    share = f"{100 * accuracy['value']:.0f} %"
    without = f", and {entry['unscored']:,} more have no verdict" if entry["unscored"] else ""
    return f"agrees with people in {share} of {accuracy['rows']:,} rows of {entry['data']}{between}{without}"
