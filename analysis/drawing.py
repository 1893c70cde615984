"""The style of all figures: a colour and a marker for each method, sizes, and the footer that explains the figure."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.selection import Cells, Iteration, commits, describe
from dnpo.palette import BREAK, FOOT, INK, METHODS, OTHER, OUTCOMES, PAPER, Look
from dnpo.tracking.reading import SFT
from dnpo.wording import plural

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.titlesize": 11,
    "text.parse_math": False,  # show $ in names literally
    "svg.hashsalt": "dnpo",  # the same numbers give the same file
}
DPI = 300
FOOT_SIZE = 6.5  # points


def find_look(method: str) -> Look:
    """The colour and marker of a method, by its name."""
    return next((each for each in METHODS.values() if each.name == method), OTHER)


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Create a figure and its panels, row by row; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns, **options)).ravel().tolist()


def finish(figure: Figure, title: str, foot: str, key: Axes | None = None) -> Figure:
    """Add the title above and the footer below; if ``key`` is a panel, also its legend under the title."""
    wide = int(figure.get_figwidth() * 72 / (STYLE["figure.titlesize"] * 0.5))
    lines = textwrap.wrap(title, wide)
    figure.suptitle("\n".join(lines) + "\n " * (key is not None))
    if key is not None:
        below = 1 - (0.05 + 0.185 * len(lines)) / figure.get_figheight()
        entries = key.get_legend_handles_labels()
        figure.legend(*entries, loc="upper center", bbox_to_anchor=(0.5, below), ncols=len(entries[1]))
    wide = int(figure.get_figwidth() * 72 / (FOOT_SIZE * 0.56))
    text = "\n".join(line for part in foot.split("\n") for line in textwrap.wrap(part, wide))
    figure.supxlabel(text, fontsize=FOOT_SIZE, x=0.01, ha="left", color=FOOT)
    return figure


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
    return "; ".join(parts) + "." + "".join(f"\n{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def whiskers(cells: Cells, rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the intervals: over items, seeds or both."""
    over = ["items"] * any(row["items"] > 1 for row in rows) + ["seeds"] * (len(cells.seeds) > 1)
    return f"Whiskers: 95 % t intervals over {' and '.join(over)}" if over else "No intervals: one seed, and no items"


def lines(axis: Axes, rows: Sequence[Mapping[str, Any]], iterations: Sequence[Iteration]) -> None:
    """Draw a line over iterations for each method, with intervals; lines are shifted so that all are visible."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    place = {k: i for i, k in enumerate(iterations)}
    for number, method in enumerate(methods):
        mine = [row for row in rows if row["method"] == method]
        x = [place[row["iteration"]] + 0.06 * (number - (len(methods) - 1) / 2) for row in mine]
        axis.errorbar(
            x,
            [row["mean"] for row in mine],
            yerr=spread(mine),
            color=find_look(method).colour,
            marker=find_look(method).mark,
            markersize=5,
            linewidth=1.6,
            elinewidth=1,
            capsize=2.5,
            label=method,
        )
    over_iterations(axis, iterations)


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
            axis.barh(y, share, left=left, color=shade, height=0.62, label=name if y == 0 else None)
            if share >= 6:
                ink = INK if name == "tie" else PAPER
                axis.text(left + share / 2, y + 0.13, f"{share:.1f}", ha="center", va="center", fontsize=7.5, color=ink)
            left += share
        for name, border, above in (("win", row["win_mean"], 0.22), ("lose", 100 - row["lose_mean"], 0.1)):
            if row[f"{name}_low"] is not None:
                half = (row[f"{name}_high"] - row[f"{name}_low"]) / 2
                axis.errorbar(border, y - above, xerr=half, color=INK, capsize=1.6, linewidth=0.9)
    axis.set_yticks(range(len(rows)), list(labels))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xticks([0, 20, 40, 60, 80])
    axis.set_xlabel("share of answers, %")


def write_beside_bars(axis: Axes, head: str, texts: Sequence[str]) -> None:
    """Write a text to the right of each bar of :func:`outcomes`, under a heading."""
    axis.text(102, -0.45, head, va="bottom", fontsize=7.5)
    for y, text in enumerate(texts):
        axis.text(102, y, text, va="center", fontsize=7.5)


def plus_minus(row: Mapping[str, Any], prefix: str, signed: bool = False) -> str:
    """Format a row's mean with half the width of its interval."""
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    half = "" if low is None or high is None else f" ± {(high - low) / 2:.1f}"
    return f"{row[f'{prefix}mean']:{'+' if signed else ''}.1f}{half}".replace("-", "−")


def bars(axis: Axes, rows: Sequence[Mapping[str, Any]], groups: Sequence[str], methods: Sequence[str]) -> None:
    """Draw a bar for each method in each group, with intervals."""
    wide = 0.8 / len(methods)
    for number, method in enumerate(methods):
        mine = {row["measure"]: row for row in rows if row["method"] == method}
        shown = [group for group in groups if group in mine]
        axis.bar(
            [groups.index(group) + wide * (number - (len(methods) - 1) / 2) for group in shown],
            [mine[group]["mean"] for group in shown],
            wide * 0.92,
            yerr=spread([mine[group] for group in shown]) if shown else None,
            error_kw={"elinewidth": 0.8, "capsize": 1.8},
            color=find_look(method).colour,
            label=method,
        )
    axis.set_xticks(range(len(groups)), list(groups))
    axis.axvline(len(groups) - 1.5, color=BREAK, linewidth=0.8, linestyle=":")
