"""The gate: check a run before its first stage. Each check gives one line: pass, warn or stop.

``checks.py`` runs the checks in the order of the run's stages. Each check is a small function of plain values. The
files are named by subject: ``chain.py``, ``judge.py``, ``rows.py``, ``text.py``, ``machine.py``.
"""

from collections.abc import Callable, Sequence

from dnpo.running.console import Console
from dnpo.running.gate import chain
from dnpo.running.gate.finding import Finding, Level
from dnpo.stages.plan import Iteration, Run
from dnpo.store import Store
from dnpo.wording import plural

__all__ = ["Finding", "Level", "foresee", "gate", "show"]

WORDS: dict[Level, str] = {"warn": "warning", "stop": "problem"}


def gate(
    run: Run,
    iterations: Sequence[Iteration],
    store: Store,
    everything: bool = False,
    prepare: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Run every check, in the order of the run's stages.

    If all stages are in the store, only the chain itself is checked, unless ``everything`` is true.

    Args:
        prepare: called before the libraries are used.
    """
    found = [chain.reference(iterations, run.plans)]
    todo = [stage for iteration in iterations for stage in iteration.stages if everything or not store.has(stage)]
    if not todo:
        return [*found, Finding("stages", "pass", "all are in the store, so there is nothing more to check")]
    data, facts = run.data.read()  # first, since importing the libraries takes seconds
    prepare()
    from dnpo.running.gate.checks import check
    from dnpo.running.gate.engine import findings

    return found + findings(run, iterations, todo) + check(run, iterations, store, todo, data, facts)


def foresee(run: Run, iterations: Sequence[Iteration], store: Store) -> list[Finding]:
    """Run the checks that need only settings, for a plan: no rows or weights are read, and no server is asked."""
    from dnpo.running.gate import engine, judge, rows

    found = [chain.reference(iterations, run.plans)]
    todo = [stage for iteration in iterations for stage in iteration.stages if not store.has(stage)]
    if not todo:
        return found
    context = rows.room(run.data.max_prompt_tokens, run.model.known_context, run.limit, hasattr(run.model, "context"))
    return [*found, judge.labels_of_run(run, {}), *engine.findings(run, iterations, todo, ask=False), context]


def show(console: Console, findings: Sequence[Finding], everything: bool) -> None:
    """Show the warnings on the screen, the checks that pass if ``everything`` is true, and how many there are of each.

    What stops the run is not among the lines: it is the error that follows.
    """
    from rich.text import Text

    from dnpo.screen import ScreenTable

    table = ScreenTable(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap)
    colours = {"pass": "green", "warn": "yellow"}
    for finding in findings:
        if finding.level == "warn" or (everything and finding.level == "pass"):
            change = f" → {finding.setting}" if finding.setting and finding.level != "pass" else ""
            mark = Text(finding.level, style=colours[finding.level])
            table.add_row(mark, finding.name, finding.text + change)
    if table.row_count:
        console.table(table, fold=True)
    levels = [finding.level for finding in findings]
    counts = {word: levels.count(level) for level, word in WORDS.items() if level in levels}
    others = "".join(f", {plural(count, word)}" for word, count in counts.items())
    console.say(f"{plural(levels.count('pass'), 'check')} passed{others}")
