"""Numbers with intervals over items and seeds, and paired comparisons of methods.

Shapes: S seeds, I items. If runs kept no items of a measure, I = 1 and its intervals are over seeds only.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.selection import BEGINNING, Absent, Cells, Iteration, spell
from dnpo.catalogue import Metric, metric
from dnpo.errors import DataError
from dnpo.evaluate.leaderboard import BENCHMARKS, SIX
from dnpo.stats.intervals import Estimate, estimate_mean
from dnpo.stats.paired import compare_paired
from dnpo.stats.significance import holm
from dnpo.tracking.reading import TrackedRun, iteration_name

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

Array = npt.NDArray[np.float64]
Items = Mapping[str, float]
Kind = Literal["share", "amount", "number"]
AVERAGE = "Average"


@dataclass(frozen=True)
class PolicyMeasure:
    """A quantity measured for each policy.

    Attributes:
        metric: an entry of the catalogue, or a metric that runs do not track.
        items: returns the measure's values by item, weighted so that their plain mean is the number in the table; None
            if a run has not kept them.
    """

    metric: Metric
    items: Callable[[TrackedRun, Iteration], Items | None] = lambda run, iteration: None

    @property
    def name(self) -> str:
        """Its column in a run's table."""
        return self.metric.name

    @property
    def label(self) -> str:
        """Its name for readers."""
        return self.metric.label


@dataclass(frozen=True)
class Against:
    """A paired difference, a − b, with its interval, the test's p, and the smallest detectable difference."""

    difference: Estimate
    p: float
    detectable: float | None
    notes: tuple[str, ...] = ()


# --- what is measured -------------------------------------------------------------------------------------------------


def score(column: str = "score") -> PolicyMeasure:
    """A judge's mean score of sampled answers to held-out prompts; ``second`` is the second judge's."""
    name = "eval/score" if column == "score" else "second/score"
    return PolicyMeasure(metric(name), lambda run, k: _read_samples(run, k, column, None))


def outcome(which: str, column: str = "score") -> PolicyMeasure:
    """Share of sampled answers that ``win``, ``tie`` or ``lose`` against the human response, or are ``as_good``."""
    wanted = {"win": (1,), "tie": (0,), "lose": (-1,), "as_good": (0, 1)}[which]
    prefix = "eval" if column == "score" else "second"
    name = f"{prefix}/{which}"
    shown = replace(metric(f"{prefix}/win"), name=name, label="win or tie") if which == "as_good" else metric(name)
    return PolicyMeasure(shown, lambda run, k: _read_samples(run, k, column, wanted))


def benchmarks(cells: Cells) -> list[PolicyMeasure]:
    """The benchmarks that every cell has: those of the paper's six, or else the families of the tiny world.

    Raises:
        Absent: no benchmark is tracked.
    """
    tables = [cells.runs[place].row(place[1]) for place in cells.runs]
    six = [name for name in SIX if all(f"leaderboard/{name}" in row for row in tables)]
    if six:
        return [PolicyMeasure(metric(f"leaderboard/{name}"), _benchmark(name)) for name in six]
    prefix = "eval/accuracy/"
    families = [name.removeprefix(prefix) for name in tables[0] if name.startswith(prefix)]
    common = [family for family in families if all(prefix + family in row for row in tables)]
    if not common:
        raise Absent("no benchmark is tracked: neither leaderboard/* (eval=leaderboard) nor eval/accuracy/FAMILY")
    return [PolicyMeasure(metric(prefix + family), _family(family)) for family in common]


def average(measures: Sequence[PolicyMeasure]) -> PolicyMeasure:
    """The mean over benchmarks. Each has the same weight, whatever its number of items."""

    def items(run: TrackedRun, k: Iteration) -> Items | None:
        parts = [each.items(run, k) for each in measures]
        if any(part is None for part in parts):
            return None
        total = sum(len(part) for part in parts if part is not None)
        return {
            f"{each.label}/{name}": value * total / (len(parts) * len(part))
            for each, part in zip(measures, parts, strict=True)
            if part is not None
            for name, value in part.items()
        }

    shown = metric("leaderboard/average" if is_leaderboard(measures) else "eval/accuracy")
    if is_leaderboard(measures) and len(measures) < len(SIX):
        shown = replace(shown, name="")  # runs track only the average over all six
    return PolicyMeasure(replace(shown, label=AVERAGE), items)


def is_leaderboard(measures: Sequence[PolicyMeasure]) -> bool:
    """Whether benchmarks belong to the Open LLM Leaderboard, as in the paper."""
    return measures[0].name.startswith("leaderboard/")


def text_measure(name: str) -> PolicyMeasure:
    """A measure of generated texts. Their prompts differ between seeds, so it has no items to pair."""
    return PolicyMeasure(metric(f"texts/{name}"))


def human_score(cells: Cells, column: str = "score") -> float:
    """The judge's mean score of the human responses to the held-out prompts; all runs have the same ones."""
    (_, k, _), run = next(iter(cells.runs.items()))
    return float(run.row(k)[f"{score(column).name}_human"])


def duel(a: TrackedRun, b: TrackedRun, iteration: Iteration, column: str = "score") -> dict[str, Items]:
    """Shares of a's samples that win, tie and lose against b's, by prompt; sample n is compared with sample n.

    Raises:
        Absent: a run has no items with scores.
    """
    sides = []
    for run in (a, b):
        table = item_table(run, iteration)
        if table is None:
            raise Absent(f"run {run.id} has no {item_path(iteration)}")
        sides.append({(name, n): v for name, n, v in _columns(table, ["id", "sample", column], kind="sample")})
    ours, theirs = sides
    if ours.keys() != theirs.keys():
        raise DataError(f"runs {a.id} and {b.id} answered different prompts; a comparison needs the same ones")
    shares: dict[str, dict[str, list[float]]] = {"win": {}, "tie": {}, "lose": {}}
    for (prompt, sample), mine in ours.items():
        other = theirs[prompt, sample]
        for name, hit in (("win", 1), ("tie", 0), ("lose", -1)):
            value = np.nan if mine is None or other is None else float(np.sign(mine - other) == hit)
            shares[name].setdefault(prompt, []).append(value)
    return {name: {prompt: _mean(values) for prompt, values in by.items()} for name, by in shares.items()}


# --- numbers ----------------------------------------------------------------------------------------------------------


def results(cells: Cells, measure: PolicyMeasure, method: str, iteration: Iteration, seeds: Iterable[int]) -> Array:
    """A measure's values under some seeds; NaN if an item has none. Shape S × I.

    Raises:
        Absent: a run does not have the measure.
        DataError: the runs were tested on different items.
    """
    runs = cells.of(method, iteration, seeds)
    items = [measure.items(run, iteration) for run in runs]
    if all(each is not None for each in items):
        return stack([each for each in items if each is not None])
    rows = [run.row(iteration) for run in runs]
    if any(row.get(measure.name) is None for row in rows):
        raise Absent(f"{measure.name} is not tracked at {spell(iteration)} of {method}")
    return np.array([[float(row[measure.name])] for row in rows])


def stack(items: Sequence[Items]) -> Array:
    """The items of several runs as an array, in the order of the first run. Shape S × I.

    Raises:
        DataError: the runs have different items.
    """
    if any(each.keys() != items[0].keys() for each in items):
        raise DataError("the runs were tested on different items and cannot be compared; narrow the selection")
    return np.array([[each[name] for name in items[0]] for each in items])


def estimate(x_SI: Array, of: Kind = "number") -> Estimate:
    """The mean with its 95 % interval, over items and seeds, or only over seeds if there is one item.

    Items that lack a value under some seed are left out. There is no interval over seeds that are all equal.

    Args:
        of: ``share``, between 0 and 1: Wilson's interval; ``amount``, not negative: the t interval of its logarithm;
            ``number``: the t interval.
    """
    x_SI = whole(x_SI)
    if of_seeds := x_SI.shape[1] == 1:
        x_SI = x_SI.T
    mean = estimate_mean(x_SI)
    if mean is None or (of_seeds and not np.ptp(x_SI)):
        return Estimate(float(x_SI.mean()))
    if of == "share":
        return mean.share(x_SI.shape[1])
    return mean.amount() if of == "amount" else mean.estimate()


def clip(difference: Estimate) -> Estimate:
    """A difference of two shares, with its interval cut at −1 and 1."""
    low, high = difference.low, difference.high
    return Estimate(difference.value, None if low is None else max(low, -1.0), None if high is None else min(high, 1.0))


def kind(of: Metric) -> Kind:
    """The kind of a metric's values."""
    return "share" if of.unit == "%" else "number"


def scaled(value: Estimate, scale: float) -> Estimate:
    """An estimate in another unit."""
    low, high = (None if end is None else scale * end for end in (value.low, value.high))
    return Estimate(scale * value.value, low, high)


def whole(x_SI: Array) -> Array:
    """Leave out the items that lack a value under some seed.

    Raises:
        Absent: no item is left.
    """
    whole_SI = x_SI[:, ~np.isnan(x_SI).any(0)]
    if not whole_SI.size:
        raise Absent("no item has a value under every seed")
    return whole_SI


def against(a_SI: Array, b_SI: Array) -> Against | None:
    """Compare two sides on the same items and seeds, paired; None with one item and one seed.

    Raises:
        DataError: the sides differ in shape.
    """
    if a_SI.shape[1] > 1:
        comparison = compare_paired(a_SI, b_SI, interval="t", missing="drop")
        return Against(comparison.difference, comparison.p, comparison.detectable, comparison.notes)
    mean = estimate_mean((a_SI - b_SI).T)
    if mean is None:
        return None
    return Against(mean.estimate(), mean.p(), mean.detectable() if mean.error else None)


def over_iterations(cells: Cells, measure: PolicyMeasure) -> list[dict[str, Any]]:
    """A measure of every method at every iteration, as rows: mean, interval, numbers of seeds and items."""
    return [
        row(cells, measure, method, k)
        for method in cells.methods
        for k in cells.iterations
        if cells.seeds_of((method, k))
    ]


def row(cells: Cells, measure: PolicyMeasure, method: str, iteration: Iteration) -> dict[str, Any]:
    """A measure of one method at one iteration as a row, in the unit of its metric."""
    seeds = cells.seeds_of((method, iteration))
    x_SI = results(cells, measure, method, iteration, seeds)
    value = scaled(estimate(x_SI, kind(measure.metric)), measure.metric.scale)
    head = {"method": method, "iteration": iteration, "measure": measure.label}
    return {**head, **numbers(value), **size(x_SI)}


def over_base(cells: Cells, measures: Sequence[PolicyMeasure], base: str) -> list[dict[str, Any]]:
    """Measures of every method minus the base's at the same iteration, paired by items and seeds, as rows.

    The iterations that all methods share are left out. Each row has p after Holm's correction over all rows, 1 if no
    test is possible.
    """
    rows: list[dict[str, Any]] = []
    others = [method for method in cells.methods if method != base]
    for method, k, measure in itertools.product(others, cells.iterations, measures):
        seeds = cells.seeds_of((method, k), (base, k))
        if k in BEGINNING or not seeds:
            continue
        mine, other = (results(cells, measure, side, k, seeds) for side in (method, base))
        found = against(mine, other)
        value = Estimate(float(np.nanmean(mine - other))) if found is None else found.difference
        value = clip(value) if kind(measure.metric) == "share" else value
        head = {"method": method, "base": base, "iteration": k, "measure": measure.label}
        p = 1.0 if found is None else found.p
        rows.append({**head, **numbers(scaled(value, measure.metric.scale)), **size(mine - other), "p": p})
    return [row | {"p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]


def size(x_SI: Array) -> dict[str, int]:
    """Numbers of seeds, of items, and of items left out because they lack a value under some seed, as columns."""
    items = whole(x_SI).shape[1]
    return {"seeds": len(x_SI), "items": items, "unscored": x_SI.shape[1] - items}


def seed_by_seed(x_SI: Array, seeds: Sequence[int], scale: float) -> dict[str, str]:
    """The mean over items under each seed, as one column: ``0: 1.25, 1: -0.5``. Shape S × I."""
    means = scale * np.nanmean(x_SI, axis=1)
    return {"by_seed": ", ".join(f"{seed}: {mean:.6g}" for seed, mean in zip(seeds, means, strict=True))}


def numbers(value: Estimate, prefix: str = "") -> dict[str, float | None]:
    """An estimate as columns."""
    return {f"{prefix}mean": value.value, f"{prefix}low": value.low, f"{prefix}high": value.high}


# --- what runs have kept ----------------------------------------------------------------------------------------------

_KEPT: dict[tuple[str, str], Any] = {}


def item_path(iteration: Iteration) -> str:
    """The artefact with a run's results for each held-out response."""
    return f"items/{iteration_name(iteration)}.parquet"


def read_once(run: TrackedRun, path: str, read: Callable[[Path], Any]) -> Any:
    """Read an artefact of a run, once; None if the run has none."""
    if (run.id, path) not in _KEPT:
        file = run.artifact(path)
        _KEPT[run.id, path] = None if file is None else read(file)
    return _KEPT[run.id, path]


def item_table(run: TrackedRun, iteration: Iteration) -> pa.Table | None:
    """One row for each held-out response, as a table: Python objects would take a hundred times the memory."""
    return read_once(run, item_path(iteration), pq.read_table)


def _columns(table: pa.Table, names: Sequence[str], **wanted: str) -> list[tuple[Any, ...]]:
    """Some columns of the rows that have the wanted values."""
    for name, value in wanted.items():
        table = table.filter(pc.equal(table[name], value))
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def _read_samples(run: TrackedRun, iteration: Iteration, column: str, wanted: Sequence[int] | None) -> Items | None:
    """By prompt, the samples' mean score, or the share of samples with a wanted outcome against the human response."""
    table = item_table(run, iteration)
    if table is None or column not in table.column_names or table[column].null_count == len(table):
        return None
    human = dict(_columns(table, ["id", column], kind="human"))
    scores: dict[str, list[float]] = {}
    for name, value in _columns(table, ["id", column], kind="sample"):
        other = human.get(name)
        if wanted is not None and value is not None:
            value = None if other is None else float(np.sign(value - other) in wanted)
        scores.setdefault(name, []).append(np.nan if value is None else value)
    return {name: _mean(values) for name, values in scores.items()}


def _family(family: str) -> Callable[[TrackedRun, Iteration], Items | None]:
    def items(run: TrackedRun, iteration: Iteration) -> Items | None:
        table = item_table(run, iteration)
        if table is None:
            return None
        answers = dict(_columns(table, ["id", "right"], kind="greedy", family=family))
        return None if None in answers.values() else {name: float(right) for name, right in answers.items()}

    return items


def _benchmark(name: str) -> Callable[[TrackedRun, Iteration], Items | None]:
    def items(run: TrackedRun, iteration: Iteration) -> Items | None:
        table = read_once(run, f"leaderboard/{iteration_name(iteration)}.parquet", pq.read_table)
        if table is None:
            return None
        mine = _columns(table, ["task", "id", "score"], benchmark=name)
        sizes = Counter(task for task, _, _ in mine)
        # The benchmark's score is the mean of its tasks' means, unless its items are pooled.
        pooled = BENCHMARKS[name].pooled
        weight = {task: 1.0 if pooled else len(mine) / (len(sizes) * size) for task, size in sizes.items()}
        return {f"{task}/{item}": value * weight[task] for task, item, value in mine}

    return items


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if none is left."""
    finite = [value for value in values if not np.isnan(value)]
    return float(np.mean(finite)) if finite else float("nan")
