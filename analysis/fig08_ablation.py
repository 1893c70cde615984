"""Figure 8: one iteration with labels by quality, with noise, and with both, each from the same SPIN model."""

import sys

from analysis.branching import draw
from analysis.command import alone
from analysis.keeping import DrawnFigure
from analysis.selection import DNPO, DSL, NPO, SPIN, Runs

TITLE = "One iteration of SPIN, +DSL, +NPO and DNPO from the same SPIN model"
SWEEP = "ablation"


def make(runs: Runs) -> DrawnFigure:
    """Select and draw."""
    return draw(runs, [SPIN, DSL, NPO, DNPO], TITLE)


if __name__ == "__main__":
    sys.exit(alone("fig08_ablation"))
