"""The gate: what is looked at before a run spends time. Each check is a line: pass, warn or stop.

``checks.py`` has them in the order in which a run meets what they are about. Each is a small function over plain
values, in the file of what it looks at: ``chain.py``, ``judge.py``, ``rows.py``, ``text.py``, ``machine.py``.
"""

from collections.abc import Sequence

from dnpo.loop import Iteration
from dnpo.running.console import Console
from dnpo.running.gate import chain
from dnpo.running.gate.finding import Finding, Level
from dnpo.stages.plan import Run
from dnpo.store import Store

__all__ = ["Finding", "Level", "gate", "show"]

WORDS: dict[Level, str] = {"warn": "to know of", "stop": "to put right first"}


def gate(run: Run, iterations: Sequence[Iteration], store: Store) -> list[Finding]:
    """Every check, in the order in which a run meets what they are about.

    Where all stages are in the store nothing is spent, so nothing is asked but whether the chain is right.
    """
    found = [chain.reference(iterations)]
    todo = [stage for iteration in iterations for stage in iteration.stages if not store.has(stage)]
    if not todo:
        return [*found, Finding("stages", "pass", "all are in the store: nothing is left that a check could save")]
    from dnpo.running.gate.checks import check

    return found + check(run, iterations, store, todo)


def show(console: Console, findings: Sequence[Finding], everything: bool) -> None:
    """The lines on the screen; those that pass only where ``everything`` is asked for."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    colours = {"pass": "green", "warn": "yellow", "stop": "red"}
    for finding in findings:
        if everything or finding.level != "pass":
            change = f" → {finding.setting}" if finding.setting and finding.level != "pass" else ""
            mark = f"[{colours[finding.level]}]{finding.level}[/]"
            table.add_row(mark, finding.name, Text(finding.text + change))
    if table.row_count:
        console.table(table)
    levels = [finding.level for finding in findings]
    others = "".join(f", {levels.count(level)} {word}" for level, word in WORDS.items() if level in levels)
    console.say(f"{levels.count('pass')} checks passed{others}")
