"""Figure 6: the judge's mean score of generated and human responses, and the differences from SPIN."""

import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from analysis.command import alone
from analysis.drawing import COLUMN, canvas, finish, foot, levels, whiskers
from analysis.keeping import DrawnFigure
from analysis.results import human_score, over_base, over_iterations, score
from analysis.selection import SPIN, Cells, Runs
from dnpo.palette import HUMAN

TITLE = "Judge score of generated responses over iterations"
SWEEP = "main"


def numbers(cells: Cells, column: str = "score") -> list[dict[str, Any]]:
    """A row for each method and iteration, then each difference from SPIN; the last row is the human responses'."""
    measure = score(column)
    human = {"method": "human responses", "measure": measure.label, "mean": human_score(cells, column)}
    return [*over_iterations(cells, measure), *over_base(cells, [measure], SPIN), human]


def split(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The levels of generated responses, and the differences."""
    return [row for row in rows[:-1] if "base" not in row], [row for row in rows[:-1] if "base" in row]


def draw(
    panels: Sequence[Axes], rows: Sequence[dict[str, Any]], cells: Cells, column: str = "score"
) -> tuple[str, ...]:
    """Draw a line for each method and one for the human responses, and the differences in the second panel."""
    panels[0].axhline(rows[-1]["mean"], color=HUMAN, linestyle="--", linewidth=1, label="human responses")
    return levels(panels, *split(rows), cells, score(column).metric)


def make(runs: Runs) -> DrawnFigure:
    """Select, average, draw."""
    cells = runs.chains()
    rows = numbers(cells)
    generated, less = split(rows)
    figure, panels = canvas(COLUMN, 2.4 + 1.7 * bool(less), 1 + bool(less), sharex=True)
    shows = draw(panels, rows, cells)
    line = foot(cells, generated, f"Sampled answers to held-out prompts. {whiskers(cells, generated)}", *shows)
    return DrawnFigure(finish(figure, TITLE, line, panels[0]), rows, cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig06_judge_score"))
