"""Write the figures and tables that scripts draw to files, and log them to MLflow."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis import floats
from analysis.drawing import COLUMN, DPI, bare
from analysis.selection import targets
from dnpo.errors import DataError, TrackingError
from dnpo.escape import for_csv
from dnpo.stats.table import Table, latex, latex_words, markdown, to_csv
from dnpo.tracking.reading import Database, TrackedRun

FOLDER = "analysis"  # of artefacts


@dataclass(frozen=True)
class DrawnFigure:
    """A figure, with the numbers in it and the runs behind them."""

    figure: Figure
    rows: Sequence[Mapping[str, Any]]
    runs: Sequence[TrackedRun]


@dataclass(frozen=True)
class DrawnTable:
    """A table, with its title, the heading of its first column, the notes below it, and the runs behind it."""

    table: Table
    title: str
    corner: str
    notes: Sequence[str]
    runs: Sequence[TrackedRun]


Drawing = DrawnFigure | DrawnTable


def write(drawing: Drawing, name: str, folder: Path) -> list[Path]:
    """Write a figure as PNG, SVG, PDF, LaTeX and CSV, or a table as CSV, Markdown and LaTeX; return the files.

    The PDF has neither title nor footer: they are the caption in the LaTeX file, which includes the PDF.

    Raises:
        DataError: the folder cannot be written.
    """
    make_folder(folder)
    with writing_to(folder):
        return _picture(drawing, folder / name) if isinstance(drawing, DrawnFigure) else _table(drawing, folder / name)


def make_folder(folder: Path) -> None:
    """Make the folder of the results.

    Raises:
        DataError: it cannot be made.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Explain an error of writing to the folder of the results.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"out={folder}: {error.strerror}; expected a folder to write to") from error


def _picture(drawing: DrawnFigure, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg", ".csv", ".pdf", ".tex")]
    drawing.figure.savefig(paths[0], dpi=DPI)
    drawing.figure.savefig(paths[1], metadata={"Date": None})
    paths[2].write_text(csv_of(drawing.rows))
    title, foot = bare(drawing.figure)
    drawing.figure.savefig(paths[3], metadata={"CreationDate": None})
    paths[4].write_text(floats.figure(path.name, title, foot, wide=bool(drawing.figure.get_figwidth() > COLUMN)))
    return paths


def _table(drawing: DrawnTable, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".csv", ".md", ".tex")]
    paths[0].write_text(to_csv(drawing.table))
    notes = "".join(f"\n{note}\n" for note in drawing.notes)
    paths[1].write_text(f"**{drawing.title}**\n\n{markdown(drawing.table, drawing.corner)}{notes}")
    tabulars = latex(drawing.table, drawing.corner), latex_words(drawing.table, drawing.corner)
    of = path.name, drawing.title, drawing.table.caption
    paths[2].write_text(floats.table(*of, tabulars[0], drawing.notes, tabulars[1]))
    return paths


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with the columns of all of them; a cell is empty if its row lacks the column."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: for_csv(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def log(database: Database, runs: Iterable[TrackedRun], paths: Sequence[Path]) -> int:
    """Log files to the sweep's parent run, or to each run outside sweeps; return the number of MLflow runs.

    Raises:
        TrackingError: the tracking store refuses them.
    """
    those = targets(database, runs)
    try:
        for run in those:
            for path in paths:
                database.log(run, path, FOLDER)
    except TrackingError as error:
        raise TrackingError(f"{error}; log=false skips this") from error
    return len(those)
