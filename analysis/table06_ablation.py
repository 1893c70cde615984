"""Table 6: one iteration with labels by quality, with noise, and with both, each from the same SPIN model."""

import sys

from analysis.command import alone
from analysis.comparing import Comparisons, label, last
from analysis.keeping import DrawnTable
from analysis.published import BRANCHES, COLUMN
from analysis.selection import DNPO, DSL, NPO, SPIN, Runs

TITLE = "One iteration of SPIN, +DSL, +NPO and DNPO from the same SPIN model"
SWEEP = "ablation"


def make(runs: Runs) -> DrawnTable:
    """Select, compare with SPIN in the same iteration, tabulate."""
    cells = runs.branches(matters=["eval.leaderboard"]).only([SPIN, DSL, NPO, DNPO])
    comparisons = Comparisons.of(cells)
    for k in cells.iterations:
        for method in cells.methods:
            comparisons.add(label(method, k), method, [k], SPIN, last(BRANCHES, method, k))
    notes = comparisons.notes(f"Stars: against SPIN in the same iteration. {COLUMN}: arXiv 2502.05400, table 6.")
    return DrawnTable(comparisons.table(), TITLE, "method", notes, cells.used)


if __name__ == "__main__":
    sys.exit(alone("table06_ablation"))
