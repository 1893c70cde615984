"""Figure 7: DNPO's responses against SPIN's to the same prompts, iteration by iteration."""

import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from analysis import published
from analysis.command import alone
from analysis.drawing import COLUMN, canvas, finish, foot, outcomes, plus_minus, write_beside_bars
from analysis.keeping import DrawnFigure
from analysis.results import against, duel, estimate, numbers, scaled, size, stack
from analysis.selection import BEGINNING, DNPO, SPIN, Absent, Cells, Runs, spell
from analysis.watched import warn
from dnpo.stats.significance import holm

TITLE = "DNPO against SPIN: win, tie, lose"
SWEEP = "main"


def table(cells: Cells, column: str = "score") -> list[dict[str, Any]]:
    """A row for each iteration: shares in percent, wins − losses, and p after Holm's correction over iterations."""
    cells.needs(DNPO, SPIN)
    rows = []
    for k in cells.iterations:
        seeds = cells.seeds_of((DNPO, k), (SPIN, k))
        if k in BEGINNING or not seeds:
            continue
        pairs = zip(cells.of(DNPO, k, seeds), cells.of(SPIN, k, seeds), strict=True)
        duels = [duel(ours, theirs, k, column) for ours, theirs in pairs]
        won, tied, lost = (stack([found[name] for found in duels]) for name in ("win", "tie", "lose"))
        row: dict[str, Any] = {"iteration": k, **size(won)}
        for name, x_SI in (("win", won), ("tie", tied), ("lose", lost)):
            row |= numbers(scaled(estimate(x_SI, "share"), 100), f"{name}_")
        found = against(won, lost)
        row |= numbers(scaled(found.difference, 100), "win_less_lose_") if found else {}
        rows.append(row | {"p": found.p if found else 1.0})
    if not rows:
        raise Absent("no iteration after 0 has both DNPO and SPIN with the same seed")
    return [row | {"p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]


def draw(axis: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw a bar for each iteration, with wins − losses next to it, starred if significant."""
    outcomes(axis, rows, [spell(row["iteration"]) for row in rows])
    texts = [plus_minus(row, "win_less_lose_") + "*" * (row["p_holm"] <= 0.05) for row in rows]
    write_beside_bars(axis, "win − lose", texts)
    axis.set_ylabel("policy after")


def make(runs: Runs) -> DrawnFigure:
    """Select, compare, draw."""
    cells = runs.chains().only([DNPO, SPIN])
    rows = table(cells)
    figure, (axis,) = canvas(COLUMN, 1.7 + 0.27 * len(rows))
    draw(axis, rows)
    more = ["win: DNPO's sampled answer to a held-out prompt scores higher than SPIN's with the same seed"]
    if published.comparable(cells.used):
        more += [
            f"the paper, k={k}: DNPO wins {100 * a:.2f} %, SPIN {100 * b:.2f} %" for k, (a, b) in published.DUEL.items()
        ]
    gains = [
        {"method": DNPO, "base": SPIN, "iteration": row["iteration"], "low": row.get("win_less_lose_low")}
        for row in rows
    ]
    line = foot(
        cells,
        rows,
        "Whiskers: 95 % Wilson intervals; ±: paired 95 % t intervals; *: p ≤ 0.05 after Holm's correction",
        *more,
        *warn(cells, gains),
    )
    return DrawnFigure(finish(figure, TITLE, line, axis), rows, cells.used)


if __name__ == "__main__":
    sys.exit(alone("fig07_dnpo_vs_spin"))
