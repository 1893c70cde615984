"""Table 7: fixed against trainable noise (+NPO), and (not in the paper) a constant with the same mean effect."""

import sys

from analysis.command import alone
from analysis.comparing import Comparisons, label, last
from analysis.keeping import DrawnTable
from analysis.published import BRANCHES, COLUMN
from analysis.selection import CONSTANT, FIXED, NPO, SPIN, Runs

TITLE = "One iteration with trainable noise (+NPO), fixed noise, or a constant in its place"
SWEEP = "fixed_vs_trainable"


def make(runs: Runs) -> DrawnTable:
    """Select; compare all with SPIN, and trainable noise with both others, in the same iteration; tabulate."""
    cells = runs.branches(matters=["eval.leaderboard"]).only([SPIN, FIXED, NPO, CONSTANT])
    comparisons = Comparisons.of(cells)
    for k in cells.iterations:
        for method in cells.methods:
            comparisons.add(label(method, k), method, [k], SPIN, last(BRANCHES, method, k))
        for other in (FIXED, CONSTANT):
            if {NPO, other} <= set(cells.methods):
                ours, theirs = last(BRANCHES, NPO, k), last(BRANCHES, other, k)
                paper = None if ours is None or theirs is None else ours - theirs
                comparisons.difference(label(f"{NPO} − {other}", k), NPO, other, k, paper)
    notes = comparisons.notes(
        "Stars: against SPIN in the same iteration; in rows of differences, against 0. Constant: the mean effect of "
        f"the trainable noise of the same iteration and seed, without noise. {COLUMN}: arXiv 2502.05400, table 7."
    )
    return DrawnTable(comparisons.table(), TITLE, "method", notes, cells.used)


if __name__ == "__main__":
    sys.exit(alone("table07_fixed_vs_trainable"))
