"""Figures 8 and 13: benchmark scores of methods that branch off the SPIN chain, and their differences from SPIN."""

from collections.abc import Sequence
from typing import Any

from analysis import published
from analysis.drawing import COLUMN, beside, canvas, find_look, finish, foot, points, whiskers
from analysis.keeping import DrawnFigure
from analysis.results import AVERAGE, average, benchmarks, is_leaderboard, over_base, row
from analysis.selection import SPIN, Runs, spell
from analysis.watched import warn
from dnpo.palette import INK


def draw(runs: Runs, methods: Sequence[str], title: str) -> DrawnFigure:
    """Draw two panels for each iteration, levels and paired differences, with a group of points for each benchmark."""
    cells = runs.branches(matters=["eval.leaderboard"]).only(methods)
    cells.needs(SPIN)
    those = benchmarks(cells)
    measures = [*those, average(those)]
    groups = [measure.label for measure in measures]
    rows = [
        row(cells, measure, method, k)
        for k in cells.iterations
        for method in cells.methods
        for measure in measures
        if cells.seeds_of((method, k))
    ]
    less = over_base(cells, measures, SPIN)
    high = (0.04 + 0.085 * len(cells.methods)) * len(groups)
    figure, panels = canvas(
        COLUMN, 1.6 + (high + 0.25) * len(cells.iterations), len(cells.iterations), 2, sharex="col", sharey=True
    )
    unit = those[0].metric.unit if is_leaderboard(those) else measures[-1].metric.unit
    for k, left, right in zip(cells.iterations, panels[::2], panels[1::2], strict=True):
        points(left, [each for each in rows if each["iteration"] == k], groups, cells.methods)
        points(right, [each for each in less if each["iteration"] == k], groups, cells.methods)
        right.axvline(0, color=find_look(SPIN).colour, linewidth=0.8)
        left.set_title(f"one iteration from SPIN, {spell(k)}", loc="left")
        if published.comparable(cells.used):
            _overlay(left, groups, cells.methods, k)
    left.set_xlabel(f"{'score' if is_leaderboard(those) else 'right greedy answers'}, {unit}")
    right.set_xlabel(f"difference from {SPIN}, pp")
    kind = "the Open LLM Leaderboard's" if is_leaderboard(those) else "families of the tiny world, greedy answers"
    line = foot(
        cells,
        rows,
        whiskers(cells, rows, "share"),
        f"right: differences from {SPIN} in the same iteration, paired by item and seed, with 95 % t intervals",
        f"benchmarks: {kind}; {AVERAGE}: each counts the same",
        *warn(cells, [row for row in less if row["measure"] == AVERAGE]),
    )
    return DrawnFigure(finish(figure, title, line, panels[0]), [*rows, *less], cells.used)


def _overlay(axis: Any, groups: Sequence[str], methods: Sequence[str], iteration: Any) -> None:
    """Draw the paper's numbers as short lines over the points."""
    for method in methods:
        cell = published.BRANCHES.get((method, iteration))
        if cell and len(cell) == len(groups):
            heights = [beside(groups, methods, group, method) for group in groups]
            axis.scatter([100 * value for value in cell], heights, marker="|", color=INK, alpha=0.4, zorder=3)
