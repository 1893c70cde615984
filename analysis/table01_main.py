"""Table 1: benchmarks of the SFT model and of every method's chain."""

import sys

from analysis.command import alone
from analysis.comparing import Comparisons, label, last
from analysis.keeping import DrawnTable
from analysis.published import COLUMN, MAIN
from analysis.selection import BEGINNING, SPIN, Runs

TITLE = "Benchmarks over iterations"
SWEEP = "main"


def make(runs: Runs) -> DrawnTable:
    """Select, compare every method with SPIN at the same iteration, tabulate."""
    cells = runs.chains(matters=["eval.leaderboard"])
    comparisons = Comparisons.of(cells)
    for k in cells.iterations:
        for method in cells.methods:
            if k in BEGINNING and method != cells.methods[0]:
                continue  # the same policy
            name = label(method, k) if k != "SFT" else "SFT"
            comparisons.add(name, method, [k], SPIN, last(MAIN, method, k))
    notes = comparisons.notes(f"Stars: against SPIN at the same iteration. {COLUMN}: arXiv 2502.05400, table 1.")
    return DrawnTable(comparisons.table(), TITLE, "policy", notes, cells.used)


if __name__ == "__main__":
    sys.exit(alone("table01_main"))
