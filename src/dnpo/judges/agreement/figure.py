"""Draw a judge's agreement with people."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dnpo.catalogue import metric
from dnpo.judges.agreement.stats import multiples
from dnpo.judges.agreement.table import format_value, title
from dnpo.palette import CHANCE, GRID, JUDGE, PEOPLE, ROUND_SCORES

Row = tuple[str, str, str, float | None]  # measure, label, colour, level of chance


def draw(report: Mapping[str, Any], points: Sequence[float], path: Path) -> None:
    """Draw agreement, length bias, and scores or differences between the orders, with intervals.

    Args:
        report: the content of ``agreement.json``.
        points: the points of :func:`~dnpo.judges.agreement.compare`.
        path: the file to write; its suffix decides the format.
    """
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    measures = report["measures"]
    _rows(
        left,
        measures,
        (
            ("accuracy", "accuracy where\npeople prefer one", JUDGE, 0.5),
            ("kappa", "Cohen's κ: judge\nand people's label", JUDGE, 0.0),
            ("kappa_persons", "Cohen's κ: judge\nand one person, mean", JUDGE, 0.0),
            ("kappa_between_persons", "Cohen's κ: two\npersons, mean", PEOPLE, 0.0),
            ("fleiss_with_judge", "Fleiss' κ: persons\nand the judge", JUDGE, 0.0),
            ("fleiss_persons", "Fleiss' κ: persons\nalone", PEOPLE, 0.0),
        ),
    )
    left.set_title("Agreement with people\n", fontsize=10)
    left.set_xlabel("accuracy (a share) or κ (1: always agree)")
    _rows(
        middle,
        measures,
        (
            ("longer_judge", "the longer one\nwins, by the judge", JUDGE, 0.5),
            ("longer_people", "the longer one\nwins, by people", PEOPLE, 0.5),
            ("accuracy_longer", "accuracy where people\nprefer the longer one", JUDGE, 0.5),
            ("accuracy_shorter", "accuracy where people\nprefer the shorter one", JUDGE, 0.5),
        ),
    )
    middle.set_xlim(-0.03, 1.03)
    bias = format_value(measures["length_bias"]["value"], metric("agreement/length_bias")).replace(
        "pp", "percentage points"
    )
    middle.set_title(f"Length bias: {bias}\n(wins of the longer one: judge − people)", fontsize=10)
    middle.set_xlabel("share of rows")
    {"score": _scores, "pairwise": _orders, "relative": _relative}[report["mode"]](right, measures, points)
    figure.suptitle("\n".join(textwrap.wrap(title(report), 120)), fontsize=12)
    figure.supxlabel(_legend(report), fontsize=8)
    figure.savefig(path, dpi=130)


def _rows(axis: Axes, measures: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Draw a line for each measure: a dot with its interval, the level of chance, and the number on the right."""
    rows = [row for row in rows if measures[row[0]]["value"] is not None]
    for place, (name, _, colour, chance) in enumerate(rows):
        estimate = measures[name]
        value = estimate["value"]
        low, high = (estimate[end] if estimate[end] is not None else value for end in ("low", "high"))
        if chance is not None:
            axis.plot(
                [chance, chance], [place - 0.3, place + 0.3], color=CHANCE, linestyle=(0, (2, 1.5)), linewidth=1.4
            )
        axis.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot([value], [place], marker="o" if colour == JUDGE else "D", color=colour, markersize=6)
        axis.annotate(f"{value:.2f}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [words for _, words, _, _ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    ends = [0.0, *(measures[name]["low"] for name, *_ in rows if measures[name]["low"] is not None)]
    axis.set_xlim(min(ends) - 0.05, 1.03)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _scores(axis: Axes, measures: Mapping[str, Any], points: Sequence[float]) -> None:
    """Draw a histogram of scores in whole points, with multiples of 5 highlighted."""
    scores = np.array(points)
    edges = np.arange(-0.5, 101.5).tolist()
    axis.hist(scores, bins=edges, color=JUDGE, label="other scores")
    axis.hist(scores[multiples(scores, 5)], bins=edges, color=ROUND_SCORES, label="multiples of 5")
    axis.legend(frameon=False, fontsize=8)
    fives, bits = (
        format_value(measures[name]["value"], metric(f"agreement/{name}")) for name in ("multiples_of_5", "entropy")
    )
    axis.set_title(f"Scores: {fives} multiples of 5 (by chance 21 %),\nentropy {bits} of 6.7", fontsize=10)
    axis.set_xlabel("score of one response, points")
    axis.set_ylabel("responses")
    _open(axis)


def _orders(axis: Axes, measures: Mapping[str, Any], points: Sequence[float]) -> None:
    """Draw a histogram of the differences between the two orders of a comparison."""
    axis.hist(points, bins=np.arange(0.0, 105.0, 5.0).tolist(), color=JUDGE)
    flips = format_value(measures["flips"]["value"], metric("agreement/flips"))
    axis.set_title(f"The verdict depends on the order\nin {flips} of the rows", fontsize=10)
    axis.set_xlabel("difference between a row's scores in both orders, points")
    axis.set_ylabel("rows")
    _open(axis)


def _relative(axis: Axes, measures: Mapping[str, Any], points: Sequence[float]) -> None:
    """Draw a histogram of scores of one response against the other."""
    axis.hist(points, bins=np.arange(0.0, 105.0, 5.0).tolist(), color=JUDGE)
    axis.axvline(50, color=CHANCE, linestyle=(0, (2, 1.5)), linewidth=1.4)
    axis.set_title("Scores of B against A\n", fontsize=10)
    axis.set_xlabel("score of B, points; above 50: B is better")
    axis.set_ylabel("rows")
    _open(axis)


def _open(axis: Axes) -> None:
    axis.set_xlim(-2, 102)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(report: Mapping[str, Any]) -> str:
    count = report["rows"] - report["unscored"]
    return (
        f"Dots: {count:,} rows; bars: 95 % bootstrap intervals. Circles: the judge; diamonds: people "
        "only; dashed: chance."
    )
