"""Results and costs of methods: the numbers of table 2 and figure 14.

Totals are over the iterations of a run, without the fine-tuning that all runs share and without measuring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.results import Array, Kind, PolicyMeasure, average, benchmarks, kind, results, score
from analysis.selection import Cells, Iteration
from dnpo.catalogue import Metric, metric
from dnpo.tracking.reading import SFT, TrackedRun

MEASURING = ("evaluate", "drift", "initial", "second", "texts", "leaderboard", "measure")  # stages


@dataclass(frozen=True)
class Cost:
    """A total cost of a run."""

    metric: Metric
    of: Callable[[TrackedRun], float]

    def __call__(self, cells: Cells, method: str, seeds: Sequence[int] | None = None) -> Array:
        """The cost under each of the method's seeds, or under some of them. Shape S × 1."""
        return np.array([[self.of(run)] for run in cells.at_end(method, seeds)])


def add_up(name: str) -> Cost:
    """The sum of a count over iterations; an iteration without it counts 0, since nothing was generated or judged."""

    def total(run: TrackedRun) -> float:
        return float(sum(row.get(name) or 0 for row in run.table if row["iteration"] != SFT))

    return Cost(metric(name), total)


def _work(run: TrackedRun) -> float:
    stages = run.summary["stages"]
    spent = {each["key"]: each["seconds"] for each in stages if each["iteration"] != SFT}
    measured = {each["key"] for each in stages if each["stage"] in MEASURING}
    return float(sum(seconds for key, seconds in spent.items() if key not in measured))


SECONDS = Cost(replace(metric("seconds"), title="Time without measuring", digits=0), _work)
GENERATED, VERDICTS = add_up("generated/tokens"), add_up("judge/verdicts")
TOKENS, FLOP = add_up("trained/tokens"), add_up("trained/flop")
COSTS = (GENERATED, TOKENS, VERDICTS, SECONDS)
KL = PolicyMeasure(metric("drift/initial"))
LENGTH = PolicyMeasure(metric("eval/tokens"))
BEGINNING = "fine-tuned"  # label of the policy that all methods begin with


def quality(cells: Cells) -> tuple[PolicyMeasure, PolicyMeasure]:
    """The judge's score, and the average of the benchmarks."""
    return score(), average(benchmarks(cells))


def kind_of(of: PolicyMeasure | Cost) -> Kind:
    """The kind of a measure's values; costs, distances and lengths are amounts."""
    return "amount" if of in (KL, LENGTH) or isinstance(of, Cost) else kind(of.metric)


def training(cells: Cells) -> Cost:
    """The cost of training: FLOP, or tokens if some run is of an earlier version, which did not track FLOP."""
    rows = [row for run in cells.used for row in run.table if row.get(TOKENS.metric.name)]
    return FLOP if all(row.get(FLOP.metric.name) for row in rows) else TOKENS


def beginning(cells: Cells) -> Cells:
    """The policy that all methods begin with, from the first run of each seed."""
    return replace(cells, runs={(BEGINNING, SFT, run.seed): run for run in reversed(cells.used)})


def end(cells: Cells, method: str) -> Iteration:
    """The last iteration of a method."""
    return max((k for each, k, _ in cells.runs if each == method), key=lambda k: -1 if k == SFT else int(k))


def reached(cells: Cells, measure: PolicyMeasure, method: str, seeds: Sequence[int] | None = None) -> Array:
    """A measure of a method's last policies, under each of its seeds or under some of them. Shape S × I."""
    k = end(cells, method)
    return results(cells, measure, method, k, cells.seeds_of((method, k)) if seeds is None else seeds)
