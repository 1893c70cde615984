"""What is shown in addition to every gain: the held-out loss of human responses, and the KL to the initial policy.

A policy can be better by a judge, or by right answers, and have lost what it knew. So tables show both beside the
results, and mark the gains that come with a worse held-out loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from analysis.costs import KL, kind_of
from analysis.results import Against, Array, Items, PolicyMeasure, against, estimate, item_table, results
from analysis.selection import Cells, Iteration, spell
from dnpo.catalogue import metric
from dnpo.stats.prompts import loss_by_prompt
from dnpo.stats.table import Cell
from dnpo.tracking.reading import SFT, TrackedRun

MARK = "†"
CAUTION = (
    "the held-out loss of human responses is worse too (both by the 95 % interval of the paired difference): "
    "over-optimised, unless the policy has found better responses than the human ones"
)


def _losses(run: TrackedRun, iteration: Iteration) -> Items | None:
    table = item_table(run, iteration)
    return None if table is None else loss_by_prompt(table) or None


LOSS = PolicyMeasure(metric("eval/loss"), _losses)


def tracked(cells: Cells) -> list[PolicyMeasure]:
    """Those of the two measures that all runs track; the KL is 0 before the first iteration, and not tracked there."""
    rows = [run.row(k) for (_, k, _), run in cells.runs.items() if k != SFT]
    return [each for each in (LOSS, KL) if rows and all(row.get(each.name) is not None for row in rows)]


def level(measure: PolicyMeasure, x_SI: Array, *, worse: bool = False) -> Cell:
    """The cell of a measure, with a mark if a gain comes with a worse one."""
    return Cell(estimate(x_SI, kind_of(measure)), sides=True, mark=MARK * worse)


def comes_worse(gain: Against | None, loss: Against | None) -> bool:
    """Whether a gain comes with a worse held-out loss: the intervals of both differences are above 0."""
    return all(each is not None and (each.difference.low or 0.0) > 0 for each in (gain, loss))


def explain(measures: Sequence[PolicyMeasure], rows: Mapping[str, Mapping[str, Cell]], gain: str) -> list[str]:
    """A note on the columns of the measures, if there are any.

    Args:
        rows: the table, whose marks are explained if it has any.
        gain: what is better where a loss is marked.
    """
    if not measures:
        return []
    marked = any(cell.mark for row in rows.values() for cell in row.values())
    columns = "; ".join(each.metric.axis for each in measures)
    return [f"Also shown, but not tested: {columns}.{f' {MARK}: {gain}, and {CAUTION}.' * marked}"]


def warn(cells: Cells, differences: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence on the gains over the base that come with a worse held-out loss, if there are any.

    Args:
        differences: rows of :func:`analysis.results.over_base`, of a measure of which more is better.
    """
    if LOSS not in tracked(cells):
        return ()
    found = {}
    for row in differences:
        if row["low"] is not None and row["low"] > 0:
            sides = [(row["method"], row["iteration"]), (row["base"], row["iteration"])]
            seeds = cells.seeds_of(*sides)
            apart = against(*(results(cells, LOSS, *side, seeds) for side in sides))
            if apart is not None and (apart.difference.low or 0.0) > 0:
                found[f"{row['method']} {spell(row['iteration'])}"] = row["base"]
    if not found:
        return ()
    return (f"Caution, gains over {next(iter(found.values()))} of {', '.join(found)}: {CAUTION}",)
