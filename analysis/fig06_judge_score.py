"""Figure 6: the judge's mean score of generated responses after each iteration, and of human responses."""

import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from analysis.command import alone
from analysis.drawing import canvas, finish, foot, lines, whiskers
from analysis.keeping import DrawnFigure
from analysis.results import human_score, over_iterations, score
from analysis.selection import Cells, Runs
from dnpo.palette import HUMAN

TITLE = "Judge score of generated responses over iterations"
SWEEP = "main"


def numbers(cells: Cells, column: str = "score") -> list[dict[str, Any]]:
    """A row for each method and iteration; the last row is for the human responses."""
    measure = score(column)
    human = {"method": "human responses", "measure": measure.label, "mean": human_score(cells, column)}
    return [*over_iterations(cells, measure), human]


def draw(axis: Axes, rows: Sequence[dict[str, Any]], cells: Cells, column: str = "score") -> None:
    """Draw a line for each method and one for the human responses."""
    *generated, human = rows
    lines(axis, generated, cells.iterations)
    axis.axhline(human["mean"], color=HUMAN, linestyle="--", linewidth=1.2, label="human responses")
    axis.set_ylabel("\n".join(textwrap.wrap(score(column).metric.axis, 36)))
    axis.legend()


def make(runs: Runs) -> DrawnFigure:
    """Select, average, draw."""
    cells = runs.chains()
    rows = numbers(cells)
    figure, (axis,) = canvas(6.0, 4.2)
    draw(axis, rows, cells)
    line = foot(cells, rows[:-1], f"Sampled answers to held-out prompts. {whiskers(cells, rows[:-1])}")
    return DrawnFigure(finish(figure, TITLE, line), rows, cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig06_judge_score"))
