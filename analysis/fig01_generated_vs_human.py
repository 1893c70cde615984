"""Figure 1: how often a generated response is at least as good as the human one, after each iteration."""

import sys
from typing import Any

from analysis.command import alone
from analysis.drawing import COLUMN, canvas, finish, foot, from_to, outcomes, write_beside_bars
from analysis.keeping import DrawnFigure
from analysis.results import outcome, over_iterations
from analysis.selection import Cells, Runs, spell

TITLE = "Generated responses against human ones: win, tie, lose"
SWEEP = "main"


def numbers(cells: Cells, column: str = "score") -> list[dict[str, Any]]:
    """A row for each method and iteration: shares in percent with intervals; ``as_good`` is a win or a tie."""
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for name in ("win", "tie", "lose", "as_good"):
        for row in over_iterations(cells, outcome(name, column)):
            place = found.setdefault(
                (row["method"], row["iteration"]),
                {key: row[key] for key in ("method", "iteration", "seeds", "items", "unscored")},
            )
            place |= {f"{name}_{end}": row[end] for end in ("mean", "low", "high")}
    return list(found.values())


def make(runs: Runs) -> DrawnFigure:
    """Select, count, draw."""
    cells = runs.chains()
    rows = numbers(cells)
    methods = cells.methods
    height = 1.4 + (0.3 + 0.24 * len(cells.iterations)) * len(methods)
    figure, panels = canvas(COLUMN, height, len(methods), sharex=True)
    for axis, method in zip(panels, methods, strict=True):
        mine = {row["iteration"]: row for row in rows if row["method"] == method}
        shown = [k for k in cells.iterations if k in mine]
        outcomes(axis, [mine[k] for k in shown], [spell(k) for k in shown])
        write_beside_bars(axis, "win or tie", [from_to(mine[k], "as_good_") for k in shown])
        axis.set_title(method, loc="left")
        axis.set_ylabel("policy after")
        axis.label_outer()
    line = foot(
        cells,
        rows,
        "Sampled answers to held-out prompts; a win scores higher than the human response under the judge; whiskers "
        "and brackets: 95 % Wilson intervals",
    )
    return DrawnFigure(finish(figure, TITLE, line, panels[0]), rows, cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig01_generated_vs_human"))
