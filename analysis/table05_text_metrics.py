"""Table 5: similarity of generated texts to the positive samples of training, by BLEU, Sentence-BERT and ROUGE-L."""

import sys

import numpy as np

from analysis.command import alone
from analysis.comparing import describe_cells, detectable
from analysis.keeping import DrawnTable
from analysis.published import TEXTS
from analysis.results import Against, against, estimate, results, text_measure
from analysis.selection import BEGINNING, SPIN, Absent, Cells, Runs, spell
from dnpo.stats.intervals import Estimate
from dnpo.stats.table import Cell, table
from dnpo.wording import sentence

TITLE = "Generated texts compared with the positive samples they were trained on"
SWEEP = "main"
MEASURES = ("bleu", "sbert", "rouge_l")
PAPER = "paper (7B): mean of k=1..3"


def make(runs: Runs) -> DrawnTable:
    """Select, average over the iterations after 0, compare with SPIN, tabulate."""
    cells = runs.chains(matters=["eval.texts"])
    tracked = [name for name in MEASURES if _has(cells, name)]
    if not tracked:
        raise Absent("no measure of texts is tracked (eval=texts): none of texts/bleu, texts/sbert and texts/rouge_l")
    rows: dict[str, dict[str, Cell]] = {}
    compared: list[Against] = []
    for name in tracked:
        for method in cells.methods:
            row, comparison = _row(cells, name, method)
            rows[f"{text_measure(name).label}, {method}"] = row
            compared += [comparison] if comparison else []
    shown = text_measure(tracked[0]).metric
    notes = [
        "Shares, 0 to 1; intervals over seeds, since prompts and BLEU's corpus differ between them. Stars: against "
        "SPIN. Similarity to the positive samples is not quality.",
        f"{PAPER}: arXiv 2502.05400, table 5.",
        *([] if "sbert" in tracked else ["Sentence-BERT is not tracked (eval.texts.encoder)."]),
        detectable(compared, shown.scale, "", shown.digits),
        describe_cells(cells, set()),
        *map(sentence, cells.notes),
    ]
    return DrawnTable(table(rows, shown.digits, shown.scale), TITLE, "measure, method", notes, cells.used)


def _has(cells: Cells, name: str) -> bool:
    return all(
        run.row(k).get(f"texts/{name}") is not None for (_, k, _), run in cells.runs.items() if k not in BEGINNING
    )


def _row(cells: Cells, name: str, method: str) -> tuple[dict[str, Cell], Against | None]:
    measure = text_measure(name)
    row = {}
    for k in cells.iterations:
        seeds = cells.seeds_of((method, k))
        if seeds and all(cells.runs[method, k, s].row(k).get(measure.name) is not None for s in seeds):
            row[spell(k)] = Cell(estimate(results(cells, measure, method, k, seeds)))
    ks = [k for k in cells.iterations if k not in BEGINNING]
    sides = [(side, k) for side in {method, SPIN} & set(cells.methods) for k in ks]
    seeds, comparison = cells.seeds_of(*sides), None
    if ks and seeds:
        mine, base = (
            np.mean([results(cells, measure, side, k, seeds) for k in ks], axis=0) if side in cells.methods else None
            for side in (method, SPIN)
        )
        if mine is not None:
            comparison = against(mine, base) if method != SPIN and base is not None else None
            row[_mean(ks)] = Cell(estimate(mine), comparison.p if comparison else None)
    paper = TEXTS.get((name, method))
    return row | ({PAPER: Cell(Estimate(paper[-1]))} if paper else {}), comparison


def _mean(ks: list[int | str]) -> str:
    return f"mean of k={ks[0]}..{ks[-1]}" if len(ks) > 1 else f"k={ks[0]} alone"


if __name__ == "__main__":
    sys.exit(alone("table05_text_metrics"))
