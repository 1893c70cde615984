"""Rows and notes shared by the tables of benchmarks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.costs import KL
from analysis.published import COLUMN
from analysis.results import (
    Against,
    Array,
    PolicyMeasure,
    against,
    average,
    benchmarks,
    estimate,
    is_leaderboard,
    kind,
    whole,
)
from analysis.results import results as results_of
from analysis.selection import Cells, Iteration, commits, describe, spell
from analysis.watched import LOSS, MARK, comes_worse, explain, level, tracked
from dnpo.stats.intervals import Estimate
from dnpo.stats.table import Cell, Table, table
from dnpo.tracking.reading import SFT
from dnpo.wording import plural, sentence

IN_WORDS = {
    True: "Benchmarks: the Open LLM Leaderboard's six, %.",
    False: "Benchmarks: the families of the tiny world, share of greedy answers that are right, %.",
}


@dataclass
class Comparisons:
    """The rows of a table, and the comparisons behind its stars.

    Attributes:
        measures: benchmarks and, last, their average.
        beside: what is shown in addition to them.
    """

    cells: Cells
    measures: Sequence[PolicyMeasure]
    beside: Sequence[PolicyMeasure]
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)
    differences: list[Against] = field(default_factory=list)
    items: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, cells: Cells) -> "Comparisons":
        """Begin a table of the benchmarks that all cells have, and of their average."""
        those = benchmarks(cells)
        return cls(cells, [*those, average(those)], tracked(cells))

    def add(self, label: str, method: str, iterations: Sequence[Iteration], base: str, paper: float | None) -> None:
        """Add a row for a method at one iteration, or averaged over several, compared with the base."""
        alone = self.cells.seeds_of(*((method, k) for k in iterations))
        shared = self.cells.seeds_of(*((side, k) for side in (method, base) for k in iterations))
        compared = method != base and bool(shared)
        seeds = shared if compared else alone
        row = self.rows.setdefault(label, {})
        found = None
        for measure in self.measures if seeds else ():
            mine = self._mean(measure, method, iterations, seeds)
            found = self._compare(mine, self._mean(measure, base, iterations, seeds)) if compared else None
            row[measure.label] = Cell(estimate(mine, kind(measure.metric)), found.p if found else None, sides=True)
            self.items.add(whole(mine).shape[1])
        for measure in self._beside(iterations) if seeds else ():
            mine = self._mean(measure, method, iterations, seeds)
            apart = against(mine, self._mean(measure, base, iterations, seeds)) if compared else None
            worse = measure is LOSS and comes_worse(found, apart)
            row[measure.label] = level(measure, mine, worse=worse)
        if paper is not None:
            row[COLUMN] = Cell(Estimate(paper))

    def difference(self, label: str, a: str, b: str, iteration: Iteration, paper: float | None) -> None:
        """Add a row of differences, a − b."""
        seeds = self.cells.seeds_of((a, iteration), (b, iteration))
        row = self.rows.setdefault(label, {})
        found = None
        for measure in self.measures if seeds else ():
            sides = [self._mean(measure, side, [iteration], seeds) for side in (a, b)]
            found = self._compare(*sides)
            row[measure.label] = Cell(_difference(found, *sides), found.p if found else None, signed=True)
        for measure in self._beside([iteration]) if seeds else ():
            sides = [self._mean(measure, side, [iteration], seeds) for side in (a, b)]
            apart = against(*sides)
            mark = MARK * (measure is LOSS and comes_worse(found, apart))
            row[measure.label] = Cell(_difference(apart, *sides), signed=True, mark=mark)
        if paper is not None:
            row[COLUMN] = Cell(Estimate(paper), signed=True)

    def table(self) -> Table:
        """All rows, in the unit of the benchmarks."""
        average, aside = self.measures[-1].metric, {each.label: each.metric for each in self.beside}
        columns = dict.fromkeys(column for row in self.rows.values() for column in row)
        digits = {column: aside.get(column, average).digits for column in columns}
        scale = {column: aside.get(column, average).scale for column in columns}
        return table(self.rows, digits, scale, aside)

    def notes(self, *more: str) -> list[str]:
        """The notes below the table."""
        return [
            *more,
            IN_WORDS[is_leaderboard(self.measures)],
            *explain(self.beside, self.rows, "the average is better than the other side's"),
            detectable(self.differences),
            *collect_notes(self.differences),
            describe_cells(self.cells, self.items),
            *map(sentence, self.cells.notes),
        ]

    def _mean(
        self, measure: PolicyMeasure, method: str, iterations: Sequence[Iteration], seeds: Sequence[int]
    ) -> Array:
        mean: Array = np.mean([results_of(self.cells, measure, method, k, seeds) for k in iterations], axis=0)
        return mean

    def _beside(self, iterations: Sequence[Iteration]) -> list[PolicyMeasure]:
        """What is shown in addition to the results of these iterations; the initial policy has no KL to itself."""
        return [each for each in self.beside if each is not KL or SFT not in iterations]

    def _compare(self, mine: Array, other: Array) -> Against | None:
        comparison = against(mine, other)
        self.differences += [comparison] if comparison else []
        return comparison


def _difference(found: Against | None, a_SI: Array, b_SI: Array) -> Estimate:
    return Estimate(float(np.nanmean(a_SI - b_SI))) if found is None else found.difference


def detectable(comparisons: Sequence[Against], scale: float = 100.0, unit: str = " points", digits: int = 1) -> str:
    """The minimum detectable differences of a table's comparisons, in a sentence."""
    known = [scale * each.detectable for each in comparisons if each.detectable is not None]
    if not known:
        return "Minimum detectable difference: unknown, since the results do not vary."
    median, least, most = (f"{value:.{digits}f}" for value in (np.median(known), min(known), max(known)))
    return (
        "Minimum detectable difference (found in 80 % of such comparisons at α = 0.05, before the correction): median "
        f"{median}{unit}, from {least} to {most} over {plural(len(known), 'comparison')}."
    )


def collect_notes(comparisons: Sequence[Against]) -> list[str]:
    """The notes of the comparisons, each once; :func:`describe_cells` has the note on a single seed."""
    counts = Counter(note for each in comparisons for note in each.notes if not note.startswith("one seed"))
    return [
        sentence(f"{note} ({number} of {plural(len(comparisons), 'comparison')})") for note, number in counts.items()
    ]


def describe_cells(cells: Cells, items: set[int]) -> str:
    """Seeds, items, data, judge, runs and commit, in a sentence."""
    seeds = cells.seeds
    shown = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    if len(seeds) == 1:
        shown = f"One seed ({seeds[0]}): intervals are over items only, without the variation between trainings"
    counts = sorted(items - {1})
    over = f", {counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} items" if counts else ""
    shared = {name: ", ".join(sorted({str(describe(run)[name]) for run in cells.used})) for name in ("data", "judge")}
    runs = plural(len(cells.used), "run")
    return f"{shown}{over}; data {shared['data']}, judge {shared['judge']}; {runs}, commit {commits(cells.used)}."


def label(method: str, iteration: Iteration) -> str:
    """The label of a row."""
    return f"{method}, {spell(iteration)}"


def last(paper: Mapping[tuple[str, Iteration], Sequence[float]], method: str, iteration: Iteration) -> float | None:
    """The average in the paper; None if there is none."""
    row = paper.get((method, iteration))
    return None if row is None else row[-1]
