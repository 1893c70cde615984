"""Figures 8 and 13: bars with benchmark scores of methods that branch off the SPIN chain."""

from collections.abc import Sequence
from typing import Any

from analysis import published
from analysis.drawing import bars, canvas, finish, foot, whiskers
from analysis.keeping import DrawnFigure
from analysis.results import AVERAGE, average, benchmarks, is_leaderboard, row
from analysis.selection import SPIN, Runs, spell
from dnpo.palette import INK


def draw(runs: Runs, methods: Sequence[str], title: str) -> DrawnFigure:
    """Draw a panel for each iteration, a group of bars for each benchmark, and a bar for each method."""
    cells = runs.branches(matters=["eval.leaderboard"]).only(methods)
    cells.needs(SPIN)
    those = benchmarks(cells)
    measures = [*those, average(those)]
    rows = [
        row(cells, measure, method, k)
        for k in cells.iterations
        for method in cells.methods
        for measure in measures
        if cells.seeds_of((method, k))
    ]
    figure, panels = canvas(9.0, 1.4 + 2.1 * len(cells.iterations), len(cells.iterations), 1, sharex=True, sharey=True)
    for axis, k in zip(panels, cells.iterations, strict=True):
        mine = [each for each in rows if each["iteration"] == k]
        bars(axis, mine, [measure.label for measure in measures], cells.methods)
        axis.set_title(f"one iteration from SPIN, {spell(k)}", loc="left")
        axis.set_ylabel(f"score, {those[0].metric.unit}" if is_leaderboard(those) else measures[-1].metric.axis)
        if published.comparable(cells.used):
            _overlay(axis, [measure.label for measure in measures], cells.methods, k)
    kind = "the Open LLM Leaderboard's" if is_leaderboard(those) else "families of the tiny world, greedy answers"
    line = foot(cells, rows, whiskers(cells, rows), f"benchmarks: {kind}; {AVERAGE}: each counts the same")
    return DrawnFigure(finish(figure, title, line, panels[0]), rows, cells.used)


def _overlay(axis: Any, groups: Sequence[str], methods: Sequence[str], iteration: Any) -> None:
    """Draw the paper's numbers as short lines over the bars."""
    wide = 0.8 / len(methods)
    for number, method in enumerate(methods):
        cell = published.BRANCHES.get((method, iteration))
        if cell and len(cell) == len(groups):
            x = [place + wide * (number - (len(methods) - 1) / 2) for place in range(len(groups))]
            axis.scatter(x, [100 * value for value in cell], marker="_", color=INK, alpha=0.4, zorder=3)
