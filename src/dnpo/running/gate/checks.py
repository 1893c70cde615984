"""Run the checks of the gate on the data, model and tokenizer that the run would use."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnpo.errors import ModelError
from dnpo.judges import Judge
from dnpo.optimise.parts import Optimisation
from dnpo.policy.model import Policy
from dnpo.records import Prompt
from dnpo.running.gate import judge, measures, needs, rows, text
from dnpo.running.gate.finding import Finding, refuse
from dnpo.running.gate.machine import Counts
from dnpo.stages.plan import Iteration, Run
from dnpo.store import Stage, Store

LOOKED_AT = 256  # rows of a split that are rendered and encoded


def check(
    run: Run,
    iterations: Sequence[Iteration],
    store: Store,
    todo: Sequence[Stage],
    data: rows.Rows,
    facts: Mapping[str, Any],
) -> list[Finding]:
    """Run every check of a run.

    Args:
        todo: the stages that are not computed yet.
        data: the rows of every split.
        facts: what the source reported when it read them.
    """
    found = [*_rows(run, data, facts), *_divided(run, iterations, todo, data["train"])]
    try:
        with _base(run, iterations[0].prompts, data, store) as folder:
            policy = run.model.outline(folder)
            found.append(measures.weights(policy, run.model.weights_are_here(folder)))
            found += judge.models(run.plans, policy)
            tokens, counts = _tokens(run, data, policy)
            found += tokens
            if counts is not None:
                found += needs.findings(run, iterations, store, todo, counts, policy, folder)
    except ModelError as error:
        found.append(refuse("model", error, "model.…, as the message says"))
    found += measures.findings(run.eval, {stage.name for stage in todo})
    ahead = {stage.name for stage in todo}
    asked = [(plan.judge, {"judge"}) for plan in run.plans if plan.dsl.needs_scores]
    asked += [(run.judge, {"evaluate"}), (run.second_judge, {"second"})]
    called: list[Judge] = []
    for who, stages in asked:
        # last, since a call costs money
        stopped = any(finding.level == "stop" for finding in found)
        if who.gives_scores and stages & ahead and who not in called and not stopped:
            called.append(who)
            found.append(judge.canary(who, run.ledger))
    return found


@contextmanager
def _base(run: Run, prompts: Stage, data: rows.Rows, store: Store) -> Iterator[Path]:
    """Yield a folder with the base model's tokenizer: the one in the store, or a temporary one."""
    if store.has(prompts):
        yield store.folder(prompts) / "model"
        return
    with tempfile.TemporaryDirectory() as folder:
        run.model.base(Path(folder), data["train"])
        yield Path(folder)


def _rows(run: Run, data: rows.Rows, facts: Mapping[str, Any]) -> list[Finding]:
    scored = any(plan.dsl.needs_scores for plan in run.plans)
    measured = run.eval.split
    redrawn = run.data.drawn_with_replacement
    other = run.second_judge
    return [
        judge.labels_of_run(run, data),
        *([judge.measuring(run.judge, data[measured], measured)] if scored and run.eval.judge is not None else []),
        *([judge.second(other, data[measured], measured)] if other.gives_scores else []),
        *(judge.judge_prompts(of.prompts_seen, data[measured], measured, *names) for of, *names in _fitted(run)),
        rows.ids(data),
        *rows.pairs(data["train"]),
        *(_users_rows(facts, sum(map(len, data.values()))) if "unread" in facts else []),
        rows.duplicates(data["train"], redrawn, facts.get("removed", {})),
        rows.near_duplicates(data["train"], redrawn),
        *rows.overlap(data),
    ]


def _fitted(run: Run) -> Iterator[tuple[Judge, str, str]]:
    """The judges that measure, each with its name and the setting of its file."""
    own = run.eval.judge is not None
    yield (run.judge, "judge of evaluations", "eval.judge") if own else (run.judge, "judge", "judge.path")
    if run.second_judge.gives_scores:
        yield run.second_judge, "second judge", "second_judge.path"


def _divided(
    run: Run, iterations: Sequence[Iteration], todo: Sequence[Stage], train: Sequence[Prompt]
) -> list[Finding]:
    """Check settings that divide the training rows, so that no stage is left without rows."""
    parts, found = rows.apart(train, run.sft_rows)
    found += rows.used(run.plans, parts["train"])
    if any(finding.level == "stop" for finding in found):
        return found
    ahead = [plan for plan, each in zip(run.plans, iterations[1:], strict=True) if each.policy in todo]
    trainings: list[tuple[str, Optimisation, Sequence[Prompt]]] = []
    if iterations[0].policy in todo:
        trainings.append(("sft", run.sft, parts["sft"]))
    for plan in ahead:
        prompts = plan.prompts(parts["train"], plan.k)
        found += [finding for finding in rows.clusters(plan, len(prompts)) if finding not in found]
        # a curriculum may add pairs of earlier iterations, whose prompts can be any
        trainings.append(("trainer", plan.trainer, parts["train"] if plan.curriculum.reads_history else prompts))
    found += rows.held_out(trainings)
    if run.augment is not None and iterations[0].taught in todo and iterations[0].taught is not iterations[0].policy:
        found.append(rows.lessons(run.augment, parts["train"]))
    return found


def _users_rows(facts: Mapping[str, Any], count: int) -> list[Finding]:
    return [
        *([rows.sources(facts["sources"])] if "sources" in facts else []),
        rows.unusable(facts.get("unusable", {}), count),
        rows.unread(facts["unread"]),
        rows.removed(facts["removed"], facts["examples"], count),
    ]


def _tokens(run: Run, data: rows.Rows, policy: Policy) -> tuple[list[Finding], Counts | None]:
    """Check template and tokens, and count the tokens; the counts are None if a check stops the run."""
    some = {split: rows.evenly(data[split], LOOKED_AT) for split in data}
    everything = [row for split in some.values() for row in split]
    tokenizer, stop_ids = policy.tokenizer, policy.stop_ids
    template = text.template(tokenizer, everything)
    if template.level == "stop":
        return [template], None  # rows must be rendered before they can be encoded
    by_split = {split: text.encode_rows(tokenizer, some[split], stop_ids) for split in some}
    encoded = [row for split in by_split.values() for row in split]
    found = [
        template,
        text.training_text(tokenizer, stop_ids, everything),
        text.control_tokens(tokenizer, stop_ids, everything),
        text.seam(tokenizer, everything, stop_ids),
        text.one_bos(tokenizer, encoded),
        text.one_eos(tokenizer, stop_ids, encoded),
        text.no_eos_where_cut(tokenizer, stop_ids, encoded, run.limit),
        text.ends_of_model(tokenizer, policy.model_stop_ids, encoded),
    ]
    context: int | None = getattr(policy.causal_lm.config, "max_position_embeddings", None) or None
    longest = min(run.data.max_prompt_tokens, (context or 10**9) - run.limit)
    room = rows.room(run.data.max_prompt_tokens, context, run.limit, hasattr(run.model, "context"))
    found.append(room)
    if room.level == "stop":
        return found, None
    why = f" (data.max_prompt_tokens={longest})"
    if longest < run.data.max_prompt_tokens:
        why = f" (the model's context of {context:,} less data.max_response_tokens={run.limit})"
    drop = run.data.long_responses == "drop"
    for split, some_rows in by_split.items():
        tokens = [(len(row.prompt_ids), len(row.ids)) for row in some_rows]
        found.append(rows.lengths(split, len(data[split]), tokens, longest, run.limit, drop, why))
    if any(finding.level == "stop" for finding in found):
        return found, None
    sizes = {split: len(data[split]) for split in data}
    lengths = [(min(len(row.prompt_ids), longest), min(len(row.ids), run.limit)) for row in encoded]
    return found, needs.counts(sizes, run.eval.split, lengths, run.limit)
