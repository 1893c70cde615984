"""Say in sentences what became better or worse in a run: the same on the screen, in the report and anywhere else."""

from collections.abc import Mapping, Sequence
from typing import Any

from dnpo.catalogue import metric
from dnpo.stats.intervals import Estimate
from dnpo.stats.prompts import change

LOSS = "eval/loss"  # has no interval in earlier versions, whose evaluations lack its results by prompt


def describe_changes(
    rows: Sequence[Mapping[str, Any]], results: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[str]:
    """Return a sentence for each measure on its change from the first policy to the last, and what to read if it fell.

    Args:
        rows: the run's table, a row per policy.
        results: by metric, each policy's results by prompt; empty if there are none.
    """
    said = []
    over, measured, fell = "", set(), False
    for name, by_policy in results.items():
        column, first, last = metric(name), rows[0].get(name), rows[-1].get(name)
        found = change(dict(by_policy[-1]), dict(by_policy[0])) if len(rows) > 1 else None
        if first is None or last is None or found is None:
            continue
        if found.difference == Estimate(0.0):  # nothing varies
            measured.add(name)
            said.append(f"{column.title}: {column.format(last)} {column.unit}, unchanged on every prompt.")
            over = f"over {found.items} held-out prompts"
            continue
        if found.difference.low is None or found.difference.high is None:
            continue
        measured.add(name)
        low, high = (column.format(end, signed=True) for end in (found.difference.low, found.difference.high))
        ends = f"{column.format(first)} → {column.format(last)}"
        up, down = ("worse", "better") if column.better == "lower" else ("better", "worse")
        verdict = up if found.difference.low > 0 else down if found.difference.high < 0 else "no clear change"
        fell |= verdict == "worse" and name != LOSS
        gained = column.format(last - first, signed=True)
        said.append(f"{column.title}: {ends} {column.unit}, {verdict} ({gained}; 95 % interval {low} to {high}).")
        over = f"over {found.items} held-out prompts"
    column, first, last = metric(LOSS), rows[0].get(LOSS), rows[-1].get(LOSS)
    if LOSS not in measured and len(rows) > 1 and first is not None and last is not None:
        ends, gained = f"{column.format(first)} → {column.format(last)}", column.format(last - first, signed=True)
        said.append(f"{column.title}: {ends} {column.unit} ({gained}).")
    if over:
        ends = f"from {rows[0]['iteration']} to {rows[-1]['iteration']}"
        said.append(f"Changes are {ends}; ± and intervals are {over}. Another seed may give other numbers.")
    if fell:
        said.append("What to look at in a bad run: `When a run is bad` in docs/reading-a-run.md.")
    return said
