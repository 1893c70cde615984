"""Figure 16 (not in the paper): what noise on the reference changes, by β, epochs and flaws of the human responses."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle

from analysis.command import alone
from analysis.drawing import PAGE, SMALL, canvas, finish, foot
from analysis.keeping import DrawnFigure
from analysis.results import against, average, benchmarks, clip, numbers, results, scaled, seed_by_seed, size
from analysis.selection import CONSTANT, FIXED, NPO, SPIN, Absent, Cells, Runs, method_of
from dnpo.palette import BREAK, INK, PAPER
from dnpo.stats.intervals import Estimate
from dnpo.stats.significance import holm
from dnpo.stats.table import ALPHA
from dnpo.tracking.reading import TrackedRun
from dnpo.wording import fixed

TITLE = "Right greedy answers with noise against those without it"
SWEEP = "noise_map"
NEGLIGIBLE = 1.0  # points either way; the smallest effect of interest of the claims
PAIRS = ((NPO, SPIN), (NPO, CONSTANT), (FIXED, SPIN), (CONSTANT, SPIN))  # of methods, the first minus the second
SATURATION = "margin/saturation"
COLOURS = "PuOr"


@dataclass(frozen=True)
class Place:
    """A method and its place in the map."""

    method: str
    flaws: float
    beta: float
    epochs: int

    @classmethod
    def of(cls, run: TrackedRun) -> "Place":
        """Read a run's settings.

        Raises:
            Absent: the run has labels by score or another kind of noise.
        """
        method, params = method_of(run), run.params
        if method not in {each for pair in PAIRS for each in pair}:
            raise Absent(f"the selection has a run of {method}; the figure compares noise with labels by origin")
        flaws, beta = (float(params.get(name, "nan")) for name in ("data.flaws", "objective.beta"))
        return cls(method, flaws, beta, int(params.get("trainer.epochs", 0)))


def make(runs: Runs) -> DrawnFigure:
    """Select, compare, draw a heat map for each comparison and share of flawed human responses."""
    cells = runs.named(lambda run: repr(Place.of(run)), _is_own)
    places = sorted({(p.flaws, p.beta, p.epochs) for p in map(Place.of, runs.finished)})
    rows = [row for pair in PAIRS for place in places if (row := _row(cells, pair, place)) is not None]
    if not rows:
        raise Absent(f"the selection has no run with noise and one of {SPIN} or {CONSTANT} in the same place and seed")
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    pairs = [pair for pair in PAIRS if any((row["method"], row["base"]) == pair for row in rows)]
    shares = sorted({row["flaws"] for row in rows})
    figure, panels = canvas(PAGE, 1.2 + 1.25 * len(pairs), len(pairs), len(shares), sharex=True, sharey=True)
    most = max(2 * NEGLIGIBLE, *(abs(row["mean"]) for row in rows))
    for place, axis in enumerate(panels):
        (method, base), flaws = pairs[place // len(shares)], shares[place % len(shares)]
        among = [row for row in rows if (row["method"], row["base"], row["flaws"]) == (method, base, flaws)]
        _draw(axis, among, sorted({r["beta"] for r in rows}), sorted({r["epochs"] for r in rows}), most)
        axis.set_title(f"{method} − {base}, {100 * flaws:g} % flawed")
        if place >= len(panels) - len(shares):
            axis.set_xlabel("β")
        if place % len(shares) == 0:
            axis.set_ylabel("epochs")
    line = foot(
        cells,
        rows,
        "Differences in points after the last iteration, with 95 % t intervals over items and seeds, paired; *: p ≤ "
        f"0.05 after Holm's correction over {len(rows)} comparisons",
        "orange: worse, purple: better; σ: gradient weight of the loss of the method after the minus "
        "sign, near 0 where it is saturated",
    )
    key = f"negligible: the interval lies within ±{NEGLIGIBLE:g} point"
    panels[0].scatter([], [], marker="s", facecolors="none", edgecolors=INK, linewidths=0.9, label=key)
    return DrawnFigure(finish(figure, TITLE, line, panels[0]), rows, cells.used)


def _is_own(setting: str) -> bool:
    """Whether a setting may differ within the figure."""
    return setting.startswith(("npo.", "dsl.")) or setting in ("data.flaws", "objective.beta", "trainer.epochs")


def _row(cells: Cells, pair: tuple[str, str], place: tuple[float, float, int]) -> dict[str, Any] | None:
    """The difference of two methods in a place; None if one of them has no run there."""
    names = [repr(Place(method, *place)) for method in pair]
    ends = [k for k in cells.iterations if cells.seeds_of(*((name, k) for name in names))]
    if not ends:
        return None
    last, measure = ends[-1], average(benchmarks(cells))
    seeds = cells.seeds_of(*((name, last) for name in names))
    sides = [results(cells, measure, name, last, seeds) for name in names]
    found, apart = against(*sides), sides[0] - sides[1]
    value = Estimate(float(np.nanmean(apart))) if found is None else found.difference
    gain = scaled(clip(value), measure.metric.scale)
    flat = [run.row(last).get(SATURATION) for run in cells.of(names[1], last, seeds)]
    known = [float(each) for each in flat if each is not None]
    head = {"method": pair[0], "base": pair[1], **dict(zip(("flaws", "beta", "epochs"), place, strict=True))}
    saturation = {"saturation": float(np.mean(known)) if known else None}
    by_seed = seed_by_seed(apart, seeds, measure.metric.scale)
    p = 1.0 if found is None else found.p
    return {**head, **numbers(gain), **saturation, "negligible": _is_negligible(gain), **by_seed, **size(apart), "p": p}


def _is_negligible(gain: Estimate) -> bool:
    """Whether the whole interval lies within the smallest effect of interest."""
    return gain.low is not None and gain.high is not None and gain.low > -NEGLIGIBLE and gain.high < NEGLIGIBLE


def _draw(
    axis: Axes, rows: Sequence[Mapping[str, Any]], betas: Sequence[float], epochs: Sequence[int], most: float
) -> None:
    """Draw a heat map with the effects and their intervals as text; cells without runs stay grey."""
    grid = np.full((len(epochs), len(betas)), np.nan)
    axis.set_facecolor(BREAK)
    for row in rows:
        at = epochs.index(row["epochs"]), betas.index(row["beta"])
        grid[at] = row["mean"]
        low, high = row["low"], row["high"]
        between = "" if low is None else f"\n{fixed(low, 1, signed=True)} to {fixed(high, 1, signed=True)}"
        star = "*" if row["p_holm"] <= ALPHA else ""
        weight = "" if row["saturation"] is None else f"\nσ {row['saturation']:.2f}"
        text = f"{fixed(row['mean'], 1, signed=True)}{star}{between}{weight}"
        dark = row["mean"] > 0.5 * most or row["mean"] < -0.75 * most  # the colours of the two sides differ in depth
        ink = PAPER if dark else INK
        axis.text(at[1], at[0], text, ha="center", va="center", fontsize=SMALL, color=ink, linespacing=1.1)
        if row["negligible"]:
            corner = at[1] - 0.46, at[0] - 0.46
            axis.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=INK, linewidth=0.9))
    norm = TwoSlopeNorm(0, -most, most)
    axis.imshow(grid, cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    for edge in range(1, len(betas)):
        axis.axvline(edge - 0.5, color=PAPER, linewidth=1.5)
    for edge in range(1, len(epochs)):
        axis.axhline(edge - 0.5, color=PAPER, linewidth=1.5)
    axis.set_xticks(range(len(betas)), [f"{beta:g}" for beta in betas])
    axis.set_yticks(range(len(epochs)), [str(each) for each in epochs])
    axis.tick_params(length=0)


if __name__ == "__main__":
    sys.exit(alone("fig16_noise_map"))
