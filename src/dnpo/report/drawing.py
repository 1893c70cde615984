"""Draw the pictures that are tracked with a run or a sweep."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from dnpo.catalogue import Metric, metric
from dnpo.palette import GRID, HUMAN, METHODS, OTHER, SAMPLES, SERIES, Look, choose_looks
from dnpo.report.response import Response
from dnpo.stats.intervals import Estimate

LABELS = {"chosen": "chosen", "rejected": "rejected", "new": "newly generated"}
PLAIN: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "text.parse_math": False,  # show $ in names literally
}
MOST_TICKS = 8  # if a setting has more values, they are not all marked on the axis
WIDTH = 7.4  # inches: the column for notes on MLflow's page
LETTER, LETTER_OF_TITLE = 0.08, 0.1  # inches: how wide letters of a legend and of a title are, with margins
SHORT_LINE = 24  # letters of a line's name that fit into a third of the width
NO_INTERVAL = Estimate(0.0)
ONE_RUN = "One run: no interval."
PROGRESS = ("eval/score", "second/score", "eval/accuracy", "eval/loss")  # metrics in the picture of a run's progress


@dataclass(frozen=True)
class Panel:
    """One measure of one or more groups.

    Attributes:
        values: estimates by group and iteration (−1: after fine-tuning).
        human: the value for human responses, drawn as a horizontal line.
    """

    metric: Metric
    values: Mapping[str, Mapping[int, Estimate]]
    human: float | None = None


def progress(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    title: str,
    options: tuple[str, str],
    around: Mapping[str, Sequence[Estimate | None]] = MappingProxyType({}),
) -> None:
    """Draw the metrics of a run's policies over its iterations.

    Args:
        rows: the run's table.
        around: by metric, each row's estimate, for its interval; None where there is none.
        path: file to write.
        title: title of the figure.
        options: the options of dsl and npo.
    """
    panels = []
    for name in PROGRESS:
        known = around.get(name) or [None] * len(rows)
        values = {
            -1 if row["iteration"] == "SFT" else row["iteration"]: replace(found or NO_INTERVAL, value=row[name])
            for row, found in zip(rows, known, strict=True)
            if name in row
        }
        if values:
            human = next((row[f"{name}_human"] for row in rows if f"{name}_human" in row), None)
            panels.append(Panel(metric(name), {"": values}, human))
    note = "Bars: 95 % intervals over held-out prompts; another seed may give other numbers." if around else ONE_RUN
    over_iterations(panels, path, title, note, {"": METHODS.get(options, OTHER)})


def over_iterations(
    panels: Sequence[Panel],
    path: Path,
    title: str,
    note: str,
    looks: Mapping[str, Look],
    joined: bool = True,
) -> None:
    """Draw values after fine-tuning and after every iteration, with their intervals; one panel per metric.

    If there are more groups than colours, only the last iteration is drawn, with one row per group.

    Args:
        panels: one per metric.
        path: file to write.
        title, note: text above the panels.
        looks: look of each group, by label.
        joined: whether each iteration continues the policy of the one before, so that a line joins the points.
    """
    many = len(looks) > len(SERIES)
    columns = 3 if len(panels) in (3, 5, 6) and not many else min(len(panels), 2) or 1
    rows = -(-len(panels) // columns) or 1
    high = 0.2 * len(looks) + 1.0 if many else 2.7
    with rc_context(PLAIN):
        figure = Figure(figsize=(WIDTH, rows * high + (0.8 if len(looks) > 1 else 0.4)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns, sharey=many)).ravel().tolist()
        for axis, panel in zip(axes, panels, strict=False):
            (_dots if many else _lines)(axis, panel, looks, joined)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if len(looks) > 1 and not many:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(looks), 4), fontsize=8)
        figure.suptitle("\n".join([*textwrap.wrap(title, 95), note]), fontsize=9)
        figure.savefig(path, dpi=100)


def _lines(axis: Axes, panel: Panel, looks: Mapping[str, Look], joined: bool) -> None:
    places = sorted({k for values in panel.values.values() for k in values})
    for number, (label, look) in enumerate(looks.items()):
        values = panel.values.get(label, {})
        apart = 0.06 * (number - (len(looks) - 1) / 2)  # so that no marker hides another
        axis.errorbar(
            [places.index(k) + apart for k in sorted(values)],
            [panel.metric.scale * values[k].value for k in sorted(values)],
            yerr=[panel.metric.scale * (values[k].half or 0.0) for k in sorted(values)],
            color=look.colour,
            marker=look.mark,
            linestyle="-" if joined else "none",
            markersize=5,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=2.5,
            label=label,
        )
    if panel.human is not None:
        axis.axhline(panel.metric.scale * panel.human, color=HUMAN, linestyle="--", linewidth=1.0)
        axis.annotate(
            "human responses",
            (0.99, panel.metric.scale * panel.human),
            (0, -5),  # below the line, where the panel continues; a descender or an accent must not touch it
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top",
            color=HUMAN,
        )
    axis.set_xticks(range(len(places)), ["SFT" if k < 0 else str(k) for k in places])
    axis.set_xlim(-0.4, len(places) - 0.6)
    axis.set_xlabel("policy after iteration")
    axis.set_ylabel(panel.metric.unit)
    axis.set_title(textwrap.fill(panel.metric.title, 24), fontsize=9.5)


def _dots(axis: Axes, panel: Panel, looks: Mapping[str, Look], joined: bool) -> None:
    for number, label in enumerate(looks):
        values = panel.values.get(label, {})
        if values:
            last = values[max(values)]
            axis.errorbar(
                panel.metric.scale * last.value,
                number,
                xerr=panel.metric.scale * (last.half or 0.0),
                color=OTHER.colour,
                marker="o",
                markersize=4,
                capsize=2,
            )
    axis.set_yticks(range(len(looks)), list(looks), fontsize=7)
    axis.set_ylim(len(looks) - 0.5, -0.5)
    axis.set_xlabel(panel.metric.unit)
    axis.set_title(f"{panel.metric.title}, last iteration", fontsize=9)


def responses(found: Sequence[Response], path: Path, title: str, note: str) -> None:
    """Draw a measure of the last policies over each setting with several numeric values, one panel each."""
    longest = max(len(line) for each in found for line in each.lines)
    columns = min(len(found), 3 if longest <= SHORT_LINE else 2)
    rows, wide = -(-len(found) // columns), WIDTH / columns
    with rc_context(PLAIN):
        high = max(height_of_response(each, wide) for each in found)
        figure = Figure(figsize=(WIDTH, high * rows + 0.6), layout="constrained")
        panels = figure.subfigures(rows, columns, squeeze=False).ravel().tolist()
        for panel, response in zip(panels, found, strict=False):
            draw_response(panel, response, wide)
        figure.suptitle("\n".join([*textwrap.wrap(title, 95), note]), fontsize=9)
        figure.savefig(path, dpi=100)


def height_of_response(response: Response, wide: float) -> float:
    """Return how many inches high a panel of :func:`draw_response` must be, if it is ``wide`` inches wide."""
    rows = -(-len(response.lines) // _columns_of_legend(response, wide)) if len(response.lines) > 1 else 0
    return 2.7 + 0.17 * rows


def _columns_of_legend(response: Response, wide: float) -> int:
    return int(wide / LETTER) // (max(map(len, response.lines)) + 6) or 1


def draw_response(panel: FigureBase, response: Response, wide: float) -> None:
    """Draw one measure over one setting, on a logarithmic axis if the setting's values span a factor of ten.

    Args:
        panel: a figure or a part of one, with a constrained layout.
        wide: inches.
    """
    metric, axis = response.measure.metric, panel.subplots()
    for (label, points), look in zip(response.lines.items(), choose_looks(response.options).values(), strict=True):
        axis.errorbar(
            [number for number, _ in points],
            [metric.scale * estimate.value for _, estimate in points],
            yerr=[metric.scale * (estimate.half or 0.0) for _, estimate in points],
            color=look.colour,
            marker=look.mark,
            linestyle="-" if response.joined else "none",
            markersize=5,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=2.5,
            label=label,
        )
    numbers = sorted({number for points in response.lines.values() for number, _ in points})
    if numbers[0] > 0 and numbers[-1] >= 10 * numbers[0]:
        axis.set_xscale("log")
    if response.joined and len(numbers) <= MOST_TICKS:  # a search's values may be too close to mark
        axis.set_xticks(numbers, [f"{number:g}" for number in numbers], minor=False)
        axis.set_xticks([], minor=True)
    axis.set_xlabel(response.setting)
    axis.set_ylabel(metric.unit or metric.symbol or metric.label)
    axis.set_title(textwrap.fill(metric.title, int(wide / LETTER_OF_TITLE)), fontsize=9.5)
    if len(response.lines) > 1:  # outside the axes, where it hides no interval
        panel.legend(loc="outside lower center", ncols=_columns_of_legend(response, wide), fontsize=8)


def describe_movement(row: Mapping[str, Any]) -> str:
    """Describe how far a policy's new responses are from rejected ones, from its row of the table; "" if unknown."""
    distance, chance = metric("stagnation/ks"), metric("stagnation/ks_critical")
    if row.get(distance.name) is None:
        return ""
    critical = row.get(chance.name)
    limit = "" if critical is None else f" (5 % critical value {chance.format(critical)})"
    return f"{distance.title}: {distance.format(row[distance.name])}{limit}"


def logprob_histogram(logprobs: Path, path: Path, title: str, note: str, stacked: bool = False) -> None:
    """Draw histograms of the log-probabilities (nats) of chosen, rejected and new responses under one policy.

    The first panel shows sums over the response, the second one means per token.

    Args:
        logprobs: file written by :func:`dnpo.evaluate.metrics.evaluate`.
        path: file to write.
        title, note: text above and below the histograms.
        stacked: whether the panels are one below the other, for narrow screens.
    """
    values = np.load(logprobs)
    figure = Figure(figsize=(4.2, 4.6)) if stacked else Figure(figsize=(9, 3.6), layout="constrained")
    if stacked:  # a computed layout would draw everything twice
        figure.subplots_adjust(left=0.16, right=0.985, bottom=0.1, top=0.9, hspace=0.32)
    panels = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
    for axis, per_token in zip(panels, (False, True), strict=True):
        shown = {}
        for name in SAMPLES:
            if name in values:
                lengths = np.maximum(values[f"{name}_tokens"], 1)
                shown[name] = values[name] / lengths if per_token else values[name]
        # Clip the lowest percent: long tails would squeeze the rest.
        low = min(np.percentile(v, 1) for v in shown.values())
        bins = np.linspace(low, 0, 41)
        for name, found in shown.items():
            axis.hist(
                np.clip(found, low, None),
                bins=bins.tolist(),
                density=True,
                histtype="step",
                linewidth=1.6,
                color=SAMPLES[name],
                label=f"{LABELS[name]} (mean {metric('logps/new').format(found.mean())})",
            )
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.ticklabel_format(axis="y", scilimits=(-2, 3))  # short numbers leave room for the axis's title
        axis.set_xlabel("log-probability per token, nats" if per_token else "log-probability of the response, nats")
        axis.set_ylabel("density")
        axis.margins(y=0.35)  # room for the legend above the curves
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(textwrap.wrap(title, 52)) if stacked else title, fontsize=9.5 if stacked else 11)
    if note:
        figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=120)
