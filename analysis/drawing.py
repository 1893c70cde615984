"""The style of all figures: a colour and a marker for each method, sizes, and the footer that explains the figure.

Figures are as wide as a column or a page of a paper, so that their text keeps its size in print.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.results import Kind
from analysis.selection import Cells, Iteration, commits, describe
from analysis.watched import warn
from dnpo.catalogue import Metric
from dnpo.palette import BREAK, FOOT, INK, METHODS, OTHER, OUTCOMES, PAPER, Look
from dnpo.stats.table import ALPHA
from dnpo.tracking.reading import SFT
from dnpo.wording import fixed, plural, sentence

COLUMN, PAGE = 3.3, 6.9  # inches: the width of a paper's column, and of its page
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "figure.titlesize": 9,
    "text.parse_math": False,  # show $ in names literally
    "svg.fonttype": "none",  # text stays text
    "pdf.fonttype": 42,
    "svg.hashsalt": "dnpo",  # the same numbers give the same file
}
DPI = 300
FOOT_SIZE = 5.8  # points
SMALL = 6.0  # numbers within panels
INTERVALS = {"share": "Wilson intervals", "amount": "t intervals of logarithms", "number": "t intervals"}
WIDTH = 0.54  # width of a letter, as a share of its font's height
KEY_LINE = 10.5  # points


def find_look(method: str) -> Look:
    """The colour and marker of a method, by its name."""
    return next((each for each in METHODS.values() if each.name == method), OTHER)


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Create a figure and its panels, row by row; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, **options)).ravel().tolist()


def finish(figure: Figure, title: str, foot: str, key: Axes | None = None) -> Figure:
    """Add the title above and the footer below; if ``key`` is a panel, also its legend under the title."""
    entries: tuple[list[Any], list[str]] = ([], []) if key is None else key.get_legend_handles_labels()
    _write(figure, _wrap(figure, title, STYLE["figure.titlesize"]), _wrap(figure, foot, FOOT_SIZE), *entries)
    return figure


def bare(figure: Figure) -> tuple[str, str]:
    """Remove the title and the footer of a finished figure, which a paper has in its caption; return both."""
    title, foot = (" ".join(text.split()) for text in (figure.get_suptitle(), figure.get_supxlabel()))
    entries: tuple[list[Any], list[str]] = ([], [])
    for legend in figure.legends:
        labels = [text.get_text() for text in legend.get_texts()]
        entries = next(found for axis in figure.axes if (found := axis.get_legend_handles_labels())[1] == labels)
        legend.remove()
    _write(figure, "", "", *entries)
    return title, foot


def _wrap(figure: Figure, text: str, size: float) -> str:
    wide = int(figure.get_figwidth() * 72 / (size * WIDTH))
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, wide))


def _write(figure: Figure, title: str, foot: str, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Write title and footer, with the legend's entries, if there are any, under the title."""
    rows = 0
    if labels:
        fitting = (n for n in range(1, len(labels)) if _measure(labels, n) < figure.get_figwidth() * 72)
        rows = next(fitting, len(labels))
        columns = -(-len(labels) // rows)
        above = 1.25 * STYLE["figure.titlesize"] * len(title.splitlines()) + 4
        place = (0.5, 1 - above / (figure.get_figheight() * 72))
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=place, ncols=columns, borderaxespad=0)
    # constrained layout makes room for the title, not for a legend under it
    blank = "\n ".join([""] * (1 + round(rows * KEY_LINE / STYLE["figure.titlesize"])))
    figure.suptitle(title + blank)
    figure.supxlabel(foot, fontsize=FOOT_SIZE, x=0.01, ha="left", color=FOOT)


def _measure(labels: Sequence[str], rows: int) -> float:
    """The approximate width in points of a legend with this number of rows, which matplotlib fills column by column."""
    columns = [labels[first : first + rows] for first in range(0, len(labels), rows)]
    size: float = STYLE["legend.fontsize"]
    beside: float = 0.8 + STYLE["legend.handlelength"] + STYLE["legend.columnspacing"]
    return sum((max(map(len, column)) * WIDTH + beside) * size for column in columns)


def foot(cells: Cells, rows: Sequence[Mapping[str, Any]], shows: str, *more: str) -> str:
    """The footer of a figure: what it shows, seeds, items, data, commit, and what is missing.

    Args:
        rows: the data drawn, with the columns of :func:`analysis.results.size`; empty to leave out the items.
        shows: what the figure shows, in words.
        more: further sentences.
    """
    seeds, counts = cells.seeds, sorted({row["items"] for row in rows})
    parts = [shows]
    if len(seeds) == 1:
        parts.append(f"ONE SEED ({seeds[0]}): the variation between trainings is unknown")
    else:
        parts.append(f"{len(seeds)} seeds ({', '.join(map(str, seeds))})")
    if counts and counts != [1]:
        parts.append(f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} items")
    shared = {name: ", ".join(sorted({str(describe(run)[name]) for run in cells.used})) for name in ("data", "judge")}
    runs = plural(len(cells.used), "run")
    parts.append(f"data {shared['data']}, judge {shared['judge']}, {runs}, commit {commits(cells.used)}")
    unscored = max((row["unscored"] for row in rows), default=0)
    lacking = [f"up to {unscored} items that lack a score under some seed are left out"] if unscored else []
    sentences = [*more, *lacking, *cells.notes]
    return "; ".join(parts) + "." + "".join(f"\n{sentence(words)}" for words in sentences)


def whiskers(cells: Cells, rows: Sequence[Mapping[str, Any]], of: Kind = "number") -> str:
    """A sentence on the intervals of levels: their kind, and whether they are over items, seeds or both."""
    over = ["items"] * any(row["items"] > 1 for row in rows) + ["seeds"] * (len(cells.seeds) > 1)
    if not over:
        return "No intervals: one seed, and no items"
    return f"Whiskers: 95 % {INTERVALS[of]} over {' and '.join(over)}"


def levels(
    panels: Sequence[Axes],
    rows: Sequence[Mapping[str, Any]],
    less: Sequence[Mapping[str, Any]],
    cells: Cells,
    metric: Metric,
) -> tuple[str, ...]:
    """Draw levels in the first panel and, if there are any, paired differences in the second.

    Returns:
        Sentences on what the second panel shows, if there is one, and on gains with a worse held-out loss.
    """
    lines(panels[0], rows, cells.iterations)
    panels[0].set_ylabel(_narrow(metric.axis))
    if not less:
        return ()
    panels[0].set_xlabel("")
    base = less[0]["base"]
    panels[1].axhline(0, color=find_look(base).colour, linewidth=0.8)
    lines(panels[1], less, cells.iterations)
    panels[1].set_ylabel(_narrow(f"difference from {base}, {'pp' if metric.unit == '%' else 'points'}"))
    return (
        f"Below: differences from {base}, paired by item and seed, with 95 % t intervals; *: p ≤ 0.05 after Holm's "
        f"correction over {plural(len(less), 'comparison')}",
        *warn(cells, less),
    )


def lines(axis: Axes, rows: Sequence[Mapping[str, Any]], iterations: Sequence[Iteration]) -> None:
    """Draw a :func:`line` over iterations for each method; lines are shifted so that all are visible."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    place = {k: i for i, k in enumerate(iterations)}
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        x = [place[row["iteration"]] + 0.09 * (number - (len(methods) - 1) / 2) for row in mine]
        line(axis, x, mine, find_look(method), method)
    axis.margins(y=0.1)
    over_iterations(axis, iterations)


def line(axis: Axes, x: Sequence[float], rows: Sequence[Mapping[str, Any]], look: Look, label: str) -> None:
    """Draw a line through means, with intervals, and a star above each row whose ``p_holm`` is at most 0.05.

    Args:
        x: the position of each row.
    """
    axis.errorbar(
        x,
        [row["mean"] for row in rows],
        yerr=spread(rows),
        color=look.colour,
        marker=look.mark,
        markersize=3.5,
        linewidth=1.2,
        elinewidth=0.7,
        capsize=1.5,
        label=label,
    )
    for at, row in zip(x, rows, strict=True):
        if row.get("p_holm", 1.0) <= ALPHA:
            top = row["mean"] if row["high"] is None else row["high"]
            axis.annotate("*", (at, top), (0, -1), textcoords="offset points", ha="center", color=look.colour)


def over_iterations(axis: Axes, iterations: Sequence[Iteration]) -> None:
    """Label the axis of iterations."""
    axis.set_xticks(range(len(iterations)), ["SFT" if k == SFT else str(k) for k in iterations])
    axis.set_xlim(-0.4, len(iterations) - 0.6)
    axis.set_xlabel("policy after iteration")


def spread(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> Any:
    """The intervals of rows as matplotlib's ``yerr``; None if no row has one."""
    if all(row[f"{prefix}low"] is None for row in rows):
        return None
    ends = [
        (row[f"{prefix}mean"] - row[f"{prefix}low"], row[f"{prefix}high"] - row[f"{prefix}mean"])
        if row[f"{prefix}low"] is not None
        else (np.nan, np.nan)
        for row in rows
    ]
    return np.array(ends).T


def outcomes(axis: Axes, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Draw a bar for each row, split into win, tie and lose in percent, with intervals at both borders."""
    for y, row in enumerate(rows):
        left = 0.0
        for name, shade in OUTCOMES.items():
            share = row[f"{name}_mean"]
            axis.barh(y, share, left=left, color=shade, height=0.74, label=name if y == 0 else None)
            if share >= 7:
                ink = INK if name == "tie" else PAPER
                axis.text(
                    left + share / 2, y + 0.13, f"{share:.1f}", ha="center", va="center", fontsize=SMALL, color=ink
                )
            left += share
        for name, flipped in (("win", False), ("lose", True)):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            if low is not None:
                ends = (100 - high, 100 - low) if flipped else (low, high)
                axis.plot(ends, [y - 0.24] * 2, color=INK, marker="|", markersize=3, linewidth=0.8, clip_on=False)
    axis.set_yticks(range(len(rows)), list(labels))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xticks([0, 20, 40, 60, 80, 100])
    axis.set_xlabel("share of answers, %")


def write_beside_bars(axis: Axes, head: str, texts: Sequence[str]) -> None:
    """Write a text to the right of each bar of :func:`outcomes`, under a heading."""
    axis.text(103, -0.5, head, va="bottom", fontsize=SMALL)
    for y, text in enumerate(texts):
        axis.text(103, y, text, va="center", fontsize=SMALL)


def plus_minus(row: Mapping[str, Any], prefix: str) -> str:
    """Format a row's mean, a difference, with half the width of its interval."""
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    half = "" if low is None or high is None else f" ± {(high - low) / 2:.1f}"
    return fixed(row[f"{prefix}mean"], 1, signed=True) + half


def from_to(row: Mapping[str, Any], prefix: str) -> str:
    """Format a row's mean, a level, with the ends of its interval."""
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    ends = "" if low is None or high is None else f" ({low:.1f}–{high:.1f})"
    return f"{row[f'{prefix}mean']:.1f}{ends}".replace("-", "−")


def points(axis: Axes, rows: Sequence[Mapping[str, Any]], groups: Sequence[str], methods: Sequence[str]) -> None:
    """Draw a point with its interval for each method in each group, the groups from top to bottom."""
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        look = find_look(method)
        axis.errorbar(
            [row["mean"] for row in mine],
            [beside(groups, methods, row["measure"], method) for row in mine],
            xerr=spread(mine) if mine else None,
            color=look.colour,
            marker=look.mark,
            markersize=3,
            linestyle="none",
            elinewidth=0.7,
            capsize=1.2,
            label=method,
        )
    axis.set_yticks(range(len(groups)), list(groups))
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    for place in range(1, len(groups)):
        axis.axhline(place - 0.5, color=BREAK, linewidth=0.4, linestyle="-" if place == len(groups) - 1 else ":")


def beside(groups: Sequence[str], methods: Sequence[str], group: str, method: str) -> float:
    """The height of a method's point in its group, in :func:`points`."""
    return groups.index(group) + 0.8 / len(methods) * (methods.index(method) - (len(methods) - 1) / 2)


def _narrow(text: str) -> str:
    return textwrap.fill(text, 20)
