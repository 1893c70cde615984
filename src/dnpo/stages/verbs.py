"""The stages of a run: each reads its inputs, calls one part, and writes what came out.

A function here takes the run's parts and the stages before it and returns a :class:`~dnpo.store.Stage`; nothing is
computed until the store asks for it. What a stage's result depends on stands in its ``settings`` and ``inputs``: raise
its version when a change of the code changes what it computes.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from dnpo import dsl
from dnpo.data import Source
from dnpo.errors import DataError, Declined, DnpoError, SettingsError
from dnpo.evaluate import metrics as evaluation
from dnpo.generate import hf as generation
from dnpo.judges import Judge, judged, tally
from dnpo.judges.asked.ledger import Ledger
from dnpo.optimise import preference as optimise
from dnpo.optimise import reference as references
from dnpo.optimise.parts import MatchedOffset, Noise, Objective, Optimisation, PairOptimisation
from dnpo.optimise.training import discard_checkpoint
from dnpo.policy.base import ModelPart
from dnpo.policy.model import Policy
from dnpo.policy.tokenizer import encode, human_response
from dnpo.records import Pair, Prompt, Response, Verdict, policy_source, read, read_all, write, write_preferences
from dnpo.seeding import derive
from dnpo.settings import part_key
from dnpo.store import Report, Stage, manifest, write_json

T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """A component, and what decides its results."""

    value: T

    @property
    def key(self) -> dict[str, Any]:
        """The settings that decide what it does, as they go into stage keys."""
        return part_key(self.value)


@dataclass(frozen=True)
class Plan:
    """What is in force at iteration ``k``: parts that have not started yet are absent ones here."""

    k: int
    generate: Part[generation.Sampling]
    judge: Part[Judge]
    dsl: Part[dsl.Labeller]
    objective: Part[Objective]
    npo: Part[Noise]
    trainer: Part[PairOptimisation]


@dataclass(frozen=True)
class Run:
    """A whole run as plain values: the parts that hold throughout, and a plan for each iteration."""

    seed: int
    device: str
    data: Part[Source]
    model: Part[ModelPart]
    sft: Part[Optimisation]
    generate: Part[generation.Sampling]
    judge: Part[Judge]
    second_judge: Part[Judge]
    eval: Part[evaluation.Evaluation]
    plans: Sequence[Plan]
    ledger: Ledger
    sft_rows: int = 0

    @property
    def limit(self) -> int:
        """Completion tokens at most, of human and of generated responses alike."""
        return self.data.value.max_response_tokens

    def policy(self, inputs: Mapping[str, Path]) -> Policy:
        """The policy among a stage's inputs, or the base model where there is none."""
        folder = inputs["policy"] / "policy" if "policy" in inputs else None
        return self.model.value.load(inputs["prompts"] / "model", folder, self.device)


def prepare(run: Run) -> Stage:
    """Prompts and human responses that fit the model, encoded; its tokenizer; and weights if it starts from scratch."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        rows, facts = run.data.value.read()
        removed = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in facts.get("removed", {}).items() if n]
        if removed:
            report.note(f"rows removed as duplicates: {', '.join(removed)}")
        run.model.value.base(folder / "model", rows["train"])
        policy = run.model.value.load(folder / "model", None, "cpu")
        report.begin(sum(map(len, rows.values())), "prompts")
        if run.sft_rows:
            rows = {**rows, **_set_apart(rows["train"], run.sft_rows)}
        for split, these in rows.items():
            facts[split] = _encode(run, policy, these, split, folder, report)
        return facts

    settings = {
        "data": run.data.key,
        "model": run.model.key,
        "max_prompt_tokens": run.data.value.max_prompt_tokens,
        "max_response_tokens": run.limit,
        **({"long_responses": "drop"} if run.data.value.long_responses == "drop" else {}),
        **({"sft_rows": run.sft_rows} if run.sft_rows else {}),
    }
    return Stage("prompts", "prompts", 2, settings, {}, work)


def _set_apart(rows: Sequence[Prompt], count: int) -> dict[str, list[Prompt]]:
    """So many rows for fine-tuning alone, drawn by a hash of their ids, and the others for the iterations."""
    if count >= len(rows):
        raise SettingsError(f"sft_rows={count}: expected fewer than the {len(rows):,} training rows")
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    apart = {row.id for row in by_hash[:count]}
    return {"sft": [row for row in rows if row.id in apart], "train": [row for row in rows if row.id not in apart]}


def _encode(run: Run, policy: Policy, rows: list[Prompt], split: str, folder: Path, report: Report) -> dict[str, int]:
    """Encode one split, without what is too long."""
    context = int(getattr(policy.causal_lm.config, "max_position_embeddings", 0) or 10**9)
    longest = min(run.data.value.max_prompt_tokens, context - run.limit)
    drop = run.data.value.long_responses == "drop"
    prompts, human = [], []
    too_long = over = 0
    for row in rows:
        prompt_ids, ids = encode(policy.tokenizer, row.messages, row.human, policy.stop_ids)
        report.advance()
        if len(prompt_ids) > longest:
            too_long += 1
            continue
        over += len(ids) > run.limit
        if drop and len(ids) > run.limit:
            continue
        prompts.append(Prompt(row.id, row.messages, row.human, row.family, row.answer, row.needs, prompt_ids))
        human.append(human_response(policy.tokenizer, row, ids, run.limit))
    if too_long:
        report.note(f"{too_long:,} of {len(rows):,} {split} prompts are longer than {longest} tokens: dropped")
    if over:
        report.note(
            f"{over:,} of {len(rows):,} human responses of {split} are longer than {run.limit} tokens: "
            f"{'dropped with their prompts' if drop else 'cut there'}"
        )
    if rows and not prompts and too_long < len(rows):
        raise DataError(
            f"data.long_responses=drop: all {over:,} human responses of {split} to prompts that fit are longer than "
            f"data.max_response_tokens={run.limit}; raise it, or give data.long_responses=cut"
        )
    if not prompts:
        raise DataError(
            f"data: none of the {len(rows):,} {split} prompts fits into {longest} tokens (the smaller of "
            f"data.max_prompt_tokens={run.data.value.max_prompt_tokens} and the model's context of {context} less "
            f"data.max_response_tokens={run.limit}); change these, or take other data"
            if rows
            else f"data: there are no {split} prompts"
        )
    write(folder / f"{split}.parquet", prompts, Prompt)
    write(folder / f"{split}-human.parquet", human, Response)
    return {"rows": len(prompts), "too_long": too_long, f"human_{'dropped' if drop else 'cut'}": over}


def fine_tune(run: Run, prompts: Stage) -> Stage:
    """The base model, fine-tuned on the human responses."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        rows = held(inputs["prompts"], "sft" if run.sft_rows else "train")
        seed = derive(run.seed, "sft")
        policy = run.policy(inputs)
        policy.model = run.model.value.lora.on(policy.model, derive(seed, "adapter"))
        triples = [(p.id, p.token_ids, r.token_ids) for p, r in zip(*rows, strict=True)]
        history = optimise.fine_tune(policy, triples, run.sft.value, seed=seed, folder=folder, report=report)
        return _trained(policy, history, folder, None)

    settings = {"sft": run.sft.key, "lora": run.model.value.lora.identity(), "seed": run.seed}
    return Stage("sft", "supervised fine-tuning", 2, settings, {"prompts": prompts}, work)


def generate(run: Run, plan: Plan, prompts: Stage, policy: Stage) -> Stage:
    """One response of the current policy to each training prompt."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        responses = generation.generate(
            run.policy(inputs),
            read(inputs["prompts"] / "train.parquet", Prompt),
            plan.generate.value,
            source=policy_source(plan.k),
            limit=run.limit,
            seed=derive(run.seed, "generate", plan.k),
            folder=folder,
            report=report,
        )
        return {"responses": len(responses), "cut": sum(r.finish == "length" for r in responses)}

    settings = {"generate": plan.generate.key, "seed": run.seed, "iteration": plan.k}
    return Stage(
        "generate", f"iteration {plan.k} · generate", 2, settings, {"prompts": prompts, "policy": policy}, work
    )


def judge(run: Run, plan: Plan, prompts: Stage, responses: Stage) -> Stage | None:
    """A verdict on the human and on the generated response to each training prompt; none where nobody asks for it."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        train = held(inputs["prompts"], "train")
        generated = _responses(inputs["responses"])
        verdicts = judged(plan.judge.value, train.prompts, [*train.human, *generated], run.ledger, report)
        write(folder / "verdicts.parquet", verdicts, Verdict)
        return tally(verdicts)

    if not plan.dsl.value.needs_scores:
        return None
    inputs = {"prompts": prompts, "responses": responses}
    return Stage("judge", f"iteration {plan.k} · judge", 1, {"judge": plan.judge.key}, inputs, work)


def label(run: Run, plan: Plan, prompts: Stage, responses: Stage, verdicts: Stage | None) -> Stage:
    """Pairs: who is chosen and who is rejected."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        train = held(inputs["prompts"], "train")
        said = read(inputs["verdicts"] / "verdicts.parquet", Verdict) if "verdicts" in inputs else []
        pairs, counts = dsl.label(plan.dsl.value, train.prompts, train.human, _responses(inputs["responses"]), said)
        if not pairs:
            raise DataError(f"iteration {plan.k}: no pair is left to train on: {counts}")
        write(folder / "pairs.parquet", pairs, Pair)
        write_preferences(folder / "pairs.jsonl", pairs)
        return dict(counts)

    inputs = {"prompts": prompts, "responses": responses} | ({"verdicts": verdicts} if verdicts else {})
    return Stage("pairs", f"iteration {plan.k} · label", 1, {"dsl": plan.dsl.key}, inputs, work)


def reference(run: Run, plan: Plan, prompts: Stage, policy: Stage, pairs: Stage) -> Stage:
    """What the policy says of the pairs before it is trained on them: their log-probabilities."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        start, rows = run.policy(inputs), read(inputs["pairs"] / "pairs.parquet", Pair)
        references.score(start, rows, autocast=plan.trainer.value.autocast, folder=folder, report=report)
        return {"pairs": len(rows), "weights": start.fingerprint()}

    settings = {"autocast": plan.trainer.value.autocast}
    inputs = {"prompts": prompts, "policy": policy, "pairs": pairs}
    return Stage("reference", f"iteration {plan.k} · reference", 1, settings, inputs, work)


def hidden(run: Run, plan: Plan, prompts: Stage, policy: Stage, pairs: Stage) -> Stage | None:
    """The policy's hidden states of rejected tokens before it is trained; none where nobody reads or keeps them."""
    keep = plan.npo.value.cache_hidden

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        rows = read(inputs["pairs"] / "pairs.parquet", Pair)
        if keep == "auto" and plan.trainer.value.passes(len(rows)) <= 1:
            raise Declined  # nothing is read twice
        start = run.policy(inputs)
        facts = references.keep_hidden(
            start,
            rows,
            autocast=plan.trainer.value.autocast,
            required=keep == "on",
            folder=folder,
            report=report,
        )
        return {**facts, "weights": start.fingerprint()}

    if keep == "off":
        return None
    settings = {"autocast": plan.trainer.value.autocast}
    inputs = {"prompts": prompts, "policy": policy, "pairs": pairs}
    return Stage("hidden", f"iteration {plan.k} · hidden states", 1, settings, inputs, work)


def as_matched(plan: Plan) -> Plan | None:
    """The same plan with the noise that its ``npo`` is to match; none where it matches nothing."""
    like = plan.npo.value.like
    return None if like is None else replace(plan, npo=Part(like))


def match(run: Run, plan: Plan, prompts: Stage, policy: Stage, pairs: Stage, scores: Stage) -> Stage | None:
    """The training whose mean shift ``plan.npo`` is to match; the very stage of a run that has its noise."""
    noisy = as_matched(plan)
    if noisy is None:
        return None
    stage = train(run, noisy, prompts, policy, pairs, scores)
    return replace(stage, title=f"iteration {plan.k} · match")


def train(
    run: Run, plan: Plan, prompts: Stage, policy: Stage, pairs: Stage, scores: Stage, like: Stage | None = None
) -> Stage:
    """The policy of the next iteration: trained on the pairs, against the policy it starts from.

    Args:
        like: the training whose mean shift its ``npo`` is to match.
    """
    states = hidden(run, plan, prompts, policy, pairs)

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        seed = derive(run.seed, "optimise", plan.k)
        start = run.policy(inputs)
        for name in {"reference", "hidden"} & set(inputs):
            _same_weights(start, inputs[name])
        start.model = run.model.value.lora.on(start.model, derive(seed, "adapter"))
        rows = read(inputs["pairs"] / "pairs.parquet", Pair)
        entries, width = start.head.weight_VH.shape
        noise = plan.npo.value
        if isinstance(noise, MatchedOffset):
            noise = noise.at(_mean_shift(inputs["like"]))
        history = optimise.optimise(
            start,
            rows,
            references.read_scores(inputs["reference"], len(rows)),
            plan.trainer.value,
            noise=noise.module(width, entries),
            objective=plan.objective.value,
            beta=float(plan.objective.value.beta),
            seed=seed,
            folder=folder,
            report=report,
            hidden=references.KeptHidden(inputs["hidden"]) if "hidden" in inputs else None,
        )
        return _trained(start, history, folder, inputs["policy"] / "policy")

    settings = {
        "trainer": plan.trainer.key,
        "objective": plan.objective.key,
        "npo": plan.npo.key,
        "lora": run.model.value.lora.identity(),
        "seed": run.seed,
        "iteration": plan.k,
    }
    inputs = {"prompts": prompts, "policy": policy, "pairs": pairs, "reference": scores}
    inputs |= {} if like is None else {"like": like}
    aids = {} if states is None else {"hidden": states}
    return Stage("optimise", f"iteration {plan.k} · optimise", 3, settings, inputs, work, aids)


def _same_weights(policy: Policy, folder: Path) -> None:
    """Refuse what other weights have made, whatever its name says."""
    made_by = manifest(folder)["facts"]["weights"]
    if made_by != policy.fingerprint():
        raise DnpoError(
            f"store: {folder} was made by other weights than this iteration starts from (theirs have the hash "
            f"{made_by[:16]}, these {policy.fingerprint()[:16]}); remove that folder, and it is made anew"
        )


def evaluate(run: Run, k: int, prompts: Stage, policy: Stage, pairs: Stage | None) -> Stage:
    """Metrics of a policy; ``k`` is −1 for the one before the first iteration."""

    def work(folder: Path, inputs: Mapping[str, Path], report: Report) -> dict[str, Any]:
        part = run.eval.value
        metrics = evaluation.evaluate(
            run.policy(inputs),
            part,
            held(inputs["prompts"], part.split),
            run.judge.value,
            run.ledger,
            run.generate.value,
            pairs=read(inputs["pairs"] / "pairs.parquet", Pair) if "pairs" in inputs else None,
            train=held(inputs["prompts"], "train"),
            source=policy_source(k + 1),
            limit=run.limit,
            seed=derive(run.seed, "evaluate"),
            folder=folder,
            report=report,
        )
        write_json(folder / "metrics.json", metrics)
        return metrics

    settings = {
        "eval": run.eval.key,
        "judge": run.judge.key,
        "generate": run.generate.key,
        "seed": run.seed,
        "iteration": k,
    }
    inputs = {"prompts": prompts, "policy": policy} | ({"pairs": pairs} if pairs else {})
    title = f"iteration {k} · evaluate" if k >= 0 else "evaluate"
    return Stage("evaluate", title, 4, settings, inputs, work)


def held(folder: Path, split: str) -> evaluation.Held:
    """The prompts of a split, with the human responses to them."""
    return evaluation.Held(read(folder / f"{split}.parquet", Prompt), read(folder / f"{split}-human.parquet", Response))


def _responses(folder: Path) -> list[Response]:
    return read_all(sorted(folder.glob("shard-*.parquet")), Response)


def _trained(policy: Policy, history: list[dict[str, float]], folder: Path, earlier: Path | None) -> dict[str, Any]:
    """Write a trained policy and its step metrics; a training without steps leaves the policy it started from.

    The checkpoint goes last: until everything is written, a killed stage continues from it.
    """
    if history:
        policy.save(folder / "policy", earlier)
    elif earlier is not None:
        shutil.copytree(earlier, folder / "policy", dirs_exist_ok=True)
    else:
        (folder / "policy").mkdir(exist_ok=True)  # empty: the base model itself
    write_json(folder / "steps.json", history)
    discard_checkpoint(folder)
    tenth = history[-max(len(history) // 10, 1) :]
    first = history[: max(len(history) // 10, 1)]
    means = {f"{name} (last tenth)": _mean([row[name] for row in tenth]) for name in history[-1]} if history else {}
    starts = {f"{name} (first tenth)": _mean([row[name] for row in first]) for name in history[0]} if history else {}
    return {"policy_steps": len(history), **starts, **means}


def _mean_shift(folder: Path) -> float:
    """What noise took off the reference's log-probability of rejected responses, mean over a training's steps."""
    steps = json.loads((folder / "steps.json").read_text())
    return _mean([row["npo/shift"] for row in steps]) if steps else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
