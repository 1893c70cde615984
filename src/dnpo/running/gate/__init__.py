"""The gate: what is looked at before a run spends time. Each check is a line: pass, warn or stop.

The checks are small functions over plain values, by what they look at: ``chain.py``, ``judge.py``, ``rows.py``,
``text.py``, ``machine.py``. Here they are given what the run would really use.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dnpo.errors import ModelError
from dnpo.loop import Iteration
from dnpo.policy.model import Policy
from dnpo.running.console import Console
from dnpo.running.gate import chain, judge, needs, rows, text
from dnpo.running.gate.finding import Finding, Level
from dnpo.running.gate.machine import Counts
from dnpo.stages.verbs import Run
from dnpo.store import Stage, Store

__all__ = ["Finding", "Level", "gate", "show"]

LOOKED_AT = 256  # rows of a split that are rendered and encoded
WORDS: dict[Level, str] = {"warn": "to know of", "stop": "to put right first"}


def gate(run: Run, iterations: Sequence[Iteration], store: Store) -> list[Finding]:
    """Every check, in the order in which a run meets what they are about.

    Where all stages are in the store nothing is spent, so nothing is asked but whether the chain is right.
    """
    found = [chain.reference(iterations)]
    todo = [stage for iteration in iterations for stage in iteration.stages if not store.has(stage)]
    if not todo:
        return [*found, Finding("stages", "pass", "all are in the store: nothing is left that a check could save")]
    data, facts = run.data.value.read()
    found += _rows(run, data, facts.get("removed", {}))
    try:
        with _base(run, iterations[0].prompts, data, store) as folder:
            policy = run.model.value.outline(folder)
            tokens, counts = _tokens(run, data, policy)
            found += tokens
            if counts is not None:
                found += needs.findings(run, iterations, store, counts, policy, folder)
    except ModelError as error:
        found.append(Finding("model", "stop", str(error), "model.…, as the message says"))
    ahead = {stage.name for stage in todo}
    asked = [(run.judge.value, {"judge", "evaluate"}), (run.second_judge.value, {"second"})]
    for who, stages in asked:
        # a call costs, so it comes last
        if who.gives_scores and stages & ahead and not any(finding.level == "stop" for finding in found):
            found.append(judge.canary(who, run.ledger))
    return found


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


@contextmanager
def _base(run: Run, prompts: Stage, data: rows.Rows, store: Store) -> Iterator[Path]:
    """A folder with the base model's tokenizer: the store's, or one for the moment."""
    if store.has(prompts):
        yield store.folder(prompts) / "model"
        return
    with tempfile.TemporaryDirectory() as folder:
        run.model.value.base(Path(folder), data["train"])
        yield Path(folder)


def _rows(run: Run, data: rows.Rows, removed: Mapping[str, int]) -> list[Finding]:
    scored = [plan.k for plan in run.plans if plan.dsl.value.needs_scores]
    measured = run.eval.value.split
    redrawn = run.data.value.drawn_with_replacement
    other = run.second_judge.value
    return [
        judge.labels(scored[0] if scored else None, run.judge.value, data),
        *([judge.second(other, data[measured], measured)] if other.gives_scores else []),
        judge.judge_prompts(run.judge.value.prompts_seen, data[measured], measured),
        rows.ids(data),
        rows.duplicates(data["train"], redrawn, removed),
        rows.near_duplicates(data["train"], redrawn),
        *rows.overlap(data),
    ]


def _tokens(run: Run, data: rows.Rows, policy: Policy) -> tuple[list[Finding], Counts | None]:
    """What is found of template and tokens, and how long rows are; None where no run could be made of them."""
    some = {split: rows.evenly(data[split], LOOKED_AT) for split in data}
    everything = [row for split in some.values() for row in split]
    tokenizer, stop_ids = policy.tokenizer, policy.stop_ids
    template = text.template(tokenizer, everything)
    if template.level == "stop":
        return [template], None  # what cannot be rendered cannot be encoded
    by_split = {split: text.encoded(tokenizer, some[split], stop_ids) for split in some}
    encoded = [row for split in by_split.values() for row in split]
    found = [
        template,
        text.seam(tokenizer, everything),
        text.one_bos(tokenizer, encoded),
        text.one_eos(tokenizer, stop_ids, encoded),
        text.no_eos_where_cut(tokenizer, stop_ids, encoded, run.limit),
        text.ends_of_model(tokenizer, policy.model_stop_ids, encoded),
    ]
    context = int(getattr(policy.causal_lm.config, "max_position_embeddings", 0) or 10**9)
    longest = min(run.data.value.max_prompt_tokens, context - run.limit)
    drop = run.data.value.long_responses == "drop"
    for split, those in by_split.items():
        tokens = [(len(row.prompt_ids), len(row.ids)) for row in those]
        found.append(rows.lengths(split, len(data[split]), tokens, longest, run.limit, drop))
    if any(finding.level == "stop" for finding in found):
        return found, None
    sizes = {split: len(data[split]) for split in data}
    lengths = [(min(len(row.prompt_ids), longest), min(len(row.ids), run.limit)) for row in encoded]
    return found, needs.counts(sizes, run.eval.value.split, lengths, run.limit)
