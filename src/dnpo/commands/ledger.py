"""``python -m dnpo.ledger [FILE]``: show the judges' calls, hits and spend by judge, run and month."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dnpo.commands.grammar import Parser, parse, program
from dnpo.errors import LedgerError
from dnpo.escape import say, tell
from dnpo.judges.asked.ledger import Ledger, sum_by
from dnpo.running.console import Console
from dnpo.screen import ScreenTable


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = Parser(prog=program("dnpo.ledger", "judge ledger"), description="Calls, hits and spend of the judges.")
    parser.add_argument("file", nargs="?", help="the ledger (default: ledger.sqlite)")
    given = parse(parser, arguments).file
    path = Path(given or "ledger.sqlite")
    if not path.is_file() and given is None:
        tell(f"nothing yet: no judge has been asked here ({path}); give another ledger's path if you have one")
        return
    if not path.is_file():
        say(f"error: {path}: there is no such file; give the ledger of your runs (setting ledger=…)", error=True)
        sys.exit(1)
    try:
        with Ledger(path) as ledger:
            rows, endpoints = ledger.rows(), ledger.endpoints()
    except LedgerError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)
    console = Console()
    for title, names in (("By judge", ("judge", "model")), ("By run", ("run",)), ("By month", ("month",))):
        table = ScreenTable(title=title, title_justify="left", box=None, pad_edge=False)
        for name in names:
            table.add_column(name, overflow="fold")
        for name in ("calls", "failed", "hits", "tokens\nin", "tokens\nout", "US\ndollars"):
            table.add_column(name, justify="right", no_wrap=True)
        groups = sum_by(rows, *names)
        for row in [*groups, {**dict.fromkeys(names, "all"), **sum_by(rows)[0]}] if groups else []:
            money = f"{row['cost']:,.4f}" + ("+" if row["unpriced"] else "")
            counts = [f"{row[name]:,}" for name in ("calls", "failed", "hits", "tokens_in", "tokens_out")]
            table.add_row(*(str(row[name]) for name in names), *counts, money)
        console.table(table, split=True)
        console.say("")
    if endpoints:
        table = ScreenTable(title="Who answered", title_justify="left", box=None, pad_edge=False)
        for name in endpoints[0]:
            table.add_column(name, overflow="fold")
        for each in endpoints:
            table.add_row(*each.values())
        console.table(table, split=True)
        console.say("")
    note = "hits: questions answered from the ledger instead of asked again; failed: replies that gave no verdict"
    console.tell(f"{note}; +: and calls without a known price." if any(row["unpriced"] for row in rows) else f"{note}.")
