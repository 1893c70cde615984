"""``python -m dnpo.report RUN_OR_SWEEP``: write the HTML page on a run or a sweep."""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dnpo.commands.grammar import Parser, parse, program
from dnpo.errors import DataError, DnpoError
from dnpo.escape import announce, say, tell
from dnpo.tracking.client import default_uri
from dnpo.wording import plural

if TYPE_CHECKING:
    from dnpo.report.selection import Selection

ARTIFACT = "report.html"


def main(arguments: list[str] | None = None) -> None:
    """Write the page, and track it with the run unless ``log=false`` is given."""
    parser = Parser(
        prog=program("dnpo.report", "report"), description="One self-contained HTML page on a run or a sweep."
    )
    parser.add_argument(
        "run_or_sweep",
        help="a run's id (or its beginning) or folder; or a sweep's name, folder, or the id of its parent run",
    )
    parser.add_argument(
        "--uri",
        default=default_uri(),
        help="where runs were tracked (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    parser.add_argument("--experiment", default="dnpo", help="MLflow experiment (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the file to write (default: report-NAME.html)")
    parser.add_argument("--no-log", action="store_true", help=f"do not keep it in MLflow as {ARTIFACT}")
    given = parse(parser, arguments)
    try:
        _report(given)
    except DnpoError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)


def _report(given: argparse.Namespace) -> None:
    clock = time.monotonic()
    announce(f"reading {given.run_or_sweep} for its report")
    from dnpo.report.content import content
    from dnpo.report.page import html
    from dnpo.report.selection import select
    from dnpo.tracking.reading import Database

    database = Database(given.uri, given.experiment)
    selection = select(database, given.run_or_sweep)
    text = html(content(selection, given.uri))
    out = given.out or Path(f"report-{_slug(selection)}.html")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"out={out}: {error.strerror}; expected a file that can be written") from error
    took = time.monotonic() - clock
    say(f"{out}: {len(text.encode()) / 1e6:.1f} MB, {plural(len(selection.runs), 'run')}, in {took:.1f} s")
    if selection.left_out:
        tell(selection.left_out)
    if given.no_log:
        return
    if selection.own is None:
        tell("not kept in MLflow: these runs have no parent run of a sweep")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ARTIFACT
        path.write_text(text, encoding="utf-8")
        database.log(selection.own.id, path)
    say(f"kept in MLflow as {ARTIFACT} of run {selection.own.id}")


def _slug(selection: "Selection") -> str:
    name = selection.name if selection.sweep else selection.runs[0].id[:8]
    return re.sub(r"[^\w.-]+", "-", name)[:80].strip("-.") or "sweep"
