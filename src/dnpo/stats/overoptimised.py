"""Over-optimisation: the score of the judge that training learns from rises, and other measures disagree.

All gains are from the first policy to the last, over the same held-out prompts. Only their intervals count.
"""

from collections.abc import Mapping
from typing import Any

from dnpo.catalogue import metric
from dnpo.stats.intervals import Estimate

SCORE, LOSS = "eval/score", "eval/loss"
OTHERS = ("second/score", "eval/accuracy")  # measures that nothing is trained on
LEARNS_FROM = {  # how the judge that training learns from compares with the judge of the evaluations
    "same": "training learns from the judge that gives these scores",
    "other": "training learns from another judge",
    "nobody": "no judge labels the pairs",
}


def find_overoptimisation(gains: Mapping[str, Estimate]) -> dict[str, Any] | None:
    """Decide whether a run is over-optimised; None if nothing says so.

    It is if the judge's score rises (its interval is above 0), and one of these disagrees:

    - another measure, the second judge's score or the right answers, falls (its interval is below 0);
    - the held-out loss of human responses rises (its interval is above 0), and no other measure rises. If one does,
      the policy may have left the human responses for better ones.

    Args:
        gains: by metric, the difference of the last policy from the first. Metrics without an interval do not count.

    Returns:
        The gain of the score and the gains that disagree with it, by metric, each as value, low and high.
    """
    known = {name: gain for name, gain in gains.items() if gain.low is not None and gain.high is not None}
    others = {name: known[name] for name in OTHERS if name in known}
    if SCORE not in known or not _rises(known[SCORE]):
        return None
    against = [name for name, gain in others.items() if _falls(gain)]
    if LOSS in known and _rises(known[LOSS]) and not any(map(_rises, others.values())):
        against.append(LOSS)
    return {name: _numbers(known[name]) for name in (SCORE, *against)} if against else None


def describe_overoptimisation(found: Mapping[str, Mapping[str, float]], figure: str) -> str:
    """Describe what :func:`find_overoptimisation` found, in three sentences.

    Args:
        figure: where the measures are drawn, such as ``progress.png``.
    """
    gained, *against = (_describe(name, gain) for name, gain in found.items())
    return (
        f"Over-optimised? The policy is better by the judge that it learns from ({gained}), but other measures "
        f"disagree: {'; '.join(against)}. See {figure}."
    )


def _describe(name: str, gain: Mapping[str, float]) -> str:
    column = metric(name)
    value, low, high = (column.format(gain[part], signed=True) for part in ("value", "low", "high"))
    unit = "percentage points" if column.unit == "%" else column.unit
    return f"{column.title.lower()} {value} {unit}, 95 % interval {low} to {high}"


def _numbers(gain: Estimate) -> dict[str, float | None]:
    return {"value": gain.value, "low": gain.low, "high": gain.high}


def _rises(gain: Estimate) -> bool:
    return gain.low is not None and gain.low > 0


def _falls(gain: Estimate) -> bool:
    return gain.high is not None and gain.high < 0
