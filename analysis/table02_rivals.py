"""Table 2: results and costs of each method, with the claims of its source and whether they hold here.

The claims are in ``claims_methods.yaml``. For some methods the table also has the DNPO paper's numbers.
"""

import sys
from collections.abc import Iterator, Sequence

from analysis.claims_assess import Result, Tracked, assess
from analysis.claims_book import FILE, Book, read
from analysis.claims_registered import Registration, describe, split
from analysis.claims_rules import Outcome, rule
from analysis.claims_tables import format_effect
from analysis.command import alone
from analysis.comparing import collect_notes, describe_cells, detectable
from analysis.costs import BEGINNING, COSTS, KL, LENGTH, beginning, end, kind_of, quality, reached
from analysis.keeping import DrawnTable
from analysis.published import COLUMN, RIVALS
from analysis.results import Against, PolicyMeasure, against, estimate, results, whole
from analysis.selection import DNPO, Cells, Runs
from analysis.watched import LOSS, comes_worse, explain, level, tracked
from dnpo.stats.intervals import Estimate
from dnpo.stats.table import Cell, Table, table, with_words
from dnpo.wording import sentence

TITLE = "Results and costs of the methods"
SWEEP = "methods"
BASE = "spin"  # the method that others are compared with
CLAIMS = FILE.with_name("claims_methods.yaml")
HERE: dict[Outcome, str] = {
    "supported": "holds",
    "contradicted": "does not hold",
    "negligible": "negligible",
    "undecided": "undecided",
    "not measured": "not measured",
    "as expected": "as expected",
    "not as expected": "not as expected",
}
PRINTED = {"dnpo": RIVALS[DNPO][-1], "alpha_spin": RIVALS["α-SPIN"][-1], "ppo": RIVALS["PPO"][-1]}


def make(runs: Runs) -> DrawnTable:
    """Select, compare the last policies with SPIN's, add up the costs, tabulate."""
    cells = runs.rivals()
    beside = [each for each in (LOSS, KL) if each is KL or each in tracked(cells)]
    measures = (*quality(cells), LENGTH, *beside)
    rows: dict[str, dict[str, Cell]] = {}
    differences: dict[str, list[Against]] = {measure.label: [] for measure in measures[:2]}
    items: set[int] = set()
    first = beginning(cells)
    for measure in measures:
        value = Estimate(0.0) if measure is KL else estimate(reached(first, measure, BEGINNING), kind_of(measure))
        rows.setdefault(BEGINNING, {})[measure.label] = Cell(value, sides=True)
    for method in cells.methods:
        row = rows.setdefault(method, {})
        compared = {measure.label: list(_compare(cells, measure, method)) for measure in measures}
        for measure in measures:
            x_SI, found = reached(cells, measure, method), compared[measure.label]
            items.add(whole(x_SI).shape[1])
            if measure.label in differences:
                differences[measure.label] += found
                row[measure.label] = Cell(estimate(x_SI, kind_of(measure)), found[0].p if found else None, sides=True)
            else:
                gains = [gain for label in differences for gain in compared[label]]
                worse = measure is LOSS and any(comes_worse(gain, loss) for gain in gains for loss in found)
                row[measure.label] = level(measure, x_SI, worse=worse)
        for cost in COSTS:
            row[cost.metric.label] = Cell(estimate(cost(cells, method), "amount"), sides=True)
        if method in PRINTED:
            row[COLUMN] = Cell(Estimate(PRINTED[method]))
    if "ppo" not in cells.methods:
        rows["PPO (not run here)"] = {COLUMN: Cell(Estimate(PRINTED["ppo"]))}
    shown = [*(each.metric for each in measures), *(each.metric for each in COSTS)]
    columns = [*(each.label for each in measures), *(each.metric.label for each in COSTS)]
    digits = dict(zip(columns, (each.digits for each in shown), strict=True)) | {COLUMN: 1}
    scale = dict(zip(columns, (each.scale for each in shown), strict=True)) | {COLUMN: 100.0}
    notes = [
        f"Stars: against {BASE}. {', '.join(columns[: len(measures)])}: of the last policy of each run. The rest: "
        "totals over its iterations, without fine-tuning, which all share, and without measuring. Seconds are those of "
        "the machine that computed a stage, which may have been busy.",
        f"{columns[0]}: the judge's, points of 100. {columns[1]}: right greedy answers, %, mean over benchmarks.",
        *explain(beside, rows, f"score or accuracy is better than that of {BASE}"),
        f"{COLUMN}: arXiv 2502.05400, table 2, which names no iteration; DNPO's six numbers average 59.8.",
        *(
            f"{label}. {detectable(found, measure.metric.scale)}"
            for (label, found), measure in zip(differences.items(), measures, strict=False)
        ),
        *collect_notes([each for found in differences.values() for each in found]),
        describe_cells(cells, items),
        *map(sentence, cells.notes),
    ]
    objections = split(Registration.of(CLAIMS), cells.used)[1]
    claims = assess(book := read(CLAIMS), _track(book, cells), bool(objections))
    notes.append(f"Claims: {rule([claim.role for claim in book.claims])}")
    if objections:
        notes.append(f"The outcomes of the claims are exploratory: {describe(objections)}.")
    aside = [each.label for each in beside]
    return DrawnTable(_add_claims(table(rows, digits, scale, aside), claims), TITLE, "method", notes, cells.used)


def _track(book: Book, cells: Cells) -> Tracked:
    """The selected runs, in the form that claims read."""
    (sweep,) = book.sweeps
    runs = sorted(cells.used, key=lambda run: -run.started)
    return Tracked(book.arms, {sweep: runs}, {sweep: 0})


def _add_claims(numbers: Table, found: Sequence[Result]) -> Table:
    """Add the claims of each method's source, and whether they hold."""
    words: dict[str, dict[str, list[str]]] = {"claim": {}, "here": {}}
    for result in found:
        claim = result.claim
        method = claim.sides[0][0].arm
        effect = "" if result.effect is None else f": {claim.a} − {claim.b} {format_effect(result)}"
        caveat = f"; {claim.caveat}" if claim.caveat else ""
        words["claim"].setdefault(method, []).append(f"{claim.text} ({claim.paper}, {claim.where}{caveat})")
        words["here"].setdefault(method, []).append(f"{HERE[result.outcome]}{effect}")
    joined = {name: {row: "; ".join(each) for row, each in by.items()} for name, by in words.items()}
    return with_words(numbers, joined)


def _compare(cells: Cells, measure: PolicyMeasure, method: str) -> Iterator[Against]:
    """The comparison with the base on common seeds, if there is one."""
    if method == BASE or BASE not in cells.methods:
        return
    sides = [(method, end(cells, method)), (BASE, end(cells, BASE))]
    if seeds := cells.seeds_of(*sides):
        found = against(*(results(cells, measure, name, k, seeds) for name, k in sides))
        if found is not None:
            yield found


if __name__ == "__main__":
    sys.exit(alone("table02_rivals"))
