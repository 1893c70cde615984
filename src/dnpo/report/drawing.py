"""Pictures that go with a run or a sweep."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dnpo.stats.intervals import Estimate

COLOURS = {"chosen": "#0072B2", "rejected": "#D55E00", "new": "#009E73"}  # safe for colour-blind readers
LABELS = {"chosen": "chosen", "rejected": "rejected", "new": "newly generated"}
# By the options of dsl and npo; Okabe and Ito's palette, as everywhere.
METHODS = {
    ("off", "off"): "#0072B2",
    ("score", "off"): "#009E73",
    ("off", "trainable"): "#E69F00",
    ("score", "trainable"): "#D55E00",
    ("off", "fixed"): "#CC79A7",
    ("off", "matched"): "#000000",
    ("score", "fixed"): "#56B4E9",
    ("score", "matched"): "#777777",
}
MARKS = "os^DvXP*"
GREY = "#777777"
PLAIN: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a $
}
# What a run is looked at by: metric, title, unit, scale.
MEASURES = (
    ("eval/score", "Judge's score of sampled answers", "points of 100", 1.0),
    ("second/score", "Second judge's score", "points of 100", 1.0),
    ("eval/accuracy", "Right greedy answers", "%", 100.0),
    ("eval/loss", "Held-out loss of human responses", "nats a token", 1.0),
)


@dataclass(frozen=True)
class Panel:
    """One measure of one or more groups.

    Attributes:
        values: by group and iteration (−1: after fine-tuning).
        human: the same of human responses, as a line across.
        scale: all are shown times this.
    """

    title: str
    unit: str
    values: Mapping[str, Mapping[int, Estimate]]
    human: float | None = None
    scale: float = 1.0


def colours(groups: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """A colour a group: its method's where methods tell the groups apart, else one after the other.

    Args:
        groups: by label, the options of dsl and npo.
    """
    if len(set(groups.values())) == len(groups) and set(groups.values()) <= set(METHODS):
        return {label: METHODS[options] for label, options in groups.items()}
    free = list(METHODS.values())
    return {label: free[i % len(free)] for i, label in enumerate(groups)}


def progress(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """How a run's policies come out over its iterations, measure by measure.

    Args:
        rows: the run's table.
        path: the picture to write.
    """
    panels = []
    for metric, name, unit, scale in MEASURES:
        known = {-1 if row["iteration"] == "SFT" else row["iteration"]: row[metric] for row in rows if metric in row}
        if known:
            human = next((row[f"{metric}_human"] for row in rows if f"{metric}_human" in row), None)
            panels.append(Panel(name, unit, {"": {k: Estimate(v) for k, v in known.items()}}, human, scale))
    over_iterations(panels, path, title, "One run: no interval.", {"": METHODS["off", "off"]})


def over_iterations(
    panels: Sequence[Panel],
    path: Path,
    title: str,
    note: str,
    shades: Mapping[str, str],
    joined: bool = True,
) -> None:
    """Values after fine-tuning and after every iteration, with their intervals; a panel a measure.

    Where there are more groups than colours, the last iteration alone is drawn, a line a group.

    Args:
        shades: a colour a group.
        joined: whether one iteration's policy came from that before it.
    """
    many = len(shades) > len(METHODS)
    columns = min(len(panels), 2) or 1
    rows = -(-len(panels) // columns) or 1
    high = 0.2 * len(shades) + 1.0 if many else 2.7
    with rc_context(PLAIN):
        # As wide as the column of MLflow's page that notes stand in.
        figure = Figure(figsize=(7.4, rows * high + (0.8 if len(shades) > 1 else 0.4)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(rows, columns, sharey=many)).ravel().tolist()
        for axis, panel in zip(axes, panels, strict=False):
            (_dots if many else _lines)(axis, panel, shades, joined)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if len(shades) > 1 and not many:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(shades), 4), fontsize=8)
        figure.suptitle("\n".join([*textwrap.wrap(title, 95), note]), fontsize=9)
        figure.savefig(path, dpi=100)


def _lines(axis: Axes, panel: Panel, shades: Mapping[str, str], joined: bool) -> None:
    places = sorted({k for values in panel.values.values() for k in values})
    for number, (label, shade) in enumerate(shades.items()):
        values = panel.values.get(label, {})
        apart = 0.06 * (number - (len(shades) - 1) / 2)  # none hides another
        axis.errorbar(
            [places.index(k) + apart for k in sorted(values)],
            [panel.scale * values[k].value for k in sorted(values)],
            yerr=[panel.scale * (values[k].half or 0.0) for k in sorted(values)],
            color=shade,
            marker=MARKS[number % len(MARKS)],
            linestyle="-" if joined else "none",
            markersize=5,
            linewidth=1.6,
            elinewidth=1.0,
            capsize=2.5,
            label=label,
        )
    if panel.human is not None:
        axis.axhline(panel.scale * panel.human, color=GREY, linestyle="--", linewidth=1.0)
        axis.annotate(
            "human responses",
            (0.99, panel.scale * panel.human),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color=GREY,
        )
    axis.set_xticks(range(len(places)), ["SFT" if k < 0 else str(k) for k in places])
    axis.set_xlim(-0.4, len(places) - 0.6)
    axis.set_xlabel("policy after iteration")
    axis.set_ylabel(panel.unit)
    axis.set_title(panel.title, fontsize=9.5)


def _dots(axis: Axes, panel: Panel, shades: Mapping[str, str], joined: bool) -> None:
    for number, label in enumerate(shades):
        values = panel.values.get(label, {})
        if values:
            last = values[max(values)]
            axis.errorbar(
                panel.scale * last.value,
                number,
                xerr=panel.scale * (last.half or 0.0),
                color=METHODS["off", "off"],
                marker="o",
                markersize=4,
                capsize=2,
            )
    axis.set_yticks(range(len(shades)), list(shades), fontsize=7)
    axis.set_ylim(len(shades) - 0.5, -0.5)
    axis.set_xlabel(panel.unit)
    axis.set_title(f"{panel.title}, last iteration", fontsize=9)


def logprob_histogram(logprobs: Path, path: Path, title: str, note: str) -> None:
    """Where chosen, rejected and newly generated responses lie under one policy: summed and per-token log-probability.

    Args:
        logprobs: what :func:`dnpo.evaluate.metrics.evaluate` wrote.
        path: the picture to write.
        title, note: above and below the histograms.
    """
    values = np.load(logprobs)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axis, per_token in zip(panels, (False, True), strict=True):
        shown = {}
        for name in COLOURS:
            if name in values:
                lengths = np.maximum(values[f"{name}_tokens"], 1)
                shown[name] = values[name] / lengths if per_token else values[name]
        # The longest tails say little and would squeeze the rest.
        low = min(np.percentile(v, 1) for v in shown.values())
        bins = np.linspace(low, 0, 41)
        for name, found in shown.items():
            axis.hist(
                np.clip(found, low, None),
                bins=bins.tolist(),
                density=True,
                histtype="step",
                linewidth=1.6,
                color=COLOURS[name],
                label=f"{LABELS[name]} (mean {found.mean():.2f})",
            )
        axis.set_xlabel("log-probability per token, nats" if per_token else "log-probability of the response, nats")
        axis.set_ylabel("density")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=120)
