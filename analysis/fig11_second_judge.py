"""Figures 11 and 12: figures 6 and 7 under a second judge that took no part in labelling."""

import sys

from analysis import fig06_judge_score, fig07_dnpo_vs_spin
from analysis.command import alone
from analysis.drawing import COLUMN, canvas, finish, foot, whiskers
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
    generated, _ = fig06_judge_score.split(scores)
    figure, (*above, last) = canvas(COLUMN, 5.4 + 0.27 * len(duels), 3, height_ratios=[6, 6, 1 + len(duels)])
    above[0].sharex(above[1])
    shows = fig06_judge_score.draw(above, scores, cells, "second")
    fig07_dnpo_vs_spin.draw(last, duels)
    last.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    judge = ", ".join(sorted({run.option("second_judge") or "unknown" for run in cells.used}))
    line = foot(
        cells,
        generated,
        f"Second judge: {judge}. {whiskers(cells, generated)}; of shares: 95 % Wilson intervals",
        *shows,
        "win − lose: paired 95 % t intervals, with the same correction over iterations",
    )
    rows = [{"part": "scores", **row} for row in scores] + [{"part": "duels", **row} for row in duels]
    return DrawnFigure(finish(figure, TITLE, line, above[0]), rows, cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig11_second_judge"))
