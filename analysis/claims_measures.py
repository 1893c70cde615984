"""What a claim can be computed from: one policy of one tracked run gives a number, or a number a held-out prompt.

Every measure is a pure function of rows that a run has tracked; ``MEASURES`` and ``BETWEEN`` give them the names that
``claims.yaml`` has for them. Differences, means over iterations and seeds are taken by ``claims.py``, the same way for
all of them. What is missing raises :class:`~dnpo.errors.DataError` and makes the claim one that is not measured.

Items are rows as ``items/NAME.parquet`` has them, steps a list of metrics by training step.
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
from scipy.signal import detrend
from scipy.stats import ks_2samp

from dnpo import catalogue, records
from dnpo.errors import DataError
from dnpo.tracking.reading import TrackedRun, iteration_name

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

Row = Mapping[str, Any]
Values = dict[str, float] | float
"""By the id of a held-out prompt, NaN where there is none; or one number."""


@dataclass(frozen=True)
class Cell:
    """One policy of a run, and what was tracked of it.

    Attributes:
        iteration: after which it is, or ``SFT``.
    """

    run: TrackedRun
    iteration: int | str

    @cached_property
    def row(self) -> Row:
        """Its row of the run's table."""
        return self.run.row(self.iteration)

    @cached_property
    def items(self) -> list[Row]:
        """A row a held-out response."""
        rows: list[Row] = pq.read_table(self._artifact(f"items/{iteration_name(self.iteration)}.parquet")).to_pylist()
        return rows

    @cached_property
    def steps(self) -> list[Row]:
        """The metrics of its training, by step."""
        rows: list[Row] = json.loads(self._artifact(f"steps/{iteration_name(self.iteration)}.json").read_text())
        return rows

    @cached_property
    def logprobs(self) -> Mapping[str, Any]:
        """Log-probabilities of chosen, rejected and new responses under it."""
        with np.load(self._artifact(f"logprobs/{iteration_name(self.iteration)}.npz")) as arrays:
            found: dict[str, Any] = dict(arrays)
            return found

    def _artifact(self, path: str) -> Any:
        found = self.run.artifact(path)
        if found is None:
            raise DataError(f"run {self.run.id[:8]} ({self.run.name}) has no artefact {path}")
        return found


# --- of held-out responses --------------------------------------------------------------------------------------------


def by_prompt(items: Sequence[Row], column: str = "score", kind: str = "sample") -> dict[str, float]:
    """The mean of a column over the responses of one kind to each prompt; NaN where none of them has a value.

    Args:
        column: ``score`` or ``second`` (0-100) or ``right`` (0 or 1).
        kind: ``sample``, ``greedy`` or ``human``.

    Raises:
        DataError: no response of this kind has a value.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item["kind"] == kind:
            found[item["id"]] += [] if item.get(column) is None else [float(item[column])]
    if not any(found.values()):
        hint = "; a second judge gives it: judge@second_judge=…" if column == "second" else ""
        raise DataError(f"no {kind} response has a value of {column}{hint}")
    return {name: _mean(values) for name, values in found.items()}


def as_good_as_human(items: Sequence[Row], column: str = "score") -> dict[str, float]:
    """For each prompt the share of samples with as many points as the human response, or more."""
    human = by_prompt(items, column, "human")
    found: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item["kind"] == "sample":
            points, of_human = item.get(column), human.get(item["id"], math.nan)
            found[item["id"]] += [] if points is None or math.isnan(of_human) else [float(points >= of_human)]
    return {name: _mean(values) for name, values in found.items()}


def duels(ours: Sequence[Row], theirs: Sequence[Row], column: str = "score") -> dict[str, float]:
    """For each prompt the share of pairs of samples that ours wins less that it loses; every sample meets every other.

    Between −1 and 1; ties count for neither. NaN where one side has no score.
    """
    a, b = _samples(ours, column), _samples(theirs, column)
    if a.keys() != b.keys():
        raise DataError("the two sides were not measured on the same held-out prompts")
    return {name: _mean([float(np.sign(x - y)) for x in a[name] for y in b[name]]) for name in a}


def _samples(items: Sequence[Row], column: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for item in items:
        if item["kind"] == "sample":
            found[item["id"]] += [] if item.get(column) is None else [float(item[column])]
    return found


# --- one number a policy ----------------------------------------------------------------------------------------------


def metric(row: Row, name: str, less: str = "") -> float:
    """A metric of the run's table, less another one if there is a name for it.

    Raises:
        DataError: it was not measured.
    """
    return _number(row, name) - (_number(row, less) if less else 0.0)


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        known = catalogue.find(name)
        hint = f"; {known.needs} measures it" if known is not None and known.needs else ""
        raise DataError(f"{name} was not measured after iteration {row.get('iteration', '?')}{hint}")
    return float(value)


def distance(logprobs: Mapping[str, Any], first: str, second: str) -> float:
    """Kolmogorov-Smirnov distance of two samples of summed log-probabilities: 0 the same, 1 without overlap.

    Args:
        first, second: ``chosen``, ``rejected`` or ``new``.
    """
    if not {first, second} <= logprobs.keys():
        raise DataError(f"there are no log-probabilities of {first} and {second} responses")
    return float(ks_2samp(logprobs[first], logprobs[second]).statistic)


# --- of training steps ------------------------------------------------------------------------------------------------


def mean_over_steps(steps: Sequence[Row], name: str, otherwise: str = "") -> float:
    """The mean of a metric over the steps of one training, each weighted by its rows.

    Args:
        otherwise: the metric to take where nothing has the first, as a training without noise has no noisy margin.
    """
    chosen = otherwise if otherwise and all(name not in step for step in steps) else name
    _series(steps, chosen)
    return records.mean_over_steps(steps, chosen)


def correlation(steps: Sequence[Row], first: str, second: str, detrended: bool = False) -> float:
    """Pearson's correlation of two metrics over the steps of one training.

    Args:
        detrended: after the straight line that fits each best has been taken off, so that two series which only both
            rise or fall do not count.
    """
    x, y = _series(steps, first), _series(steps, second)
    if detrended:
        x, y = detrend(x), detrend(y)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        raise DataError(f"{first} and {second} need three steps or more, and to change over them")
    return float(np.corrcoef(x, y)[0, 1])


def rise_within_epochs(steps: Sequence[Row], name: str, epochs: int) -> float:
    """By how much a metric rises within an epoch: the mean over epochs of its least-squares line's rise."""
    series = _epochs(steps, name, epochs)
    place = np.arange(series.shape[1])
    slopes = [float(np.polyfit(place, epoch, 1)[0]) for epoch in series]
    return _mean(slopes) * (len(place) - 1)


def change_over_epochs(steps: Sequence[Row], name: str, epochs: int) -> float:
    """The mean of a metric in the last epoch less that in the first."""
    series = _epochs(steps, name, epochs)
    return float(series[-1].mean() - series[0].mean())


def _series(steps: Sequence[Row], name: str) -> Any:
    values = [step[name] for step in steps if name in step]
    if not values:
        raise DataError(f"no training step has {name}")
    return np.asarray(values, float)


def _epochs(steps: Sequence[Row], name: str, epochs: int) -> Any:
    """Epochs × steps."""
    series = _series(steps, name)
    if epochs < 2 or len(series) % epochs or len(series) < 2 * epochs:
        raise DataError(f"{len(series)} training steps are not {epochs} epochs of two steps or more")
    return series.reshape(epochs, -1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


class ClaimMeasure(NamedTuple):
    """A measure, and which of a cell's parts it is computed from."""

    of: str
    function: Callable[..., Values]


MEASURES: Mapping[str, ClaimMeasure] = {
    "by_prompt": ClaimMeasure("items", by_prompt),
    "as_good_as_human": ClaimMeasure("items", as_good_as_human),
    "metric": ClaimMeasure("row", metric),
    "distance": ClaimMeasure("logprobs", distance),
    "mean_over_steps": ClaimMeasure("steps", mean_over_steps),
    "correlation": ClaimMeasure("steps", correlation),
    "rise_within_epochs": ClaimMeasure("steps", rise_within_epochs),
    "change_over_epochs": ClaimMeasure("steps", change_over_epochs),
}
BETWEEN: Mapping[str, ClaimMeasure] = {"duels": ClaimMeasure("items", duels)}  # of a side against the other
