"""The stages before the first iteration: encode the data, fine-tune, and teach a judge.

The functions are verbs, as in ``verbs.py``.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo.data.mix import count_sources
from dnpo.data.unusable import list_reasons
from dnpo.errors import DataError, ModelError, SettingsError
from dnpo.records import GIVEN, Prompt, Response
from dnpo.seeding import derive
from dnpo.settings import part_key
from dnpo.stages import files
from dnpo.stages.files import load_sequences, read_split, write_trained
from dnpo.stages.plan import Facts, Run, Task, verb
from dnpo.store import Report
from dnpo.tables import column, take

if TYPE_CHECKING:
    from dnpo.policy.model import Policy


def _prompts_key(run: Run, plan: None) -> dict[str, Any]:
    return {
        "data": part_key(run.data),
        "model": part_key(run.model),
        "max_prompt_tokens": run.data.max_prompt_tokens,
        "max_response_tokens": run.limit,
        **({"long_responses": "drop"} if run.data.long_responses == "drop" else {}),
        **({"sft_rows": run.sft_rows} if run.sft_rows else {}),
    }


@verb("prompts", 3, _prompts_key)
def prepare(run: Run, plan: None, task: Task) -> Facts:
    """Encode the prompts that fit the model, with responses; write the tokenizer, and the weights of a new model.

    The responses are the human ones and, if the data have pairs, the rejected ones.
    """
    rows, facts = run.data.read()
    removed = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in facts.get("removed", {}).items() if n]
    if removed:
        such = "".join(f"; {example}" for example in facts.get("examples", []))
        task.report.note(f"rows removed as duplicates: {', '.join(removed)}{such}")
    if "unusable" in facts:
        task.report.note(f"rows that cannot be used are left out: {'; '.join(list_reasons(facts['unusable']))}")
    for note in facts.get("notes", ()):
        task.report.note(note)
    run.model.base(task.folder / "model", rows["train"])
    policy = run.model.load(task.folder / "model", None, "cpu")
    task.report.begin(sum(map(len, rows.values())), "prompts")
    if run.sft_rows:
        rows = {**rows, **set_apart(rows["train"], run.sft_rows)}
    for split, these in rows.items():
        facts[split] = _encode(run, policy, these, split, task.folder, task.report)
        if "sources" in facts:
            facts[split]["sources"] = count_sources(files.open_split(task.folder, split).prompts)
    return facts


def set_apart(rows: Sequence[Prompt], count: int) -> dict[str, Sequence[Prompt]]:
    """Set ``count`` rows apart for fine-tuning, chosen by a hash of their ids; the iterations get the others.

    Raises:
        SettingsError: the iterations would get none.
    """
    if count >= len(rows):
        raise SettingsError(f"sft_rows={count}: expected fewer than the {len(rows):,} training rows")
    ids = column(rows, "id")
    by_hash = sorted(ids, key=lambda id: hashlib.sha256(id.encode()).digest())
    apart = set(by_hash[:count])
    numbers = {
        "sft": [i for i, id in enumerate(ids) if id in apart],
        "train": [i for i, id in enumerate(ids) if id not in apart],
    }
    return {split: take(rows, some) for split, some in numbers.items()}


def _encode(
    run: Run, policy: "Policy", rows: Sequence[Prompt], split: str, folder: Path, report: Report
) -> dict[str, Any]:
    """Encode one split, without the prompts that are too long."""
    context = int(getattr(policy.causal_lm.config, "max_position_embeddings", 0) or 10**9)
    longest = min(run.data.max_prompt_tokens, context - run.limit)
    drop = run.data.long_responses == "drop"
    kinds = {split: Prompt, f"{split}-human": Response, f"{split}-given": Response}

    def work(some: Sequence[Prompt]) -> files.Shard:
        prompts, human, given, counts = _encode_some(policy, some, split, longest, run.limit, drop, report)
        return dict(zip(kinds, (prompts, human, given), strict=True)), counts

    made = files.Shards(folder, split, kinds)
    report.advance(min(made.done * files.SIZE, len(rows)))
    parts = (rows[first : first + files.SIZE] for first in range(0, len(rows), files.SIZE))
    found = made.make(parts, work)
    counts: Counter[str] = Counter()
    for each in found:
        counts.update(each)
    too_long, over, paired = counts["too_long"], counts["over"], counts["paired"]
    given_over, given_same, kept = counts["given_over"], counts["given_same"], counts["kept"]
    if too_long:
        report.note(f"{too_long:,} of {len(rows):,} {split} prompts are longer than {longest} tokens: dropped")
    if over:
        report.note(
            f"{over:,} of {len(rows):,} human responses of {split} are longer than {run.limit} tokens: "
            f"{'dropped with their prompts' if drop else 'cut there'}"
        )
    if given_over:
        report.note(
            f"{given_over:,} of {paired:,} rejected responses of {split} are longer than {run.limit} tokens: "
            f"{'dropped with their prompts' if drop else 'cut there'}"
        )
    if given_same:
        report.note(
            f"{given_same:,} of {paired:,} pairs of {split} have the same tokens on both sides (within {run.limit}): "
            "the rejected responses are left out"
        )
    if rows and not kept and too_long < len(rows):
        raise DataError(
            f"data.long_responses=drop: all {over:,} human responses of {split} to prompts that fit are "
            f"longer than data.max_response_tokens={run.limit}; raise it, or give data.long_responses=cut"
            if not given_over
            else f"data.long_responses=drop: no pair of {split} to a prompt that fits has both responses within "
            f"data.max_response_tokens={run.limit}; raise it, or give data.long_responses=cut"
        )
    if not kept:
        raise DataError(
            f"data: none of the {len(rows):,} {split} prompts fits into {longest} tokens (the smaller of "
            f"data.max_prompt_tokens={run.data.max_prompt_tokens} and the model's context of {context} less "
            f"data.max_response_tokens={run.limit}); change these, or take other data"
            if rows
            else f"data: there are no {split} prompts"
        )
    done = "dropped" if drop else "cut"
    facts = {"rows": kept, "too_long": too_long, f"human_{done}": over}
    if not paired:
        (folder / f"{split}-given.parquet").unlink(missing_ok=True)
        return facts
    return facts | {"pairs": counts["given"], f"given_{done}": given_over, "given_same": given_same}


def _encode_some(
    policy: "Policy", rows: Sequence[Prompt], split: str, longest: int, limit: int, drop: bool, report: Report
) -> tuple[list[Prompt], list[Response], list[Response], dict[str, int]]:
    """Encode some rows of a split.

    Args:
        longest, limit: maximum tokens of a prompt and of a response.
        drop: whether rows with longer responses are dropped.

    Returns:
        The prompts that fit, the human responses, the rejected ones of pairs in the data, and counts.
    """
    from dnpo.policy.tokenizer import human_response

    prompts, human, given = [], [], []
    counts: Counter[str] = Counter()
    kept: list[tuple[Prompt, list[int], list[int]]] = []
    for row, (prompt_ids, ids) in zip(rows, _encode_responses(policy, rows, split, "human"), strict=True):
        report.advance()
        counts["paired"] += row.rejected is not None
        if len(prompt_ids) > longest:
            counts["too_long"] += 1
            continue
        counts["over"] += len(ids) > limit
        if not (drop and len(ids) > limit):
            kept.append((row, prompt_ids, ids))
    paired = [row for row, *_ in kept if row.rejected is not None]
    encoded = _encode_responses(policy, paired, split, "rejected")
    of_rejected = {row.id: ids for row, (_, ids) in zip(paired, encoded, strict=True)}
    for row, prompt_ids, ids in kept:
        rejected = row.rejected
        if rejected is not None:
            rejected_ids = of_rejected[row.id]
            counts["given_over"] += len(rejected_ids) > limit
            if drop and len(rejected_ids) > limit:
                continue
            if rejected_ids[:limit] == ids[:limit]:
                counts["given_same"] += 1
                row = replace(row, rejected=None, rejected_score=None)
            else:
                other = replace(row, human=rejected)
                given.append(replace(human_response(policy.tokenizer, other, rejected_ids, limit), source=GIVEN))
        prompts.append(replace(row, token_ids=prompt_ids))
        human.append(human_response(policy.tokenizer, row, ids, limit))
    return prompts, human, given, {**counts, "kept": len(prompts), "given": len(given)}


def _encode_responses(
    policy: "Policy", rows: Sequence[Prompt], split: str, side: str
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompts and of a response to each (the human or the rejected one); an error names the row."""
    from dnpo.policy.tokenizer import encode, encode_many

    tokenizer, stop_ids = policy.tokenizer, policy.stop_ids
    try:
        return encode_many(tokenizer, [(row.messages, getattr(row, side)) for row in rows], stop_ids)
    except ModelError:
        for row in rows:
            try:
                encode(tokenizer, row.messages, getattr(row, side), stop_ids)
            except ModelError as error:
                raise ModelError(f"row {row.id} of {split}: {error}") from error
        raise


@verb(
    "sft",
    3,
    lambda run, plan: {"sft": part_key(run.sft), "lora": part_key(run.model.lora), "seed": run.seed},
    title="supervised fine-tuning",
    shared=True,
)
def fine_tune(run: Run, plan: None, task: Task) -> Facts:
    """Fine-tune the base model on the human responses."""
    from dnpo.optimise import preference

    rows = load_sequences(task.inputs["prompts"], "sft" if run.sft_rows else "train")
    seed = derive(run.seed, "sft")
    policy = run.policy(task.inputs)
    policy.model = run.model.lora.on(policy.model, derive(seed, "adapter"))
    facts: Facts = {}
    history = preference.fine_tune(
        policy, rows, run.sft, seed=seed, folder=task.folder, report=task.report, facts=facts
    )
    return {**write_trained(policy, history, task.folder, None), **facts}


@verb(
    "augment",
    1,
    lambda run, plan: {"augment": part_key(run.augment), "lora": part_key(run.model.lora), "seed": run.seed},
    title="lessons for the judge",
    shared=True,
)
def teach(run: Run, plan: None, task: Task) -> Facts:
    """Teach a copy of the initial policy to answer a judge's questions."""
    from dnpo.judges.augment import augment

    how, seed = run.augment, derive(run.seed, "augment")
    assert how is not None, "lessons"
    policy = run.policy(task.inputs)
    rows = how.make_rows(policy, how.make_pairs(read_split(task.inputs["prompts"], "train").prompts, seed))
    policy.model = run.model.lora.on(policy.model, derive(seed, "adapter"))
    history = augment(policy, rows, how.optimisation, seed=seed, folder=task.folder, report=task.report)
    return {"questions": len(rows), **write_trained(policy, history, task.folder, task.inputs["policy"] / "policy")}
