"""Figure 14: results of each method, and its distance from the initial policy, against what the method costs."""

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from textwrap import fill
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from analysis.command import alone
from analysis.costs import (
    BEGINNING,
    FLOP,
    GENERATED,
    KL,
    SECONDS,
    TOKENS,
    VERDICTS,
    Cost,
    beginning,
    end,
    kind_of,
    quality,
    reached,
    training,
)
from analysis.drawing import PAGE, SMALL, canvas, finish, foot, spread
from analysis.fronts import POINTS, SHARE, Tests, compare_pairs, find_beaten
from analysis.keeping import DrawnFigure
from analysis.results import Array, PolicyMeasure, estimate, numbers, scaled, size
from analysis.selection import Cells, Runs
from dnpo.palette import BREAK, INK, OTHER, PAPER, RIVALS, START

TITLE = "What the methods reach, for what cost, and how far from the initial policy"
SWEEP = "methods"
FAINT = 0.45  # opacity of intervals
LONG = 24  # letters of a line beside a row of panels: a longer one would reach into the rows above and below
WIDE = 26  # letters of a line above a panel
LEVELS = (1, 3)  # multiples of each power of ten that are marked, if the axis has fewer than two powers of ten


def make(runs: Runs) -> DrawnFigure:
    """Select, add up; draw score, accuracy and KL over each cost, and score and accuracy over KL."""
    cells = runs.rivals()
    cost = training(cells)
    up, across = (*quality(cells), KL), (GENERATED, VERDICTS, cost, SECONDS, KL)
    rows = [_row(cells, method, [*up, *across[:-1], TOKENS]) for method in cells.methods]
    tests = {each.metric.name: _test(cells, each) for each in (*up[:-1], *across)}
    figure, panels = canvas(PAGE, 7.4, len(up), len(across), sharex="col", sharey="row")
    panels.pop().remove()  # of KL over KL
    for place, axis in enumerate(panels):
        y, x = up[place // len(across)], across[place % len(across)]
        if y is not KL:
            off = find_beaten(cells.methods, tests[x.metric.name], tests[y.metric.name])
            for row in rows:
                row[f"beaten_by:{y.metric.name}:{x.metric.name}"] = off.get(row["method"], "")
            begun = y.metric.scale * estimate(reached(beginning(cells), y, BEGINNING)).value
            axis.axhline(begun, color=START, linewidth=0.8, linestyle=":")
            _name_best(axis, rows, f"{x.metric.name}_mean", f"{y.metric.name}_mean")
        _draw(axis, rows, [] if y is KL else off, x.metric.name, y.metric.name)
        if x is across[0]:
            axis.set_ylabel(f"{fill(y.metric.axis, LONG)}\n({'less' if y is KL else 'more'} is better)")
        if y is KL or (x is KL and y is up[-2]):
            axis.set_xlabel(fill(x.metric.axis, 22))
            axis.tick_params(labelbottom=True)
        if x is KL:
            axis.xaxis.set_in_layout(False)  # there is room below the last panel
    key = panels[-1]
    key.plot([], [], color=START, linewidth=0.8, linestyle=":", label=BEGINNING)
    key.plot([], [], color=BREAK, linewidth=1, label="front of the means")
    key.plot(
        [], [], color=INK, marker="o", markerfacecolor=PAPER, markersize=3.6, linestyle="none", label="off the front"
    )
    kinds = "accuracy: Wilson; score: t"
    shows = (
        f"Bars: 95 % intervals over seeds, and for score and accuracy also over items ({kinds}; costs and KL: t of "
        "logarithms)"
        if len(cells.seeds) > 1
        else f"Bars: 95 % intervals of score and accuracy over items ({kinds}); the others have none, so no method is "
        "certainly off the front"
    )
    notes = (
        "hollow (rows of score and accuracy): certainly off the front, since another method is better in one of the "
        f"panel's two quantities and not worse in the other. Differences of up to {100 * POINTS:g} point, or "
        f"{100 * SHARE:g} % of a cost or KL, count as equal (one-sided paired t tests with Bonferroni's correction "
        "over the other methods); filled: all others",
        "grey line: the front of the means, without regard to intervals; its methods are above the panel, from left to "
        "right",
        "costs are totals over the iterations of a run, without fine-tuning, which all share, and without measuring"
        + "; operations of training are 6 for each weight and token, without the reference's" * (cost is FLOP)
        + "; seconds are those of the machine that computed a stage, which may have been busy; intervals end at a "
        "panel's edge",
    )
    return DrawnFigure(finish(figure, TITLE, foot(cells, rows, shows, *notes), key), rows, cells.used)


def _row(cells: Cells, method: str, shown: Sequence[PolicyMeasure | Cost]) -> dict[str, Any]:
    """All numbers of a method, each in the unit of its metric; the number of items is the score's."""
    row: dict[str, Any] = {"method": method, "iteration": end(cells, method)}
    for of in shown:
        value = estimate(_values(cells, of, method), kind_of(of))
        row |= numbers(scaled(value, of.metric.scale), f"{of.metric.name}_")
    return row | size(_values(cells, shown[0], method))


def _values(cells: Cells, of: PolicyMeasure | Cost, method: str, seeds: Sequence[int] | None = None) -> Array:
    return of(cells, method, seeds) if isinstance(of, Cost) else reached(cells, of, method, seeds)


def _test(cells: Cells, of: PolicyMeasure | Cost) -> Tests:
    """The tests of all methods in one quantity, under the seeds that two methods have in common."""

    @cache
    def values_of(method: str, seeds: tuple[int, ...]) -> Array:
        return _values(cells, of, method, seeds) if seeds else np.empty((0, 0))

    def values(a: str, b: str) -> tuple[Array, Array]:
        seeds = tuple(cells.seeds_of(*((method, end(cells, method)) for method in (a, b))))
        return values_of(a, seeds), values_of(b, seeds)

    less = kind_of(of) == "amount"
    return compare_pairs(cells.methods, values, SHARE if less else 100 * POINTS / of.metric.scale, less=less)


def _draw(axis: Axes, rows: Sequence[Mapping[str, Any]], off: Collection[str], x: str, y: str) -> None:
    """Draw a point for each method, with intervals if there are any, hollow if it is off the front."""
    for row in rows:
        look = RIVALS.get(row["method"], OTHER)
        _, _, bars = axis.errorbar(
            [row[f"{x}_mean"]],
            [row[f"{y}_mean"]],
            xerr=spread([row], f"{x}_"),
            yerr=spread([row], f"{y}_"),
            color=look.colour,
            marker=look.mark,
            markerfacecolor=PAPER if row["method"] in off else look.colour,
            markeredgewidth=0.7,
            markersize=3.6,
            linestyle="none",
            elinewidth=0.5,
            label=row["method"],
        )
        for bar in bars:
            bar.set_alpha(FAINT)
    _scale(axis, "x", rows, x)
    if y == KL.name:
        _scale(axis, "y", rows, y)


def _name_best(axis: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    """Draw a line through the methods that are better than all others with x as small; name them above the panel."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[x], -row[y])):
        if not best or row[y] > best[-1][y]:
            best.append(row)
    axis.plot([row[x] for row in best], [row[y] for row in best], color=BREAK, linewidth=1, drawstyle="steps-post")
    names = fill(" › ".join(row["method"].replace(" ", "\N{NO-BREAK SPACE}") for row in best), WIDE)
    axis.set_title(names, loc="left", fontsize=SMALL, color=INK)


def _scale(axis: Axes, of: Literal["x", "y"], rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Choose a linear scale with room for 0, or a logarithmic one if methods differ by more than ten times.

    A logarithmic axis ends at three times the largest value and, without a 0, at a third of the smallest one, so
    intervals that reach further are cut there.
    """
    values = [row[f"{name}_mean"] for row in rows]
    lows, highs = ([row[f"{name}_{end}"] or row[f"{name}_mean"] for row in rows] for end in ("low", "high"))
    least, most = min((value for value in values if value > 0), default=1.0), max(values)
    positive, limit = min(values) > 0, axis.set_xlim if of == "x" else axis.set_ylim
    along = axis.xaxis if of == "x" else axis.yaxis
    if most > 10 * least:
        scale = axis.set_xscale if of == "x" else axis.set_yscale
        if positive:
            scale("log")
        else:
            scale("symlog", linthresh=least)
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        for levels in (LEVELS[:1], LEVELS):
            ticks = [level * 10.0**power for power in powers for level in levels]
            shown = [tick for tick in ticks if least / 2 < tick <= 1.1 * most]
            if len(shown) > 1:
                break
        along.set_ticks(shown if positive else [0.0, *shown])
        along.set_ticks([], minor=True)
        low = max(min(lows), least / 3) / 1.25 if positive else -0.2 * least
        limit(low, 1.25 * max(most, min(max(highs), 3 * most)))
    elif not positive:
        limit(-0.2 * least)
    along.set_major_formatter(EngFormatter(sep="") if most >= 1000 else StrMethodFormatter("{x:g}"))


if __name__ == "__main__":
    sys.exit(alone("fig14_methods"))
