"""Compare groups of runs: means with intervals, and differences from a baseline, paired over items and seeds."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dnpo.catalogue import COMPARED, Metric, metric
from dnpo.report.groups import Group, Groups, Member, iteration_title
from dnpo.stats.intervals import Array, Estimate, estimate_mean
from dnpo.stats.paired import compare_paired
from dnpo.stats.prompts import by_prompt, change, loss_by_prompt
from dnpo.stats.prompts import mean as estimate
from dnpo.stats.table import Cell, Table, table
from dnpo.tracking.reading import TrackedRun, iteration_name
from dnpo.wording import sentence


@dataclass(frozen=True)
class ReportMeasure:
    """A metric by which runs are compared.

    Attributes:
        kind, column: the items whose mean the metric is, and the column with their values; "" if it has no items.
    """

    metric: Metric
    kind: str = ""
    column: str = ""


ITEMS = {
    "eval/score": ("sample", "score"),
    "second/score": ("sample", "second"),
    "eval/accuracy": ("greedy", "right"),
    "eval/loss": ("human", "logprob"),
}
MEASURES = tuple(ReportMeasure(metric(name), *ITEMS.get(name, ())) for name in COMPARED)
DISTANCES = tuple(ReportMeasure(metric(name)) for name in ("drift/kl", "drift/initial"))  # what the gains cost
FLIPS = ReportMeasure(metric("pairs/flips"))


@dataclass
class Items:
    """Results by held-out prompt; each file is read once, and each mean is computed once."""

    _kept: dict[tuple[str, str], pa.Table | None] = field(default_factory=dict)
    _means: dict[tuple[str, int | str, str], dict[str, float]] = field(default_factory=dict)

    def table(self, run: TrackedRun, iteration: int | str) -> pa.Table | None:
        """Return the rows of one policy; None if none were tracked."""
        path = f"items/{iteration_name(iteration)}.parquet"
        if (run.id, path) not in self._kept:
            file: Path | None = run.artifact(path)
            self._kept[run.id, path] = None if file is None else pq.ParquetFile(file).read(use_threads=False)
        return self._kept[run.id, path]

    def of(self, run: TrackedRun, iteration: int | str, measure: ReportMeasure) -> dict[str, float]:
        """Return each prompt's mean over its responses: NaN without a value. Empty if the measure has no items."""
        key = (run.id, iteration, measure.metric.name)
        if key not in self._means:
            rows = self.table(run, iteration) if measure.kind else None
            self._means[key] = _by_prompt(rows, measure) if rows is not None else {}
        return self._means[key]


def _by_prompt(rows: pa.Table, measure: ReportMeasure) -> dict[str, float]:
    if measure.column not in rows.column_names:
        return {}
    return loss_by_prompt(rows) if measure.kind == "human" else by_prompt(rows, measure.kind, measure.column)


@dataclass(frozen=True)
class MeasureComparison:
    """A measure over groups and iterations.

    Attributes:
        means: table of groups by iterations.
        differences: each group's difference from ``baseline``; None if there is no baseline.
        notes: remarks that a reader of the numbers needs.
    """

    measure: ReportMeasure
    means: Table
    differences: Table | None
    baseline: str
    notes: tuple[str, ...]


def baseline(groups: Groups) -> Group | None:
    """Return SPIN if there is one, else the first group; None if there is only one group."""
    if len(groups.groups) < 2:
        return None
    return next((group for group in groups.groups if group.is_spin), groups.groups[0])


def compare(groups: Groups, measure: ReportMeasure, items: Items) -> MeasureComparison | None:
    """Compare the groups by a measure; None if no run has it."""
    iterations = [
        iteration
        for iteration in groups.iterations
        if any(group.values(iteration, measure.metric.name) for group in groups.groups)
    ]
    if not iterations:
        return None
    base = baseline(groups)
    means: dict[str, dict[str, Cell]] = {}
    apart: dict[str, dict[str, Cell]] = {}
    notes: dict[str, None] = {}
    for group in groups.groups:
        for iteration in iterations:
            mean = mean_of(group, iteration, measure, items)
            if mean is None:
                continue
            means.setdefault(group.label, {})[iteration_title(iteration)] = Cell(mean)
            if base is None or group is base:
                continue
            cell, remarks = _difference(group, base, iteration, measure, items)
            notes |= dict.fromkeys(remarks)
            if cell is not None:
                apart.setdefault(group.label, {})[iteration_title(iteration)] = cell
    return MeasureComparison(
        measure,
        table(means, measure.metric.digits, measure.metric.scale),
        table(apart, measure.metric.digits, measure.metric.scale) if apart else None,
        base.label if base else "",
        tuple(notes),
    )


def mean_of(group: Group, iteration: int | str, measure: ReportMeasure, items: Items) -> Estimate | None:
    """Return a group's mean after one iteration, over items and seeds, or over seeds alone if there are no items."""
    seeds = sorted(group.at(iteration))
    share = measure.metric.unit == "%"
    by_item = matrix(group, iteration, seeds, measure, items)
    if by_item is not None:
        return estimate(by_item, share)
    values = group.values(iteration, measure.metric.name)
    if not values:
        return None
    return estimate(np.asarray([values]), share) if np.ptp(values) else Estimate(values[0])


def matrix(group: Group, iteration: int | str, seeds: list[int], measure: ReportMeasure, items: Items) -> Array | None:
    """Return the results as seeds × items; None if a run has no items, or other items than the first run."""
    results = [items.of(group.at(iteration)[seed].run, iteration, measure) for seed in seeds]
    if not results or not all(results) or any(each.keys() != results[0].keys() for each in results):
        return None
    ids = list(results[0])
    x_SI: Array = np.asarray([[each[key] for key in ids] for each in results], float)
    return x_SI


def _difference(
    group: Group, base: Group, iteration: int | str, measure: ReportMeasure, items: Items
) -> tuple[Cell | None, list[str]]:
    """Return a group's difference from the baseline after one iteration, over the seeds that both have, and remarks."""
    ours, theirs = group.at(iteration), base.at(iteration)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or not group.values(iteration, measure.metric.name) or not base.values(iteration, measure.metric.name):
        return None, []
    notes = []
    if ours.keys() != theirs.keys():
        notes.append(f"{group.label} and {base.label} are compared over the seeds that both have.")
    if all(_policy(ours[seed].run, iteration) == _policy(theirs[seed].run, iteration) != "" for seed in seeds):
        return None, notes  # the policies are identical
    a, b = (matrix(side, iteration, seeds, measure, items) for side in (group, base))
    if a is not None and b is not None and a.shape == b.shape and a.shape[1] > 1:
        kind: Literal["right", "scores"] = "right" if measure.column == "right" else "scores"
        comparison = compare_paired(a, b, kind=kind, interval="t", missing="drop")
        return Cell(comparison.difference, comparison.p, signed=True), [
            *notes,
            *map(sentence, comparison.notes),
        ]
    pairs = [
        (ours[seed].value(iteration, measure.metric.name), theirs[seed].value(iteration, measure.metric.name))
        for seed in seeds
    ]
    apart = np.asarray([[x - y for x, y in pairs if x is not None and y is not None]])
    if not apart.size:
        return None, notes
    if measure.kind:
        notes.append("Some runs have no results by held-out prompt, so intervals are over seeds alone.")
    mean = estimate_mean(apart)
    if mean is None:
        return Cell(Estimate(float(apart[0, 0])), signed=True), [*notes, "One seed and no items: there is no interval."]
    return Cell(mean.estimate(), mean.p(), signed=True), notes


def _policy(run: TrackedRun, iteration: int | str) -> str:
    """Return the stage that made the policy after an iteration; "" if the summary does not name it."""
    iterations = [row["iteration"] for row in run.table]
    policies: list[str] = run.summary.get("policies", [])
    return policies[iterations.index(iteration)] if iteration in iterations and len(policies) == len(iterations) else ""


def gain(member: Member, measure: ReportMeasure, items: Items) -> tuple[Estimate, str] | None:
    """Return the last policy's mean minus the first's, and what the interval covers; None if one is missing."""
    values = member.values_by_iteration(measure.metric.name)
    if len(values) < 2:
        return None
    (first, before), (last, after) = values[0], values[-1]
    comparison = change(items.of(member.run, last, measure), items.of(member.run, first, measure))
    if comparison is not None:
        return comparison.difference, f"over {comparison.items} held-out prompts"
    return Estimate(after - before), ""
