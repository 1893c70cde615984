"""The page's pictures: one drawing each, as SVG with outlined letters, which looks the same everywhere."""

import base64
import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dnpo.report.drawing import logprob_histogram
from dnpo.report.page import visible
from dnpo.stats.intervals import Estimate
from dnpo.tracking.reading import SFT

# Okabe and Ito's colours, which colour-blind readers can tell apart, and a mark beside each.
COLOURS = {"blue": "#0072B2", "orange": "#D55E00", "green": "#009E73", "pink": "#CC79A7", "yellow": "#E69F00"}
COLOURS |= {"sky": "#56B4E9", "black": "#333333", "brown": "#8C564B"}
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
# The same method looks the same in every report, and as in the figures of python -m analysis.
OWN = {
    **dict.fromkeys(("spin", "npo=off"), ("blue", "o")),
    "dsl": ("green", "s"),
    **dict.fromkeys(("npo", "npo=trainable"), ("yellow", "^")),
    "dnpo": ("orange", "D"),
    **dict.fromkeys(("fixed_noise", "npo=fixed"), ("pink", "v")),
    **dict.fromkeys(("npo=matched", "npo=offset"), ("black", "X")),
}
PLAIN: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "dnpo",  # the same drawing has the same bytes
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
}
SIZE = (5.0, 3.2)  # inches
MOST = len(COLOURS)
TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A drawing as a ``data:`` address, and what it says in words."""

    uri: str
    title: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Style:
    """How one group looks in every drawing."""

    label: str
    colour: str
    marker: str

    @property
    def mark(self) -> str:
        """The marker as a letter, for the legend."""
        return MARKS[self.marker]


@dataclass(frozen=True)
class Line:
    """One group's values: where they stand and how sure they are."""

    style: Style
    points: Sequence[tuple[float, Estimate]]


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A colour and a mark for each of the first :data:`MOST` labels; methods keep their own."""
    labels = labels[:MOST]
    own = {label: OWN[label] for label in labels if label in OWN}
    colours = [name for name in COLOURS if name not in {colour for colour, _ in own.values()}]
    marks = [mark for mark in MARKS if mark not in {mark for _, mark in own.values()}]
    found = {}
    for label in labels:
        colour, mark = own[label] if label in own else (colours.pop(0), marks.pop(0))
        found[label] = Style(label, COLOURS[colour], mark)
    return found


def over_iterations(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    scale: float = 1.0,
    caption: str = "",
    human: float | None = None,
    joined: bool = True,
) -> Picture:
    """A value after fine-tuning and after every iteration.

    Args:
        scale: values are drawn times this.
        human: the same of human responses, as a line across.
        joined: whether one iteration's policy came from that before it.
    """
    with matplotlib.rc_context(PLAIN):
        figure, axis = _blank(title, unit)
        for place, line in enumerate(lines):
            shift = 0.05 * (place - (len(lines) - 1) / 2)
            x = np.asarray([at + shift for at, _ in line.points])
            y = scale * np.asarray([estimate.value for _, estimate in line.points])
            axis.plot(x, y, color=line.style.colour, marker=line.style.marker, linestyle="-" if joined else "none")
            for at, (_, estimate) in zip(x, line.points, strict=True):
                if estimate.low is not None and estimate.high is not None:
                    low, high = scale * estimate.low, scale * estimate.high
                    axis.plot([at, at], [low, high], color=line.style.colour, linewidth=1.1, alpha=0.75)
        if human is not None:
            axis.axhline(scale * human, color="#777777", linestyle="--", linewidth=1.1)
            axis.annotate(
                "human responses",
                (0.99, scale * human),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color="#555555",
                fontsize=8.5,
            )
        places = sorted({at for line in lines for at, _ in line.points})
        axis.set_xticks(places, [SFT if at < 0 else f"{at:.0f}" for at in places])
        axis.set_xlabel("policy after iteration (SFT: before the first)")
        return _svg(figure, title, caption)


def over_steps(
    title: str, unit: str, lines: Mapping[Style, Sequence[Sequence[tuple[int, float]]]], breaks: Sequence[int]
) -> Picture:
    """A value over training steps: the mean of a group's runs, averaged over some steps in a row.

    Args:
        lines: of each group its runs' steps and values.
        breaks: steps at which an iteration begins.
    """
    with matplotlib.rc_context(PLAIN):
        figure, axis = _blank(title, unit)
        window = 1
        for style, runs in lines.items():
            by_step: dict[int, list[float]] = {}
            for run in runs:
                for step, value in run:
                    if np.isfinite(value):
                        by_step.setdefault(step, []).append(value)
            steps = np.asarray(sorted(by_step))
            values = np.asarray([np.mean(by_step[step]) for step in steps])
            window = max(len(steps) // 60, 1)
            if window > 1:
                axis.plot(steps, values, color=style.colour, linewidth=0.6, alpha=0.25)
            # Within an iteration only: a mean across its edge would show what never was.
            for part in np.split(np.arange(len(steps)), np.searchsorted(steps, breaks)):
                if len(part):
                    axis.plot(*_smooth(steps[part], values[part], window), color=style.colour)
        for edge in breaks:
            axis.axvline(edge, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_xlabel("training step" + (" (dotted: a new iteration)" if breaks else ""))
        caption = f"Mean over {window} steps in a row; thin: every step." if window > 1 else ""
        return _svg(figure, title, caption)


def _smooth(x: np.ndarray, y: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    width = min(window, len(y))
    middle = np.convolve(x, np.ones(width) / width, mode="valid")
    return middle, np.convolve(y, np.ones(width) / width, mode="valid")


def histogram(logprobs: Path, title: str, note: str) -> Picture:
    """What :func:`dnpo.report.drawing.logprob_histogram` draws."""
    title = visible(title)
    plain: Any = {"svg.hashsalt": "dnpo", "text.parse_math": False}
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(plain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters that the font lacks
        path = Path(folder) / "logprobs.svg"
        logprob_histogram(logprobs, path, title, "")
        return Picture(_uri(path.read_bytes(), ".svg"), title, note, wide=True)


def png(path: Path) -> Picture | None:
    """A picture that was made elsewhere; None for a file that is none."""
    content = path.read_bytes()
    title = path.stem.replace("_", " ").replace("-", " ")
    return Picture(_uri(content, ".png"), title, wide=True) if content.startswith(PNG) else None


def _blank(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    axis.set_title(title)
    axis.set_ylabel(unit)
    return figure, axis


def _svg(figure: Figure, title: str, caption: str) -> Picture:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(_uri(out.getvalue(), ".svg"), title, caption)


def _uri(content: bytes, suffix: str) -> str:
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(content).decode()}"
