"""Figures 11 and 12: figures 6 and 7 under a second judge that took no part in labelling."""

import sys

from analysis import fig06_judge_score, fig07_dnpo_vs_spin
from analysis.command import alone
from analysis.drawing import canvas, finish, foot, whiskers
from analysis.keeping import DrawnFigure
from analysis.selection import DNPO, SPIN, Absent, Runs

TITLE = "Under a second judge: scores over iterations, and DNPO against SPIN"
SWEEP = "main"
ALSO = ("fig12",)


def make(runs: Runs) -> DrawnFigure:
    """Select, average and compare, draw side by side."""
    cells = runs.chains(matters=["second_judge."]).only([DNPO, SPIN])
    if any("second/score" not in run.row(k) for (_, k, _), run in cells.runs.items()):
        raise Absent("the runs have no second judge (judge@second_judge=…)")
    scores, duels = fig06_judge_score.numbers(cells, "second"), fig07_dnpo_vs_spin.table(cells, "second")
    figure, (left, right) = canvas(11.0, 4.2, 1, 2)
    fig06_judge_score.draw(left, scores, cells, "second")
    fig07_dnpo_vs_spin.draw(right, duels)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    judge = ", ".join(sorted({run.option("second_judge") or "unknown" for run in cells.used}))
    line = foot(
        cells,
        scores[:-1],
        f"Second judge: {judge}. {whiskers(cells, scores[:-1])}; *: p ≤ 0.05 after Holm's correction",
    )
    rows = [{"part": "scores", **row} for row in scores] + [{"part": "duels", **row} for row in duels]
    return DrawnFigure(finish(figure, TITLE, line), rows, cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig11_second_judge"))
