"""What a script makes, and where it goes: files, and MLflow."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.drawing import DPI
from analysis.selection import targets
from dnpo.errors import DataError, TrackingError
from dnpo.stats.table import Table, latex, markdown, to_csv
from dnpo.tracking.reading import Database, TrackedRun

FOLDER = "analysis"  # of artefacts


@dataclass(frozen=True)
class DrawnFigure:
    """A figure and the numbers in it."""

    figure: Figure
    rows: Sequence[Mapping[str, Any]]
    runs: Sequence[TrackedRun]


@dataclass(frozen=True)
class DrawnTable:
    """A table, its title, the head of its first column, and the lines below it."""

    table: Table
    title: str
    corner: str
    notes: Sequence[str]
    runs: Sequence[TrackedRun]


Made = DrawnFigure | DrawnTable


def write(made: Made, name: str, folder: Path) -> list[Path]:
    """Write what a script made: PNG, SVG and CSV of a picture; CSV, Markdown and LaTeX of a table.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _picture(made, folder / name) if isinstance(made, DrawnFigure) else _table(made, folder / name)
    except OSError as error:
        raise DataError(f"--out {folder}: {error.strerror}; expected a folder to write to") from error


def _picture(made: DrawnFigure, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".png", ".svg", ".csv")]
    made.figure.savefig(paths[0], dpi=DPI)
    made.figure.savefig(paths[1], metadata={"Date": None})
    paths[2].write_text(csv_of(made.rows))
    return paths


def _table(made: DrawnTable, path: Path) -> list[Path]:
    paths = [path.with_suffix(suffix) for suffix in (".csv", ".md", ".tex")]
    paths[0].write_text(to_csv(made.table))
    notes = "".join(f"\n{note}\n" for note in made.notes)
    paths[1].write_text(f"**{made.title}**\n\n{markdown(made.table, made.corner)}{notes}")
    comments = "".join(f"% {line}\n" for line in (made.title, *made.notes))
    paths[2].write_text(comments + latex(made.table, made.corner))
    return paths


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the columns of them all; empty where a row lacks one or has none."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def log(database: Database, runs: Iterable[TrackedRun], paths: Sequence[Path]) -> int:
    """Keep files with the sweep's own run, or with each run where there is none; how many runs got them.

    Raises:
        TrackingError: the store does not take them.
    """
    from mlflow.exceptions import MlflowException

    those = targets(database, runs)
    try:
        for run in those:
            for path in paths:
                database.client.log_artifact(run, str(path), FOLDER)
    except (MlflowException, OSError) as error:
        problem = str(error).splitlines()[0]
        raise TrackingError(
            f"{database.uri}: artefacts cannot be logged ({problem}); --no-log leaves that out"
        ) from error
    return len(those)
