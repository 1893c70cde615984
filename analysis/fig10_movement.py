"""Figure 10: the same as figure 2 for DNPO, whose samples keep changing."""

import sys

from analysis.command import alone
from analysis.densities import draw
from analysis.keeping import DrawnFigure
from analysis.selection import DNPO, Runs

TITLE = "DNPO: log-probabilities of positive, negative and next generated samples"
SWEEP = "main"


def make(runs: Runs) -> DrawnFigure:
    """Select and draw."""
    return draw(runs, DNPO, TITLE)


if __name__ == "__main__":
    sys.exit(alone("fig10_movement"))
