"""Figure 9: the policy's loss and the noise's loss over the steps of one iteration."""

import json
import sys
from typing import Any

import numpy as np

from analysis.command import alone
from analysis.drawing import COLUMN, canvas, find_look, finish, foot
from analysis.keeping import DrawnFigure
from analysis.results import Array, estimate, read_once
from analysis.selection import BEGINNING, DNPO, NPO, Absent, Cells, Iteration, Runs
from dnpo.catalogue import metric
from dnpo.palette import BREAK, NOISE
from dnpo.stats.intervals import Estimate
from dnpo.tracking.reading import TrackedRun, iteration_name

TITLE = "Policy loss and noise loss over the steps of one iteration"
SWEEP = "main"
LOSSES = ("loss/policy", "loss/noise")
SMOOTH = 25  # windows in an iteration


def make(runs: Runs) -> DrawnFigure:
    """Select the first iteration with trained noise, correlate, draw."""
    cells = runs.chains()
    method = next((name for name in (DNPO, NPO) if name in cells.methods), None)
    if method is None:
        raise Absent("the selection has no run with trained noise (npo=trainable)")
    cells = cells.only([method], lambda k: k not in BEGINNING)
    k = next((k for k in cells.iterations if all(_has_noise(run, k) for run in cells.of(method, k))), None)
    if k is None:
        raise Absent(f"no iteration of {method} has a noise loss")
    cells = cells.only([method], lambda each: each == k)
    losses = {name: _losses(cells, method, k, name) for name in LOSSES}
    correlation = [float(np.corrcoef(*pair)[0, 1]) for pair in zip(*losses.values(), strict=True)]
    rows = _rows(losses, cells, method, k, correlation)
    figure, panels = canvas(COLUMN, 4.0, 2, 1, sharex=True)
    for axis, name in zip(panels, LOSSES, strict=True):
        shade = find_look(method).colour if name == "loss/policy" else NOISE
        _draw(axis, losses[name], shade)
        axis.set_ylabel(metric(name).axis)
        for epoch in _epochs(cells.used[0], losses[name].shape[1]):
            axis.axvline(epoch, color=BREAK, linewidth=0.8, linestyle=":")
    panels[-1].set_xlabel(f"training step of iteration {k}")
    among = f" ({min(correlation):.2f} to {max(correlation):.2f})" if len(correlation) > 1 else ""
    words = f"{method}, iteration {k}: r = {np.mean(correlation):.2f}{among}"
    panels[0].set_title(words.replace("-", "−"), loc="left")
    line = foot(
        cells,
        [],
        "Thin: each seed, every step; thick: mean over seeds and a window of steps, band: 95 % t interval over seeds; "
        "dotted: a new epoch; r: correlation of the two losses over steps, mean (and range) over seeds",
        "the noise's loss (without its penalty) is the policy's loss with opposite sign and newly drawn noise, so r "
        "near −1 follows from the definition and is no result about the dynamics",
    )
    return DrawnFigure(finish(figure, TITLE, line), rows, cells.used)


def _losses(cells: Cells, method: str, iteration: Iteration, name: str) -> Array:
    """Seeds × steps."""
    losses = [[step[name] for step in _steps(run, iteration)] for run in cells.of(method, iteration)]
    shortest = min(map(len, losses))
    return np.array([values[:shortest] for values in losses])


def _steps(run: TrackedRun, iteration: Iteration) -> list[dict[str, float]]:
    path = f"steps/{iteration_name(iteration)}.json"
    steps: list[dict[str, float]] | None = read_once(run, path, lambda file: json.loads(file.read_text()))
    if steps is None:
        raise Absent(f"run {run.id} has no {path}; runs of earlier versions lack it")
    return steps


def _has_noise(run: TrackedRun, iteration: Iteration) -> bool:
    return all("loss/noise" in step for step in _steps(run, iteration))


def _rows(
    losses: dict[str, Array], cells: Cells, method: str, iteration: Iteration, correlation: list[float]
) -> list[dict[str, Any]]:
    seeds = cells.seeds_of((method, iteration))
    steps = [
        {"method": method, "iteration": iteration, "seed": seed, "step": step}
        | {name: float(x[place, step]) for name, x in losses.items()}
        for place, seed in enumerate(seeds)
        for step in range(next(iter(losses.values())).shape[1])
    ]
    summary = [
        {"method": method, "iteration": iteration, "seed": s, "correlation": r}
        for s, r in zip(seeds, correlation, strict=True)
    ]
    return [*steps, *summary]


def _draw(axis: Any, x_ST: Array, shade: str) -> None:
    steps = np.arange(x_ST.shape[1])
    for values in x_ST:
        axis.plot(steps, values, color=shade, alpha=0.22, linewidth=0.4)
    wide = max(len(steps) // SMOOTH, 1)
    smooth_ST = np.array([np.convolve(values, np.full(wide, 1 / wide), "valid") for values in x_ST])
    at = np.arange(smooth_ST.shape[1]) + (wide - 1) / 2
    estimates: list[Estimate] = [estimate(column[:, None]) for column in smooth_ST.T]
    axis.plot(at, [each.value for each in estimates], color=shade, linewidth=1.2)
    low, high = float(x_ST.min()), float(x_ST.max())
    room = 0.05 * (high - low or 1.0)
    axis.set_ylim(low - room, high + room)  # with few seeds the band may be much wider
    if estimates[0].low is not None:
        axis.fill_between(
            at, [e.low for e in estimates], [e.high for e in estimates], color=shade, alpha=0.15, linewidth=0
        )


def _epochs(run: TrackedRun, steps: int) -> list[float]:
    """The steps at which a new epoch begins."""
    count = int(run.params.get("trainer.epochs", 1))
    return [] if int(run.params.get("trainer.steps", 0)) else [steps * i / count - 0.5 for i in range(1, count)]


if __name__ == "__main__":
    sys.exit(alone("fig09_losses"))
