"""Figure 5: the average over benchmarks after each iteration, and its differences from SPIN."""

import sys

from analysis import published
from analysis.command import alone
from analysis.drawing import COLUMN, canvas, find_look, finish, foot, levels, whiskers
from analysis.keeping import DrawnFigure
from analysis.results import average, benchmarks, over_base, over_iterations
from analysis.selection import SPIN, Runs

TITLE = "Benchmark average over iterations"
SWEEP = "main"


def make(runs: Runs) -> DrawnFigure:
    """Select, average, draw; with the paper's curves if the runs have the paper's setting."""
    cells = runs.chains(matters=["eval.leaderboard"])
    those = benchmarks(cells)
    measure = average(those)
    rows = over_iterations(cells, measure)
    less = over_base(cells, [measure], SPIN)
    figure, (axis, *below) = canvas(COLUMN, 2.2 + 1.7 * bool(less), 1 + bool(less), sharex=True)
    shows = levels([axis, *below], rows, less, cells, measure.metric)
    if published.comparable(cells.used):
        for method in cells.methods:
            points = [(i, published.MAIN.get((method, k))) for i, k in enumerate(cells.iterations)]
            known = [(i, 100 * cell[-1]) for i, cell in points if cell]
            if known:
                shade = find_look(method).colour
                axis.plot(*zip(*known, strict=True), ":", color=shade, alpha=0.5, label=f"{method}, paper")
    line = foot(
        cells,
        rows,
        whiskers(cells, rows, "share"),
        *shows,
        f"benchmarks: {', '.join(each.label for each in those)}",
    )
    return DrawnFigure(finish(figure, TITLE, line, axis), [*rows, *less], cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig05_benchmark"))
