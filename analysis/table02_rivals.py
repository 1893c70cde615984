"""Table 2: DNPO, and the paper's numbers for PPO and α-SPIN, which this laboratory does not have yet."""

import sys

from analysis.command import alone
from analysis.comparing import Comparisons
from analysis.keeping import DrawnTable
from analysis.published import COLUMN, RIVALS
from analysis.selection import BEGINNING, DNPO, SPIN, Runs
from dnpo.stats.intervals import Estimate
from dnpo.stats.table import Cell

TITLE = "DNPO and methods that mix or renew their data"
SWEEP = "main"


def make(runs: Runs) -> DrawnTable:
    """Select, average DNPO and SPIN over the iterations after 0, tabulate."""
    cells = runs.chains(matters=["eval.leaderboard"]).only([SPIN, DNPO], lambda k: k not in BEGINNING)
    cells.needs(DNPO)
    comparisons, ks = Comparisons.of(cells), cells.iterations
    over = f"mean of k={ks[0]}..{ks[-1]}" if len(ks) > 1 else f"k={ks[0]}"
    for method in cells.methods:
        comparisons.add(f"{method}, {over}", method, ks, SPIN, RIVALS[DNPO][-1] if method == DNPO else None)
    for method in ("PPO", "α-SPIN"):
        comparisons.rows[f"{method} (not run here)"] = {COLUMN: Cell(Estimate(RIVALS[method][-1]))}
    notes = comparisons.notes(
        f"Stars: against SPIN. {COLUMN}: arXiv 2502.05400, table 2, which does not say the iteration; DNPO's six "
        "numbers there average 59.8. PPO and α-SPIN are not run here: the laboratory has neither."
    )
    return DrawnTable(comparisons.table(), TITLE, "method", notes, cells.used)


if __name__ == "__main__":
    sys.exit(alone("table02_rivals"))
