"""Tables of comparisons: mean ± half interval, with a star if the test is significant after Holm's correction."""

import csv
import io
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dnpo.escape import for_csv, for_latex, for_markdown
from dnpo.stats.intervals import LEVEL, Estimate
from dnpo.stats.significance import holm
from dnpo.wording import fixed, visible

ALPHA = 0.05
LONGEST_HEADING = 14  # letters in a line of LaTeX
GAP = r"@{\qquad\quad}"  # of LaTeX, before columns that are set off
UNEVEN = 0.1  # of an interval's width: sides that differ by more are shown separately, if asked for


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    For a comparison c, ``Cell(c.a, c.p)`` shows side a, starred if it differs from b; ``Cell(c.difference, c.p,
    signed=True)`` shows the difference; ``Cell(c.b)``, without a p, shows side b.
    """

    estimate: Estimate
    p: float | None = None
    signed: bool = False
    sides: bool = False  # show how far the interval reaches below and above, if the distances clearly differ
    mark: str = ""  # shown after the number, such as †, which a note below the table explains


@dataclass(frozen=True)
class Shown:
    """A formatted cell, with its p after the correction."""

    cell: Cell
    adjusted: float | None
    star: bool
    number: str
    half: str
    sides: tuple[str, str] | None = None

    @property
    def text(self) -> str:
        """Mean ± half of the interval, or with both sides of it; with star and mark if there are any."""
        reach = f" ± {self.half}" if self.half else ""
        if self.sides:
            reach = f" −{self.sides[0]} +{self.sides[1]}"
        return self.number + reach + "*" * self.star + self.cell.mark


@dataclass(frozen=True)
class Row:
    """A row of a table. A missing cell is None; ``words`` are the cells in the columns of words."""

    label: str
    shown: tuple[Shown | None, ...]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table with formatted cells; all writers read it, so their outputs agree.

    Attributes:
        tests: number of tests of Holm's correction.
        beside: the last columns of numbers that are set off from the others.
        words: headings of the columns of words, which follow the columns of numbers.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    tests: int
    beside: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def caption(self) -> str:
        """The meaning of ± and *."""
        shows = f"Mean ± half of the {100 * LEVEL:.0f} % interval."
        if any(shown and shown.sides for row in self.rows for shown in row.shown):
            shows += " Where one side of the interval is longer, − and + are the distances to its ends."
        if not self.tests:
            return shows
        over = f" after Holm's correction over {self.tests} tests" if self.tests > 1 else ", one test"
        return f"{shows} *: p ≤ {ALPHA}{over}."


def table(
    cells: Mapping[str, Mapping[str, Cell]],
    digits: int | Mapping[str, int] = 1,
    scale: float | Mapping[str, float] = 1.0,
    beside: Collection[str] = (),
) -> Table:
    """Build a table, with Holm's correction over all cells that have a p. Rows and columns keep their order.

    A comparison in two cells, as a side and as a difference, would count twice in the correction: give a p to one cell
    only.

    Args:
        cells: cells by row and column.
        digits: number of decimals, one for all columns or one for each; a cell has up to two more if half of its
            interval would be shown as 0 otherwise.
        scale: factor for the numbers shown, likewise one or one for each column; 100 shows shares in percent.
        beside: columns to move to the end and set off.

    Raises:
        DataError: a p is not a probability.
    """
    named = dict.fromkeys(column for row in cells.values() for column in row)
    aside = tuple(column for column in named if column in beside)
    columns = (*(column for column in named if column not in beside), *aside)
    digits_of = dict.fromkeys(columns, digits) if isinstance(digits, int) else digits
    scale_of = scale if isinstance(scale, Mapping) else dict.fromkeys(columns, scale)
    tested = [(row, column) for row in cells for column, cell in cells[row].items() if cell.p is not None]
    ps = [p for row, column in tested if (p := cells[row][column].p) is not None]
    adjusted = dict(zip(tested, holm(ps), strict=True))
    rows = []
    for label, row in cells.items():
        shown = [
            _format_cell(row[column], adjusted.get((label, column)), digits_of[column], scale_of[column])
            if column in row
            else None
            for column in columns
        ]
        rows.append(Row(label, tuple(shown)))
    return Table(columns, tuple(rows), len(ps), aside)


def with_words(table: Table, words: Mapping[str, Mapping[str, str]]) -> Table:
    """Add columns of words, by column and row; a row without any has empty cells."""
    rows = (replace(row, words=tuple(each.get(row.label, "") for each in words.values())) for row in table.rows)
    return replace(table, rows=tuple(rows), words=tuple(words))


def _format_cell(cell: Cell, adjusted: float | None, digits: int, scale: float) -> Shown:
    estimate = cell.estimate
    digits = visible([] if estimate.half is None else [scale * estimate.half], digits)
    number = fixed(scale * estimate.value, digits, cell.signed)
    half = "" if estimate.half is None else format(abs(scale) * estimate.half, f",.{digits}f")
    sides = None
    if cell.sides and estimate.low is not None and estimate.high is not None:
        below, above = estimate.value - estimate.low, estimate.high - estimate.value
        if abs(above - below) > UNEVEN * (above + below):
            sides = format(scale * below, f",.{digits}f"), format(scale * above, f",.{digits}f")
    return Shown(cell, adjusted, adjusted is not None and adjusted <= ALPHA, number, half, sides)


def markdown(table: Table, corner: str = "") -> str:
    """Write a table in GitHub's Markdown, with its caption below; columns that are set off have italic headings."""
    heads = [f"*{for_markdown(name)}*" if name in table.beside else for_markdown(name) for name in table.columns]
    head = [for_markdown(corner), *heads, *map(for_markdown, table.words)]
    lines = [head, ["---", *("---:" for _ in table.columns), *("---" for _ in table.words)]]
    for row in table.rows:
        texts = ("" if shown is None else shown.text for shown in row.shown)
        lines.append([*map(for_markdown, (row.label, *texts, *row.words))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{for_markdown(table.caption)}\n"


def latex(table: Table, corner: str = "") -> str:
    """Write the numbers as a LaTeX tabular with the rules of the package booktabs; long headings are stacked.

    Non-ASCII letters of labels, except Greek ones, are not escaped; LuaTeX and XeTeX know all of them, pdfTeX does not.
    """
    rows = [(row.label, ["" if shown is None else _number(shown) for shown in row.shown]) for row in table.rows]
    heads = [stack(column) for column in table.columns]
    columns = "l" + "r" * (len(heads) - len(table.beside)) + (GAP + "r" * len(table.beside)) * bool(table.beside)
    return tabular(columns, [for_latex(corner), *heads], [[for_latex(label), *cells] for label, cells in rows])


def latex_words(table: Table, corner: str = "") -> str:
    """Write the columns of words, of the rows that have any, as a further tabular; "" if there are none."""
    if not table.words:
        return ""
    wide = wrapped(0.82 / len(table.words)) * len(table.words)
    rows = [[for_latex(row.label), *map(for_latex, row.words)] for row in table.rows if any(row.words)]
    return tabular(f"l{wide}", [*map(for_latex, (corner, *table.words))], rows)


def wrapped(share: float) -> str:
    """Return the LaTeX code of a column of wrapped text, with a share of the text's width; needs the package array."""
    return rf">{{\raggedright\arraybackslash}}p{{{share:.2f}\textwidth}}"


def tabular(columns: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a LaTeX tabular with the rules of the package booktabs.

    Args:
        columns: LaTeX's codes of the columns.
        head, rows: cells, escaped.
    """
    top, *body = [" & ".join(line) + r" \\" for line in (head, *rows)]
    begin, end = f"\\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
    return "\n".join([begin, r"\toprule", top, r"\midrule", *body, r"\bottomrule", end, ""])


def stack(heading: str, align: str = "r") -> str:
    """Return a heading of a LaTeX table, escaped, on as many lines as it needs; ``align`` is r or l."""
    lines = [for_latex(line) for line in textwrap.wrap(heading, LONGEST_HEADING, break_long_words=False)]
    stacked = r"\\".join(lines)
    return lines[0] if len(lines) == 1 else "" if not lines else rf"\shortstack[{align}]{{{stacked}}}"


def to_csv(table: Table) -> str:
    """Write a line for each cell, with exact unscaled numbers and the text that the other formats show."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "column", "value", "low", "high", "half", "p", "p_holm", "star", "text"])
    for row in table.rows:
        for column, shown in zip(table.columns, row.shown, strict=True):
            if shown is not None:
                of, p = shown.cell.estimate, shown.cell.p
                numbers = [of.value, of.low, of.high, of.half, p, shown.adjusted]
                writer.writerow([for_csv(row.label), for_csv(column), *numbers, int(shown.star), shown.text])
        for column, text in zip(table.words, row.words, strict=True):
            writer.writerow([for_csv(row.label), for_csv(column), *[""] * 7, for_csv(text)])
    return out.getvalue()


def _number(shown: Shown) -> str:
    reach = rf" \pm {shown.half}" if shown.half else ""
    if shown.sides:
        reach = f"_{{-{shown.sides[0]}}}^{{+{shown.sides[1]}}}{{}}"
    # a comma in braces has no space behind it
    number = f"${shown.number.replace('−', '-')}{reach}{'^{*}' * shown.star}$".replace(",", "{,}")
    return number + for_latex(shown.cell.mark)
