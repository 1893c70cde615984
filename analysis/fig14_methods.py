"""Figure 14: the results of each method against its costs, and its distance from the initial policy."""

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from analysis.command import alone
from analysis.costs import BEGINNING, COSTS, KL, LENGTH, beginning, end, kind_of, quality, reached
from analysis.drawing import PAGE, SMALL, canvas, finish, foot, spread
from analysis.keeping import DrawnFigure
from analysis.results import Array, Kind, estimate, numbers, scaled, size
from analysis.selection import Cells, Runs
from dnpo.catalogue import Metric
from dnpo.palette import BREAK, INK, OTHER, RIVALS, START

TITLE = "Results of the methods against their costs"
SWEEP = "methods"
ACROSS = (*(cost.metric for cost in COSTS), KL.metric, LENGTH.metric)
COLUMNS = len(ACROSS) // 2
FAINT = 0.45  # opacity of intervals
WIDE = 44  # letters of a line above a panel
LEVELS = (1, 3)  # multiples of each power of ten that are marked, if the axis has fewer than two powers of ten


def make(runs: Runs) -> DrawnFigure:
    """Select, add up, draw score and accuracy over each of six quantities."""
    cells = runs.rivals()
    rows = [_row(cells, method) for method in cells.methods]
    up = [measure.metric for measure in quality(cells)]
    first = {
        measure.name: measure.metric.scale * estimate(reached(beginning(cells), measure, BEGINNING)).value
        for measure in quality(cells)
    }
    figure, panels = canvas(PAGE, 8.6, 2 * len(up), COLUMNS, sharey="row")
    for axis, (measure, over) in zip(panels, product(up, ACROSS), strict=True):
        axis.axhline(first[measure.name], color=START, linewidth=0.8, linestyle=":", label=BEGINNING)
        _draw(axis, rows, over.name, measure.name)
        axis.set_xlabel(fill(over.axis, 34))
        if over in (ACROSS[0], ACROSS[COLUMNS]):
            axis.set_ylabel(fill(measure.axis, 24))
    for start in range(0, len(panels), len(ACROSS)):
        those = panels[start : start + len(ACROSS)]
        limits = [axis.get_ylim() for axis in those]
        for axis in those:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    kinds = "95 % intervals (accuracy: Wilson; score: t; costs: t of logarithms)"
    shows = (
        f"Bars: {kinds} over seeds, of score and accuracy over items too"
        if len(cells.seeds) > 1
        else f"Bars: {kinds} of score and accuracy over items; the others have none"
    )
    note = (
        "above each panel, from left to right: the methods on the grey line, which no other method beats with less of "
        "what is below the panel, without regard to intervals; "
        "totals are over the iterations of a run, without fine-tuning, which all share, and without measuring; seconds "
        "are those of the machine that computed a stage, which may have been busy; intervals end at a panel's edge"
    )
    return DrawnFigure(finish(figure, TITLE, foot(cells, rows, shows, note), panels[0]), rows, cells.used)


def _row(cells: Cells, method: str) -> dict[str, Any]:
    """All numbers of a method, each in the unit of its metric; the number of items is the score's."""
    found: dict[str, tuple[Metric, Kind, Array]] = {}
    for measure in (*quality(cells), KL, LENGTH):
        found[measure.name] = measure.metric, kind_of(measure), reached(cells, measure, method)
    for cost in COSTS:
        found[cost.metric.name] = cost.metric, "amount", cost(cells, method)
    row: dict[str, Any] = {"method": method, "iteration": end(cells, method)}
    for name, (metric, of, x_SI) in found.items():
        row |= numbers(scaled(estimate(x_SI, of), metric.scale), f"{name}_")
    return row | size(next(iter(found.values()))[2])


def _draw(axis: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    """Draw a point for each method, with intervals if there are any, and name those that no other one dominates."""
    if x != LENGTH.name:
        _name_best(axis, rows, f"{x}_mean", f"{y}_mean")
    for row in rows:
        look = RIVALS.get(row["method"], OTHER)
        _, _, bars = axis.errorbar(
            [row[f"{x}_mean"]],
            [row[f"{y}_mean"]],
            xerr=spread([row], f"{x}_"),
            yerr=spread([row], f"{y}_"),
            color=look.colour,
            marker=look.mark,
            markersize=3.6,
            linestyle="none",
            elinewidth=0.5,
            label=row["method"],
        )
        for bar in bars:
            bar.set_alpha(FAINT)
    if x != LENGTH.name:
        _scale(axis, [row[f"{x}_mean"] for row in rows], [row[f"{x}_high"] or 0.0 for row in rows])


def _name_best(axis: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    """Draw a line through the methods that are better than all others with x as small; name them above the panel."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[x], -row[y])):
        if not best or row[y] > best[-1][y]:
            best.append(row)
    axis.plot([row[x] for row in best], [row[y] for row in best], color=BREAK, linewidth=1, drawstyle="steps-post")
    names = fill(" › ".join(row["method"].replace(" ", "\N{NO-BREAK SPACE}") for row in best), WIDE)
    axis.set_title(names, loc="left", fontsize=SMALL, color=INK)


def _scale(axis: Axes, values: Sequence[float], highs: Sequence[float]) -> None:
    """Choose a linear scale with room for 0, or a logarithmic one if methods differ by more than ten times.

    A logarithmic axis begins below the smallest value, so that an interval that reaches below 0 is cut there.

    Args:
        highs: upper ends of the intervals.
    """
    least, most = min((value for value in values if value > 0), default=1.0), max(values)
    zero = min(values) == 0
    if most > 10 * least:
        axis.set_xscale("symlog", linthresh=least)
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        for levels in (LEVELS[:1], LEVELS):
            ticks = [level * 10.0**power for power in powers for level in levels]
            shown = [tick for tick in ticks if least / 2 < tick <= 1.1 * most]
            if len(shown) > 1:
                break
        axis.set_xticks([0.0] * zero + shown)
        axis.set_xticks([], minor=True)
        axis.set_xlim(-0.2 * least if zero else least / 1.6, 1.25 * max(most, min(max(highs), 3 * most)))
    elif zero:
        axis.set_xlim(left=-0.2 * least)
    axis.xaxis.set_major_formatter(EngFormatter(sep="") if most >= 1000 else StrMethodFormatter("{x:g}"))


if __name__ == "__main__":
    sys.exit(alone("fig14_methods"))
