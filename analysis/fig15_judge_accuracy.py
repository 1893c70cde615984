"""Figure 15 (not in the paper): gain of labels by a judge over labels by origin, against how often they are right."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from analysis.command import alone
from analysis.drawing import PAGE, canvas, finish, foot, line
from analysis.keeping import DrawnFigure
from analysis.results import (
    Array,
    PolicyMeasure,
    against,
    average,
    benchmarks,
    clip,
    estimate,
    numbers,
    results,
    scaled,
    seed_by_seed,
    size,
)
from analysis.selection import BEGINNING, DSL, SPIN, Absent, Cells, Runs, method_of
from dnpo.palette import DSL as DSL_LOOK
from dnpo.palette import GRID, INK, SERIES, Look
from dnpo.palette import SPIN as SPIN_LOOK
from dnpo.stats.intervals import Estimate
from dnpo.stats.significance import holm
from dnpo.stats.table import ALPHA
from dnpo.tracking.reading import TrackedRun

TITLE = "Labels by a judge against labels by origin, by how often the labels are right"
SWEEP = "judge_accuracy"
NEGLIGIBLE = 1.0  # points either way; the smallest effect of interest of the claims
ERRORS, LENGTH = "random errors", "preference for length"
LOOKS: Mapping[str, Look] = {ERRORS: DSL_LOOK, LENGTH: SERIES[4]}
ACCURACY = "right_labels_"  # prefix of columns


@dataclass(frozen=True)
class Labelling:
    """How a run's pairs are labelled.

    Attributes:
        flaws: share of flawed human responses.
        judge: the judge's kind of fault; "" for labels by origin.
        dial: the strength of the fault.
    """

    flaws: float
    judge: str = ""
    dial: float = 0.0

    @classmethod
    def of(cls, run: TrackedRun) -> "Labelling":
        """Read a run's settings.

        Raises:
            Absent: the run has labels of other kinds, or noise.
        """
        method, flaws = method_of(run), float(run.params.get("data.flaws", "nan"))
        if method == SPIN:
            return cls(flaws)
        if method != DSL:
            raise Absent(f"the selection has a run of {method}; the figure compares {DSL} with {SPIN}")
        error, length = (float(run.params.get(f"judge.{dial}", 0)) for dial in ("error", "length"))
        if error and length:
            raise Absent(f"run {run.id} has judge.error and judge.length; the figure keeps their effects apart")
        return cls(flaws, LENGTH if length else ERRORS, length or error)


def make(runs: Runs) -> DrawnFigure:
    """Select, compare with SPIN, draw a panel for each share of flawed human responses."""
    known = {repr(each): each for each in map(Labelling.of, runs.finished)}
    cells = runs.named(lambda run: repr(Labelling.of(run)), _is_own)
    measure = average(benchmarks(cells))
    rows = [row for name, each in known.items() if (row := _row(cells, measure, name, each)) is not None]
    if not any(row["judge"] for row in rows):
        raise Absent(f"the selection has no run of {DSL} with a run of {SPIN} for the same flaws and seed")
    rows.sort(key=lambda row: (row["flaws"], row["judge"], row["dial"]))
    compared = [row for row in rows if row["judge"]]
    for row, p in zip(compared, holm([row["p"] for row in compared]), strict=True):
        row |= {"p_holm": p, "reading": _read_gain(Estimate(row["mean"], row["low"], row["high"]), p)}
    shares = sorted({row["flaws"] for row in compared})
    figure, panels = canvas(PAGE, 2.9, 1, len(shares), sharex=True, sharey=True)
    for axis, flaws in zip(panels, shares, strict=True):
        _draw(axis, [row for row in rows if row["flaws"] == flaws])
        axis.set_title(f"{100 * flaws:g} % flawed")
    panels[0].set_ylabel(fill(f"right greedy answers, {DSL} − {SPIN}, pp", 22))
    for axis in panels:
        axis.set_xlabel("right labels, %")
    key = max(panels, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    line = foot(
        cells,
        compared,
        "Mean over the iterations from 1 on; bars: 95 % t intervals over items and seeds, paired; *: p ≤ 0.05 after "
        f"Holm's correction over {len(compared)} comparisons",
        "right labels: share of training pairs with the right answer chosen, among those with exactly one right answer",
        f"band: ±{NEGLIGIBLE:g} point; an effect whose interval lies within it is negligible",
    )
    return DrawnFigure(finish(figure, TITLE, line, key), rows, cells.used)


def _is_own(setting: str) -> bool:
    """Whether a setting may differ within the figure."""
    return setting.startswith(("dsl.", "judge.")) or setting == "data.flaws"


def _row(cells: Cells, measure: PolicyMeasure, name: str, of: Labelling) -> dict[str, Any] | None:
    """The gain over labels by origin, and how often labels are right; None without a run to compare with."""
    base, iterations = repr(Labelling(of.flaws)), [k for k in cells.iterations if k not in BEGINNING]
    seeds = cells.seeds_of(*((side, k) for side in (name, base) for k in iterations))
    if not seeds or not iterations:
        return None
    head = {"flaws": of.flaws, "judge": of.judge, "dial": of.dial}
    right = {f"{ACCURACY}{end}": value for end, value in numbers(_right_labels(cells, name, seeds, iterations)).items()}
    if not of.judge:
        return {**head, **right}
    sides = [np.mean([results(cells, measure, side, k, seeds) for k in iterations], axis=0) for side in (name, base)]
    found = against(*sides)
    apart: Array = sides[0] - sides[1]
    value = Estimate(float(np.nanmean(apart))) if found is None else found.difference
    gain = scaled(clip(value), measure.metric.scale)
    p = 1.0 if found is None else found.p
    return {**head, **right, **numbers(gain), **seed_by_seed(apart, seeds, measure.metric.scale), **size(apart), "p": p}


def _right_labels(cells: Cells, name: str, seeds: Sequence[int], iterations: Sequence[Any]) -> Estimate:
    """The share of right labels in percent, over seeds.

    Raises:
        Absent: the data have no verifiable answers, or no pair has exactly one right answer.
    """
    shares = []
    for run in cells.of(name, iterations[0], seeds):
        rows = [run.row(k) for k in iterations]
        if not all(row.get("labels/decided") for row in rows):
            raise Absent(f"labels/decided is not tracked, or 0, in run {run.id}: right labels cannot be counted")
        shares.append(float(np.mean([1 - row["labels/noise"] / row["labels/decided"] for row in rows])))
    return scaled(estimate(np.array([shares]).T, "share"), 100.0)


def _read_gain(gain: Estimate, p_holm: float) -> str:
    """What the corrected p and the interval say: better, worse, negligible, or open."""
    if p_holm <= ALPHA:
        return "better" if gain.value > 0 else "worse"
    if gain.low is None or gain.high is None:
        return "open"
    return "negligible" if gain.low > -NEGLIGIBLE and gain.high < NEGLIGIBLE else "open"


def _draw(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one share of flaws: a line for each kind of fault, and how often labels by origin are right."""
    axis.axhspan(-NEGLIGIBLE, NEGLIGIBLE, color=GRID, zorder=0, label="negligible")
    axis.axhline(0, color=INK, linewidth=0.8)
    for row in rows:
        if not row["judge"]:
            place = row[f"{ACCURACY}mean"]
            axis.axvline(place, color=SPIN_LOOK.colour, linewidth=0.9, linestyle="--", label="labels by origin")
    for kind, look in LOOKS.items():
        mine = sorted((row for row in rows if row["judge"] == kind), key=lambda row: row[f"{ACCURACY}mean"])
        if not mine:
            continue
        x = [row[f"{ACCURACY}mean"] for row in mine]
        line(axis, x, mine, look, f"judge with {kind}" if kind == ERRORS else f"judge with a {kind}")
    axis.margins(y=0.1)


if __name__ == "__main__":
    sys.exit(alone("fig15_judge_accuracy"))
