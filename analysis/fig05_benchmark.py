"""Figure 5: the average over benchmarks after each iteration."""

import sys

from analysis import published
from analysis.command import alone
from analysis.drawing import canvas, find_look, finish, foot, lines, whiskers
from analysis.keeping import DrawnFigure
from analysis.results import average, benchmarks, over_iterations
from analysis.selection import Runs

TITLE = "Benchmark average over iterations"
SWEEP = "main"


def make(runs: Runs) -> DrawnFigure:
    """Select, average, draw; with the paper's curves if the runs have the paper's setting."""
    cells = runs.chains(matters=["eval.leaderboard"])
    those = benchmarks(cells)
    measure = average(those)
    rows = over_iterations(cells, measure)
    figure, (axis,) = canvas(6.0, 4.2)
    lines(axis, rows, cells.iterations)
    if published.comparable(cells.used):
        for method in cells.methods:
            points = [(i, published.MAIN.get((method, k))) for i, k in enumerate(cells.iterations)]
            known = [(i, 100 * cell[-1]) for i, cell in points if cell]
            if known:
                shade = find_look(method).colour
                axis.plot(*zip(*known, strict=True), ":", color=shade, alpha=0.5, label=f"{method}, paper")
    axis.set_ylabel(measure.metric.axis)
    axis.legend()
    line = foot(cells, rows, whiskers(cells, rows), f"benchmarks: {', '.join(each.label for each in those)}")
    return DrawnFigure(finish(figure, TITLE, line), rows, cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig05_benchmark"))
