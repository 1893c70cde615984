"""Figure 2: SPIN stagnates. Its next samples have the same log-probabilities as the samples just rejected."""

import sys

from analysis.command import alone
from analysis.densities import draw
from analysis.keeping import DrawnFigure
from analysis.selection import SPIN, Runs

TITLE = "SPIN: log-probabilities of positive, negative and next generated samples"
SWEEP = "main"


def make(runs: Runs) -> DrawnFigure:
    """Select and draw."""
    return draw(runs, SPIN, TITLE)


if __name__ == "__main__":
    sys.exit(alone("fig02_stagnation"))
