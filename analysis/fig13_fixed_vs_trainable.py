"""Figure 13: fixed against trainable noise (+NPO), and (not in the paper) a constant with the same mean effect."""

import sys

from analysis.branching import draw
from analysis.command import alone
from analysis.keeping import DrawnFigure
from analysis.selection import CONSTANT, FIXED, NPO, SPIN, Runs

TITLE = "One iteration with trainable noise (+NPO), fixed noise, or a constant in its place"
SWEEP = "fixed_vs_trainable"


def make(runs: Runs) -> DrawnFigure:
    """Select and draw."""
    cells = [SPIN, FIXED, NPO, CONSTANT]
    return draw(runs, cells, TITLE)


if __name__ == "__main__":
    sys.exit(alone("fig13_fixed_vs_trainable"))
