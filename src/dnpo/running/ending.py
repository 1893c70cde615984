"""Show the results of a run: a table with intervals, and sentences about the changes."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnpo.catalogue import metric
from dnpo.running import best as choosing
from dnpo.running.console import BEST, LABEL, Console, compact_table, wide_table
from dnpo.screen import ScreenTable
from dnpo.stats.changes import describe_changes
from dnpo.stats.intervals import Estimate
from dnpo.stats.prompts import by_prompt, change, loss_by_prompt, mean

MEASURED = {
    "eval/score": ("sample", "score"),
    "second/score": ("sample", "second"),
    "eval/accuracy": ("greedy", "right"),
    "eval/loss": ("human", "logprob"),
}
BARE = ("eval/loss",)  # shown in the narrow table without its interval, since there is no room


def show_results(
    console: Console,
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Path],
    by: str | None = None,
    wide: bool = False,
) -> None:
    """Show the table and the sentences below it.

    Args:
        rows: the run's table, a row per policy.
        evaluations: for each policy, the folder of a finished stage with its results by prompt.
        by: the metric that decides which row is marked; None: the score, or the held-out loss if nothing is scored.
        wide: whether to show all columns, in as many parts as the terminal needs.
    """
    by = by or choosing.default_metric(rows)
    results = read_results(evaluations)
    best = find_best(rows, by)
    console.table(_table(rows, results, best, wide), split=wide)
    console.say("")
    for text in sentences(rows, results, by if best is not None else None, wide):
        console.tell(text)


def results_table(
    rows: Sequence[Mapping[str, Any]], evaluations: Sequence[Path], by: str | None, wide: bool = False
) -> ScreenTable:
    """Build the table of :func:`show_results`, from the same arguments."""
    return _table(rows, read_results(evaluations), find_best(rows, by or choosing.default_metric(rows)), wide)


def _table(
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Sequence[Mapping[str, float]]],
    best: int | None,
    wide: bool,
) -> ScreenTable:
    around = {name: found for name, found in _intervals(results).items() if wide or name not in BARE}
    return (wide_table if wide else compact_table)([dict(row) for row in rows], around, best)


def read_results(evaluations: Sequence[Path]) -> dict[str, list[dict[str, float]]]:
    """Read, by metric, each policy's results by prompt; empty where there are none."""
    return {name: [_read(folder, name) for folder in evaluations] for name in MEASURED}


def find_gains(evaluations: Sequence[Path]) -> dict[str, Estimate]:
    """Estimate, by metric, the difference of the last policy from the first, over prompts."""
    found = {}
    for name, by_policy in read_results(evaluations).items():
        comparison = change(by_policy[-1], by_policy[0]) if len(by_policy) > 1 else None
        if comparison is not None:
            found[name] = comparison.difference
    return found


def find_intervals(evaluations: Sequence[Path]) -> dict[str, list[Estimate | None]]:
    """Compute, by metric, each policy's mean with its 95 % interval over prompts; None without results by prompt."""
    return _intervals(read_results(evaluations))


def _intervals(results: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[Estimate | None]]:
    return {
        name: [mean(np.asarray([list(values.values())]), metric(name).unit == "%") if values else None for values in by]
        for name, by in results.items()
        if any(by)
    }


def find_best(rows: Sequence[Mapping[str, Any]], by: str) -> int | None:
    """The row with the best value of a metric; None if fewer than two rows have one."""
    several = sum(choosing.has(row, by) for row in rows) > 1
    return choosing.find_best(rows, by) if several else None


def sentences(
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Sequence[Mapping[str, float]]],
    by: str | None,
    wide: bool = False,
) -> list[str]:
    """Return sentences: how each measure changed from the first policy to the last, and which policy is marked.

    Args:
        results: by metric, each policy's results by prompt; empty if there are none.
        by: the metric whose best row is marked; None if no row is.
        wide: whether the table has all columns.
    """
    said = describe_changes(rows, results)
    if by is not None:
        more = "" if wide else " All columns: table.md among the results, or wide=true."
        said.append(f"{BEST} marks the best {metric(by).label}.{more}")
    return said


def describe_reached(summary: Mapping[str, Any]) -> str:
    """Return the measure of a run's first policy and of the one it keeps, such as ``score 22.3 → 30.1``."""
    rows = summary["table"]
    by = summary["choice"]["best"]["by"] if "choice" in summary else choosing.default_metric(rows)
    ends = [row for number, row in enumerate(rows) if number in (0, choosing.kept(summary))]
    shown = metric(by)
    values = ("–" if row.get(by) is None else shown.format(row[by]) for row in ends)
    return f"{shown.label} {' → '.join(values)}{' %' * (shown.unit == '%')}"


def list_places(where: Mapping[str, object], pages: Sequence[str], shown: Path | None = None) -> list[str]:
    """Return the last lines of a command: where its results are, and the commands that show them.

    Args:
        where: paths by label.
        pages: lines on where the tracked runs can be viewed; empty if nothing is tracked.
        shown: the folder of a run or of a sweep; None if no command shows the results.
    """
    lines = [f"{label:<{LABEL}}{path}" for label, path in where.items()] + [*pages]
    if shown is not None:
        folder = shlex.quote(os.path.relpath(shown))
        verbs = ["report", "browse"] if pages else ["browse"]  # a report reads what was tracked
        lines += [f"{'' if number else 'next':<{LABEL}}dnpo {verb} {folder}" for number, verb in enumerate(verbs)]
    return lines


def _read(evaluation: Path, name: str) -> dict[str, float]:
    import pyarrow.parquet as pq

    path = evaluation / "items.parquet"
    if not path.is_file():
        return {}
    kind, column = MEASURED[name]
    if name == "eval/loss":
        return loss_by_prompt(pq.read_table(path, columns=["id", "kind", "tokens", column]))
    return by_prompt(pq.read_table(path, columns=["id", "kind", column]), kind, column)
