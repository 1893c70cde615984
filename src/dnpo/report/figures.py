"""Draw the page's pictures as SVG. Letters are outlines, so that they look the same everywhere."""

import base64
import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dnpo.catalogue import Metric
from dnpo.palette import BREAK, EDGE, GRID, HUMAN, OTHER, Look
from dnpo.report.drawing import draw_response, height_of_response, logprob_histogram
from dnpo.report.page import make_visible
from dnpo.report.response import Response
from dnpo.stats.intervals import Estimate
from dnpo.tracking.reading import SFT

if TYPE_CHECKING:
    from dnpo.report.outcome import Ranking

PLAIN: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "dnpo",  # the same drawing gives the same bytes
    "text.parse_math": False,  # show $ in names literally
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": EDGE,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
}
SIZE = (4.2, 2.9)  # inches; a phone shows them at about this size
LONGEST_LABEL = 30  # characters of a label in a figure
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
PNG = b"\x89PNG\r\n\x1a\n"
COLUMN = 1200  # pixels: wider than a figure for one column of a paper


@dataclass(frozen=True)
class Picture:
    """A picture, as a ``data:`` address, with title and caption.

    Attributes:
        wide: whether it needs the width of a page; a phone scrolls it.
    """

    uri: str
    title: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """One group's values: x coordinates and estimates."""

    look: Look
    points: Sequence[tuple[float, Estimate]]


def over_iterations(
    metric: Metric,
    lines: Sequence[Line],
    *,
    caption: str = "",
    human: float | None = None,
    joined: bool = True,
) -> Picture:
    """Draw a metric after fine-tuning and after every iteration.

    Args:
        human: the value for human responses, drawn as a horizontal line.
        joined: whether each iteration continues the policy of the one before, so that a line joins the points.
    """
    with matplotlib.rc_context(PLAIN):
        figure, axis = _blank(metric)
        scale = metric.scale
        for place, line in enumerate(lines):
            shift = 0.05 * (place - (len(lines) - 1) / 2)
            x = np.asarray([at + shift for at, _ in line.points])
            y = scale * np.asarray([estimate.value for _, estimate in line.points])
            axis.plot(x, y, color=line.look.colour, marker=line.look.mark, linestyle="-" if joined else "none")
            for at, (_, estimate) in zip(x, line.points, strict=True):
                if estimate.low is not None and estimate.high is not None:
                    low, high = scale * estimate.low, scale * estimate.high
                    axis.plot([at, at], [low, high], color=line.look.colour, linewidth=1.1, alpha=0.75)
        if human is not None:
            axis.axhline(scale * human, color=HUMAN, linestyle="--", linewidth=1.1)
            axis.annotate(
                "human responses",
                (0.99, scale * human),
                (0, 2),  # above the line, which would cut the descender of the p
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=HUMAN,
                fontsize=8.5,
            )
        places = sorted({at for line in lines for at, _ in line.points})
        axis.set_xticks(places, [SFT if at < 0 else f"{at:.0f}" for at in places])
        axis.set_xlabel("policy after iteration" + (" (SFT: before the first)" if places[0] < 0 else ""))
        return _svg(figure, metric.title, caption)


def by_settings(found: "Ranking") -> Picture:
    """Draw the last policies' means of many settings, a row each, the best first."""
    metric, count = found.measure.metric, len(found.rows)
    with matplotlib.rc_context({**PLAIN, "font.size": 8.5}):
        figure = Figure(figsize=(SIZE[0], 0.9 + 0.19 * count), layout="constrained")
        axis = figure.subplots()
        for place, (_, estimate, _, _) in enumerate(found.rows):
            if estimate.low is not None and estimate.high is not None:
                ends = [metric.scale * estimate.low, metric.scale * estimate.high]
                axis.plot(ends, [place, place], color=OTHER.colour, linewidth=1.2)
            axis.plot(metric.scale * estimate.value, place, color=OTHER.colour, marker="o")
        names = [
            make_visible(label if len(label) <= LONGEST_LABEL else f"{label[:LONGEST_LABEL]}…")
            for label, *_ in found.rows
        ]
        axis.set_yticks(range(count), names)
        axis.set_ylim(count - 0.4, -0.6)
        axis.set_xlabel(metric.axis)
        return _svg(figure, f"{metric.title} by settings", "The last policy of each setting. Bars: 95 % intervals.")


def response(found: Response) -> Picture:
    """Draw a measure of the last policies over a setting that has several numeric values."""
    metric = found.measure.metric
    with matplotlib.rc_context(PLAIN):
        figure = Figure(figsize=(SIZE[0], height_of_response(found, SIZE[0])), layout="constrained")
        draw_response(figure, found, SIZE[0])
        title = f"{metric.title} over {make_visible(found.setting)}"
        return _svg(figure, title, "The last policy of each run. Bars: 95 % intervals.")


def over_steps(
    metric: Metric,
    lines: Mapping[Look, Sequence[Sequence[tuple[int, float]]]],
    breaks: Sequence[int],
    span: tuple[int, int],
) -> Picture:
    """Draw a metric over training steps: the mean of a group's runs as a moving average.

    Args:
        lines: steps and values of each run, by the look of its group.
        breaks: steps at which a new iteration begins.
        span: the first and the last step that any picture shows, so that pictures side by side share their axis.
    """
    with matplotlib.rc_context(PLAIN):
        figure, axis = _blank(metric)
        window = 1
        for look, runs in lines.items():
            by_step: dict[int, list[float]] = {}
            for run in runs:
                for step, value in run:
                    if np.isfinite(value):
                        by_step.setdefault(step, []).append(value)
            steps = np.asarray(sorted(by_step))
            values = np.asarray([np.mean(by_step[step]) for step in steps])
            window = max(len(steps) // 60, 1)
            if window > 1:
                axis.plot(steps, values, color=look.colour, linewidth=0.6, alpha=0.25)
            # Average within iterations only: a mean across two of them would be meaningless.
            for part in np.split(np.arange(len(steps)), np.searchsorted(steps, breaks)):
                if len(part):
                    axis.plot(*_smooth(steps[part], values[part], window), color=look.colour)
        for edge in breaks:
            axis.axvline(edge, color=BREAK, linewidth=0.8, linestyle=":")
        margin = 0.05 * (span[1] - span[0]) or 0.5
        axis.set_xlim(span[0] - margin, span[1] + margin)
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axis.set_xlabel("training step" + (" (dotted: a new iteration)" if breaks else ""))
        caption = f"Mean over {window} steps in a row; thin: every step." if window > 1 else ""
        return _svg(figure, metric.title, caption)


def _smooth(x: np.ndarray, y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    width = min(window, len(y))
    middle = np.convolve(x, np.ones(width) / width, mode="valid")
    return middle, np.convolve(y, np.ones(width) / width, mode="valid")


def histogram(logprobs: Path, title: str, note: str) -> Picture:
    """Draw the histogram of :func:`dnpo.report.drawing.logprob_histogram` as SVG."""
    title = make_visible(title)
    plain: Any = {"svg.hashsalt": "dnpo", "text.parse_math": False}
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # raised for letters that the font lacks
        path = Path(folder) / "logprobs.svg"
        logprob_histogram(logprobs, path, title, "", stacked=True)
        return Picture(_uri(path.read_bytes(), ".svg"), title, note)


def png(path: Path) -> Picture | None:
    """Read a PNG file as a picture; None if it is not a PNG."""
    content = path.read_bytes()
    title = path.stem.replace("_", " ").replace("-", " ")
    width = int.from_bytes(content[16:20])  # of its header
    return Picture(_uri(content, ".png"), title, wide=width > COLUMN) if content.startswith(PNG) else None


def _blank(metric: Metric) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE)  # a computed layout would draw everything twice
    figure.subplots_adjust(left=0.175, right=0.97, bottom=0.165, top=0.915)
    axis = figure.subplots()
    axis.set_title(metric.title)
    axis.set_ylabel(metric.unit or metric.symbol or metric.label)
    return figure, axis


def _svg(figure: Figure, title: str, caption: str) -> Picture:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(_uri(out.getvalue(), ".svg"), title, caption)


def _uri(content: bytes, suffix: str) -> str:
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(content).decode()}"
