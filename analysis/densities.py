"""Figures 2 and 10: log-probabilities of positive, negative and newly generated samples under one model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.drawing import COLUMN, SMALL, canvas, finish, foot
from analysis.keeping import DrawnFigure
from analysis.results import Array, read_once
from analysis.selection import Absent, Cells, Iteration, Runs
from dnpo.catalogue import metric
from dnpo.evaluate.distances import ks
from dnpo.palette import SAMPLES
from dnpo.report.drawing import LABELS
from dnpo.tracking.reading import SFT, TrackedRun, iteration_name

BINS = 40
QUANTITIES = {"per token": "log-probability per token, nats", "summed": "log-probability of the response, nats"}


def draw(runs: Runs, method: str, title: str) -> DrawnFigure:
    """Draw one method's samples, pooled over seeds: a row for each iteration; per token left, summed right."""
    cells = runs.chains().only([method], lambda k: k != SFT)
    iterations = cells.iterations
    samples = {k: _samples(cells, method, k) for k in iterations}
    shown = metric("stagnation/ks")
    figure, panels = canvas(
        COLUMN, 1.7 + 1.05 * len(iterations), len(iterations), len(QUANTITIES), sharex="col", sharey="col"
    )
    rows: list[dict[str, Any]] = []
    for column, (quantity, label) in enumerate(QUANTITIES.items()):
        every = [_values(loaded, name, quantity) for k in iterations for loaded in samples[k] for name in SAMPLES]
        # A long tail would compress the rest of the axis.
        low = float(np.percentile(np.concatenate(every), 1))
        edges = np.linspace(low, 0, BINS + 1)
        for line, k in enumerate(iterations):
            axis = panels[line * len(QUANTITIES) + column]
            for name, colour in SAMPLES.items():
                values = np.concatenate([_values(loaded, name, quantity) for loaded in samples[k]])
                density, _ = np.histogram(np.clip(values, low, 0), edges, density=True)
                axis.stairs(density, edges, color=colour, linewidth=0.9, label=LABELS[name])
                axis.stairs(density, edges, color=colour, fill=True, alpha=0.12)
                rows += [
                    {"quantity": quantity, "iteration": k, "samples": name, "from": a, "to": b, "density": d}
                    for a, b, d in zip(edges[:-1], edges[1:], density, strict=True)
                ]
            distances = _distances(samples[k], quantity)
            mean = shown.format(float(np.mean(distances)))
            critical = max(run.row(k)["stagnation/ks_critical"] for run in cells.of(method, k))
            rows += [
                {"quantity": f"KS rejected–new, {quantity}", "iteration": k, "seed": seed, "distance": distance}
                for seed, distance in zip(cells.seeds_of((method, k)), distances, strict=True)
            ]
            spread = f" ({shown.format(min(distances))}–{shown.format(max(distances))})" if len(distances) > 1 else ""
            axis.text(
                0.03,
                0.97,
                f"KS rejected–new\n{mean}{spread}\nby chance < {shown.format(critical)}",
                transform=axis.transAxes,
                va="top",
                fontsize=SMALL,
            )
            if column == 0:
                axis.set_ylabel(f"iteration {k}\ndensity")
        axis.set_xlabel(label.replace(" of", "\nof").replace(" per", "\nper"))
    explained = foot(
        cells,
        [],
        "Chosen (positive) and rejected (negative) samples of the iteration, and fresh samples for the same prompts, "
        "all under the policy that the iteration trained; seeds pooled, the lowest 1 % at the left edge. KS: "
        "Kolmogorov-Smirnov distance, mean (and range) over seeds; by chance: its 5 % critical value for as many "
        "samples",
    )
    return DrawnFigure(finish(figure, title, explained, panels[0]), rows, cells.used)


def _samples(cells: Cells, method: str, iteration: Iteration) -> list[dict[str, Array]]:
    return [_load(run, iteration) for run in cells.of(method, iteration)]


def _load(run: TrackedRun, iteration: Iteration) -> dict[str, Array]:
    path = f"logprobs/{iteration_name(iteration)}.npz"
    content = read_once(run, path, lambda file: dict(np.load(file)))
    if content is None:
        raise Absent(f"run {run.id} has no {path}; runs of earlier versions lack it")
    loaded: dict[str, Array] = content
    return loaded


def _values(loaded: dict[str, Array], name: str, quantity: str) -> Array:
    if quantity == "summed":
        return loaded[name]
    per_token: Array = loaded[name] / np.maximum(loaded[f"{name}_tokens"], 1)
    return per_token


def _distances(samples: Sequence[dict[str, Array]], quantity: str) -> list[float]:
    """The distance for each seed, without new samples equal to the human response, since training omits such pairs."""
    distances = []
    for loaded in samples:
        compared = loaded["compared"].astype(bool)
        old, new = (_values(loaded, name, quantity)[compared] for name in ("rejected", "new"))
        distances.append(ks(old, new))
    return distances
