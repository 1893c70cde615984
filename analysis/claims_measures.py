"""Measures for claims: each computes one number for a policy of a tracked run, or one for each held-out prompt.

Every measure is a pure function of data that a run has tracked. ``MEASURES`` and ``BETWEEN`` have the names that
``claims.yaml`` uses. ``claims_assess.py`` computes differences and means over iterations and seeds, in the same way for
all measures. If data are missing, a measure raises :class:`~dnpo.errors.DataError`, and the claim is not measured.

Items are rows of ``items/NAME.parquet``; steps are the metrics of each training step.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import ks_2samp

from dnpo import catalogue, records
from dnpo.errors import DataError
from dnpo.tracking.reading import TrackedRun, iteration_name

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

Row = Mapping[str, Any]
Values = dict[str, float] | float
"""Numbers by the id of a held-out prompt, NaN if one is missing; or a single number."""


@dataclass(frozen=True)
class TrackedPolicy:
    """One policy of a tracked run, with its data.

    Attributes:
        iteration: the iteration that trained it, or ``SFT``.
    """

    run: TrackedRun
    iteration: int | str

    @cached_property
    def row(self) -> Row:
        """Its row in the run's table."""
        return self.run.row(self.iteration)

    @cached_property
    def items(self) -> list[Row]:
        """One row for each held-out response."""
        rows: list[Row] = pq.read_table(self._artifact(f"items/{iteration_name(self.iteration)}.parquet")).to_pylist()
        return rows

    @cached_property
    def steps(self) -> list[Row]:
        """The metrics of each step of its training."""
        rows: list[Row] = json.loads(self._artifact(f"steps/{iteration_name(self.iteration)}.json").read_text())
        return rows

    @cached_property
    def logprobs(self) -> Mapping[str, Any]:
        """Its log-probabilities of chosen, rejected and new responses."""
        with np.load(self._artifact(f"logprobs/{iteration_name(self.iteration)}.npz")) as arrays:
            content: dict[str, Any] = dict(arrays)
            return content

    def _artifact(self, path: str) -> Any:
        file = self.run.artifact(path)
        if file is None:
            raise DataError(f"run {self.run.id[:8]} ({self.run.name}) has no artefact {path}")
        return file


# --- held-out responses -----------------------------------------------------------------------------------------------


def by_prompt(items: Sequence[Row], column: str = "score", kind: str = "sample", family: str = "") -> dict[str, float]:
    """The mean of a column over the responses of one kind to each prompt; NaN if no response has a value.

    Args:
        column: ``score`` or ``second`` (0-100) or ``right`` (0 or 1).
        kind: ``sample``, ``greedy`` or ``human``.
        family: only prompts of this family; all prompts by default.

    Raises:
        DataError: no response of this kind and family has a value.
    """
    points: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item["kind"] == kind and (not family or item["family"] == family):
            points[item["id"]] += [] if item.get(column) is None else [float(item[column])]
    if not any(points.values()):
        hint = "; a second judge gives it: judge@second_judge=…" if column == "second" else ""
        among = f" to prompts of family {family}" if family else ""
        raise DataError(f"no {kind} response{among} has a value of {column}{hint}")
    return {name: _mean(values) for name, values in points.items()}


def as_good_as_human(items: Sequence[Row], column: str = "score") -> dict[str, float]:
    """For each prompt, the share of samples with at least as many points as the human response."""
    human = by_prompt(items, column, "human")
    wins: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item["kind"] == "sample":
            points, of_human = item.get(column), human.get(item["id"], math.nan)
            wins[item["id"]] += [] if points is None or math.isnan(of_human) else [float(points >= of_human)]
    return {name: _mean(values) for name, values in wins.items()}


def duels(ours: Sequence[Row], theirs: Sequence[Row], column: str = "score") -> dict[str, float]:
    """For each prompt, our share of wins minus our share of losses, over all pairs of our and their samples.

    Between −1 and 1; ties count for neither side. NaN if one side has no score.
    """
    a, b = _samples(ours, column), _samples(theirs, column)
    if a.keys() != b.keys():
        raise DataError("the two sides were not measured on the same held-out prompts")
    return {name: _mean([float(np.sign(x - y)) for x in a[name] for y in b[name]]) for name in a}


def _samples(items: Sequence[Row], column: str) -> dict[str, list[float]]:
    points: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item["kind"] == "sample":
            points[item["id"]] += [] if item.get(column) is None else [float(item[column])]
    return points


# --- one number for each policy ---------------------------------------------------------------------------------------


def metric(row: Row, name: str, less: str = "") -> float:
    """A metric of the run's table, minus the metric ``less`` if one is given.

    Raises:
        DataError: a metric was not measured.
    """
    return _number(row, name) - (_number(row, less) if less else 0.0)


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        entry = catalogue.find(name)
        hint = f"; {entry.needs} measures it" if entry is not None and entry.needs else ""
        raise DataError(f"{name} was not measured after iteration {row.get('iteration', '?')}{hint}")
    return float(value)


def distance(logprobs: Mapping[str, Any], first: str, second: str) -> float:
    """Kolmogorov-Smirnov distance between two samples of summed log-probabilities: 0 if equal, 1 without overlap.

    Args:
        first, second: ``chosen``, ``rejected`` or ``new``.
    """
    if not {first, second} <= logprobs.keys():
        raise DataError(f"there are no log-probabilities of {first} and {second} responses")
    return float(ks_2samp(logprobs[first], logprobs[second]).statistic)


# --- training steps ---------------------------------------------------------------------------------------------------


def mean_over_steps(steps: Sequence[Row], name: str, otherwise: str = "") -> float:
    """The mean of a metric over the steps of one training, each weighted by its rows.

    Args:
        otherwise: the metric to use if no step has ``name``; for example, a training without noise has no noisy margin.
    """
    chosen = otherwise if otherwise and all(name not in step for step in steps) else name
    _series(steps, chosen)
    return records.mean_over_steps(steps, chosen)


def share_of_steps(steps: Sequence[Row], name: str, below: float) -> float:
    """The share of the steps of one training in which a metric is below a threshold, each weighted by its rows."""
    return float(np.average(_series(steps, name) < below, weights=_weights(steps, name)))


def correlation(steps: Sequence[Row], first: str, second: str, detrended: bool = False) -> float:
    """Pearson's correlation of two metrics over the steps of one training, each weighted by its rows.

    Args:
        detrended: subtract the best-fitting straight line from each series first, so that a common trend does not
            count as correlation.
    """
    x, y, weights = _series(steps, first), _series(steps, second), _weights(steps, first)
    if detrended:
        x, y = _detrend(x, weights), _detrend(y, weights)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise DataError(f"{first} and {second} need at least three training steps, and must vary over them")
    covariance = np.cov(x, y, aweights=weights)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


def rise_within_epochs(steps: Sequence[Row], name: str, epochs: int) -> float:
    """The rise of a metric's least-squares line within an epoch, averaged over epochs; steps count by their rows."""
    series, weights = _epochs(steps, name, epochs)
    place = np.arange(series.shape[1])
    slopes = [
        float(np.polyfit(place, epoch, 1, w=np.sqrt(rows))[0]) for epoch, rows in zip(series, weights, strict=True)
    ]
    return _mean(slopes) * (len(place) - 1)


def change_over_epochs(steps: Sequence[Row], name: str, epochs: int) -> float:
    """The mean of a metric in the last epoch minus its mean in the first; steps count by their rows."""
    series, weights = _epochs(steps, name, epochs)
    return float(np.average(series[-1], weights=weights[-1]) - np.average(series[0], weights=weights[0]))


def _series(steps: Sequence[Row], name: str) -> Any:
    values = [step[name] for step in steps if name in step]
    if not values:
        raise DataError(f"no training step has {name}")
    return np.asarray(values, float)


def _weights(steps: Sequence[Row], name: str) -> Any:
    """The number of rows of each step that has a metric; 1 if it was not recorded."""
    return np.asarray([float(step.get("rows", 1.0)) for step in steps if name in step])


def _detrend(series: Any, weights: Any) -> Any:
    """A series minus its weighted least-squares line."""
    place = np.arange(len(series))
    return series - np.polyval(np.polyfit(place, series, 1, w=np.sqrt(weights)), place)


def _epochs(steps: Sequence[Row], name: str, epochs: int) -> tuple[Any, Any]:
    """A metric and the rows of its steps as arrays, epochs × steps."""
    series = _series(steps, name)
    if epochs < 2 or len(series) % epochs or len(series) < 2 * epochs:
        raise DataError(f"{len(series)} training steps cannot be divided into {epochs} epochs of at least two steps")
    return series.reshape(epochs, -1), _weights(steps, name).reshape(epochs, -1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class ClaimMeasure(NamedTuple):
    """A measure, and the attribute of a :class:`TrackedPolicy` that it is computed from.

    Attributes:
        ends: its least and largest possible value, if it is a mean over units such as answers or steps; None otherwise.
    """

    of: str
    function: Callable[..., Values]
    ends: tuple[float, float] | None = None


MEASURES: Mapping[str, ClaimMeasure] = {
    "by_prompt": ClaimMeasure("items", by_prompt, (0.0, 100.0)),
    "as_good_as_human": ClaimMeasure("items", as_good_as_human, (0.0, 1.0)),
    "metric": ClaimMeasure("row", metric),
    "distance": ClaimMeasure("logprobs", distance),
    "mean_over_steps": ClaimMeasure("steps", mean_over_steps),
    "share_of_steps": ClaimMeasure("steps", share_of_steps, (0.0, 1.0)),
    "correlation": ClaimMeasure("steps", correlation),
    "rise_within_epochs": ClaimMeasure("steps", rise_within_epochs),
    "change_over_epochs": ClaimMeasure("steps", change_over_epochs),
}
BETWEEN: Mapping[str, ClaimMeasure] = {
    "duels": ClaimMeasure("items", duels, (-1.0, 1.0))
}  # these compare one side with the other


def ends(measure: str, arguments: Mapping[str, Any]) -> tuple[float, float] | None:
    """The least and the largest possible value of a measure of units; None if it does not count units."""
    right = measure == "by_prompt" and arguments.get("column") == "right"
    return (0.0, 1.0) if right else {**MEASURES, **BETWEEN}[measure].ends
