"""The verbs of a run: each reads its inputs, calls one part, and writes the results.

A stage's result depends only on the settings in the decorator above its function and on the inputs that ``loop.py``
passes. Raise the version when a change of the code changes the results.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo import dsl
from dnpo.data.curriculum import Context, NoCurriculum
from dnpo.data.prompts import All
from dnpo.data.unusable import list_reasons
from dnpo.errors import DataError, Declined, DnpoError, ModelError, SettingsError
from dnpo.judges import judge_responses, tally
from dnpo.optimise.parts import MatchedOffset
from dnpo.policy.base import describe_saved
from dnpo.records import (
    GIVEN,
    Pair,
    Prompt,
    Response,
    Verdict,
    mean_over_steps,
    policy_source,
    read,
    read_all,
    write,
    write_preferences,
)
from dnpo.seeding import derive
from dnpo.settings import part_key
from dnpo.stages.plan import BEFORE, Facts, Plan, Run, Task, only_if, verb
from dnpo.store import Report, Stage, manifest, write_json

if TYPE_CHECKING:
    from dnpo.evaluate import Held
    from dnpo.generate import Sampling
    from dnpo.judges import Judge
    from dnpo.optimise.parts import Cache
    from dnpo.policy.model import Policy


COMPARE = "compare_pairs"  # the method of judges that say how probably one response is better than another

# --- before the first iteration


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
    """Encode the prompts that fit the model, with their responses; write its tokenizer, and its weights if untrained.

    The responses are the human ones, and the rejected ones of the data's own pairs where there are any.
    """
    rows, facts = run.data.read()
    removed = [f"{n:,} {reason.replace('_', ' ')}" for reason, n in facts.get("removed", {}).items() if n]
    if removed:
        such = "".join(f"; {example}" for example in facts.get("examples", []))
        task.report.note(f"rows removed as duplicates: {', '.join(removed)}{such}")
    if "unusable" in facts:
        task.report.note(f"rows that cannot be used are left out: {'; '.join(list_reasons(facts['unusable']))}")
    run.model.base(task.folder / "model", rows["train"])
    policy = run.model.load(task.folder / "model", None, "cpu")
    task.report.begin(sum(map(len, rows.values())), "prompts")
    if run.sft_rows:
        rows = {**rows, **_set_apart(rows["train"], run.sft_rows)}
    for split, these in rows.items():
        facts[split] = _encode(run, policy, these, split, task.folder, task.report)
    return facts


def _set_apart(rows: Sequence[Prompt], count: int) -> dict[str, list[Prompt]]:
    """Set ``count`` rows apart for fine-tuning, chosen by a hash of their ids; the iterations get the others."""
    if count >= len(rows):
        raise SettingsError(f"sft_rows={count}: expected fewer than the {len(rows):,} training rows")
    by_hash = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    apart = {row.id for row in by_hash[:count]}
    return {"sft": [row for row in rows if row.id in apart], "train": [row for row in rows if row.id not in apart]}


def _encode(run: Run, policy: "Policy", rows: list[Prompt], split: str, folder: Path, report: Report) -> dict[str, int]:
    """Encode one split, without the prompts that are too long."""
    from dnpo.policy.tokenizer import human_response

    context = int(getattr(policy.causal_lm.config, "max_position_embeddings", 0) or 10**9)
    longest = min(run.data.max_prompt_tokens, context - run.limit)
    drop = run.data.long_responses == "drop"
    prompts, human, given = [], [], []
    too_long = over = given_over = given_same = 0
    for row in rows:
        prompt_ids, ids = _encode_response(policy, row, row.human, split)
        report.advance()
        if len(prompt_ids) > longest:
            too_long += 1
            continue
        over += len(ids) > run.limit
        if drop and len(ids) > run.limit:
            continue
        rejected = row.rejected
        if rejected is not None:
            rejected_ids = _encode_response(policy, row, rejected, split)[1]
            given_over += len(rejected_ids) > run.limit
            if drop and len(rejected_ids) > run.limit:
                continue
            if rejected_ids[: run.limit] == ids[: run.limit]:
                given_same += 1
                row = replace(row, rejected=None, rejected_score=None)
            else:
                other = replace(row, human=rejected)
                given.append(replace(human_response(policy.tokenizer, other, rejected_ids, run.limit), source=GIVEN))
        prompts.append(replace(row, token_ids=prompt_ids))
        human.append(human_response(policy.tokenizer, row, ids, run.limit))
    if too_long:
        report.note(f"{too_long:,} of {len(rows):,} {split} prompts are longer than {longest} tokens: dropped")
    if over:
        report.note(
            f"{over:,} of {len(rows):,} human responses of {split} are longer than {run.limit} tokens: "
            f"{'dropped with their prompts' if drop else 'cut there'}"
        )
    paired = sum(row.rejected is not None for row in rows)
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
    if rows and not prompts and too_long < len(rows):
        raise DataError(
            f"data.long_responses=drop: all {over:,} human responses of {split} to prompts that fit are "
            f"longer than data.max_response_tokens={run.limit}; raise it, or give data.long_responses=cut"
            if not given_over
            else f"data.long_responses=drop: no pair of {split} to a prompt that fits has both responses within "
            f"data.max_response_tokens={run.limit}; raise it, or give data.long_responses=cut"
        )
    if not prompts:
        raise DataError(
            f"data: none of the {len(rows):,} {split} prompts fits into {longest} tokens (the smaller of "
            f"data.max_prompt_tokens={run.data.max_prompt_tokens} and the model's context of {context} less "
            f"data.max_response_tokens={run.limit}); change these, or take other data"
            if rows
            else f"data: there are no {split} prompts"
        )
    write(folder / f"{split}.parquet", prompts, Prompt)
    write(folder / f"{split}-human.parquet", human, Response)
    done = "dropped" if drop else "cut"
    facts = {"rows": len(prompts), "too_long": too_long, f"human_{done}": over}
    if paired:
        write(folder / f"{split}-given.parquet", given, Response)
        facts |= {"pairs": len(given), f"given_{done}": given_over, "given_same": given_same}
    return facts


def _encode_response(policy: "Policy", row: Prompt, response: str, split: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of a response to it; an error names the row."""
    from dnpo.policy.tokenizer import encode

    try:
        return encode(policy.tokenizer, row.messages, response, policy.stop_ids)
    except ModelError as error:
        raise ModelError(f"row {row.id} of {split}: {error}") from error


@verb(
    "sft",
    3,
    lambda run, plan: {"sft": part_key(run.sft), "lora": part_key(run.model.lora), "seed": run.seed},
    title="supervised fine-tuning",
)
def fine_tune(run: Run, plan: None, task: Task) -> Facts:
    """Fine-tune the base model on the human responses."""
    from dnpo.optimise import preference

    rows = read_split(task.inputs["prompts"], "sft" if run.sft_rows else "train")
    seed = derive(run.seed, "sft")
    policy = run.policy(task.inputs)
    policy.model = run.model.lora.on(policy.model, derive(seed, "adapter"))
    triples = [(p.id, p.token_ids, r.token_ids) for p, r in zip(*rows, strict=True)]
    history = preference.fine_tune(policy, triples, run.sft, seed=seed, folder=task.folder, report=task.report)
    return _write_trained(policy, history, task.folder, None)


@verb(
    "augment",
    1,
    lambda run, plan: {"augment": part_key(run.augment), "lora": part_key(run.model.lora), "seed": run.seed},
    title="lessons for the judge",
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
    return {"questions": len(rows), **_write_trained(policy, history, task.folder, task.inputs["policy"] / "policy")}


# --- one iteration


def _prompts_of(plan: Plan) -> dict[str, Any]:
    """The part of a key that says which prompts an iteration uses; nothing if it uses all."""
    return {} if isinstance(plan.prompts, All) else {"prompts": part_key(plan.prompts)}


@only_if(lambda plan: plan.rollout.generates)
@verb(
    "generate",
    3,
    lambda run, plan: {"generate": part_key(plan.rollout), "seed": run.seed, "iteration": plan.k, **_selection(plan)},
)
def generate(run: Run, plan: Plan, task: Task) -> Facts:
    """Generate the current policy's responses to the iteration's prompts."""
    from dnpo.generate import Ahead, hf

    assert isinstance(plan.rollout, Ahead), "a rollout that generates"
    responses = hf.generate(
        run.policy(task.inputs),
        _read_train(plan, task.inputs["prompts"]).prompts,
        plan.rollout,
        source=policy_source(plan.k),
        limit=run.limit,
        seed=derive(run.seed, "generate", plan.k),
        folder=task.folder,
        report=task.report,
    )
    cut = sum(r.finish == "length" for r in responses)
    return {"responses": len(responses), "cut": cut, "tokens": sum(r.tokens for r in responses)}


def _selection(plan: Plan) -> dict[str, Any]:
    """The part of a key that says which prompts an iteration uses; nothing if it uses all."""
    return {} if isinstance(plan.prompts, All) else {"prompts": part_key(plan.prompts)}


def _given(plan: Plan) -> dict[str, Any]:
    """The part of a key that takes the place of generated responses; nothing if there are such."""
    return {} if plan.rollout.generates else {**_selection(plan), "iteration": plan.k}


@only_if(lambda plan: plan.dsl.needs_scores)
@verb(
    "judge",
    1,
    lambda run, plan: {
        "judge": part_key(plan.judge),
        **({} if plan.dsl.admits_human else {"human": False}),
        **_given(plan),
    },
    reads=lambda plan: {"prompts", "responses", *plan.judge.reads_policies},
)
def judge(run: Run, plan: Plan, task: Task) -> Facts:
    """Judge the candidates for pairs: the iteration's responses, and the human ones if they are admitted."""
    train = _read_train(plan, task.inputs["prompts"])
    responses = [*(train.human if plan.dsl.admits_human else ()), *_read_candidates(plan, task.inputs)]
    verdicts = judge_responses(_ready(run, plan, task), train.prompts, responses, run.ledger, task.report)
    write(task.folder / "verdicts.parquet", verdicts, Verdict)
    return tally(verdicts)


def _ready(run: Run, plan: Plan, task: Task) -> "Judge":
    """The judge with the policies that it reads, if it reads any."""
    names = sorted(plan.judge.reads_policies)
    return plan.judge.with_policies({name: run.policy(task.inputs, name) for name in names}) if names else plan.judge


@verb(
    "pairs",
    1,
    lambda run, plan: {
        "dsl": part_key(plan.dsl),
        **({} if isinstance(plan.strength, dsl.HardLabels) else {"strength": part_key(plan.strength)}),
        **({"judge": part_key(plan.judge)} if plan.strength.asks else {}),
        **_given(plan),
    },
    title="label",
    reads=lambda plan: {"prompts", "responses", "verdicts", *(plan.judge.reads_policies if plan.strength.asks else ())},
)
def label(run: Run, plan: Plan, task: Task) -> Facts:
    """Label pairs: which response is chosen, which is rejected, and how sure that is."""
    train = _read_train(plan, task.inputs["prompts"])
    verdicts = read(task.inputs["verdicts"] / "verdicts.parquet", Verdict) if "verdicts" in task.inputs else []
    generated = _read_candidates(plan, task.inputs)
    pairs, counts = dsl.label(plan.dsl, train.prompts, train.human, generated, verdicts, plan.k)
    if not pairs:
        raise DataError(f"iteration {plan.k}: no pair is left to train on: {dsl.explain(counts)}")
    if not isinstance(plan.strength, dsl.HardLabels):
        compare = getattr(_ready(run, plan, task), COMPARE) if plan.strength.asks else None
        pairs = dsl.with_strengths(pairs, plan.strength({row.id: row for row in train.prompts}, pairs, compare))
        counts["strength"] = sum(pair.strength for pair in pairs) / len(pairs)
    write(task.folder / "pairs.parquet", pairs, Pair)
    write_preferences(task.folder / "pairs.jsonl", pairs)
    return dict(counts)


@only_if(lambda plan: not isinstance(plan.curriculum, NoCurriculum))
@verb(
    "curriculum",
    1,
    lambda run, plan: {"curriculum": part_key(plan.curriculum), "seed": run.seed, "iteration": plan.k},
    reads=lambda plan: {
        *("prompts", "pairs", *map(name_earlier, range(1, plan.curriculum.reads_history + 1))),
        *(["initial"] if plan.curriculum.embeds else []),
    },
)
def arrange(run: Run, plan: Plan, task: Task) -> Facts:
    """Choose what is trained on, and with what weights, of this iteration's pairs and those of earlier ones."""
    inputs = task.inputs
    pairs = read(inputs["pairs"] / "pairs.parquet", Pair)
    earlier = map(name_earlier, range(1, plan.curriculum.reads_history + 1))
    history = [read(inputs[name] / "pairs.parquet", Pair) for name in earlier if name in inputs]

    def embed(some: Sequence[Pair]) -> Any:
        from dnpo.data.curriculum.embedding import embed_by_policy

        return embed_by_policy(run.policy(inputs, "initial"), task.report)(some)

    rows, facts = plan.curriculum(pairs, history, Context(derive(run.seed, "curriculum", plan.k), plan.k, embed))
    if not rows:
        raise DataError(f"iteration {plan.k}: curriculum=… leaves no pair to train on ({facts})")
    write(task.folder / "pairs.parquet", rows, Pair)
    write_preferences(task.folder / "pairs.jsonl", rows)
    return {**facts, "trained": len(rows), "earlier": sum(pair.iteration != plan.k for pair in rows)}


def name_earlier(number: int) -> str:
    """The name of the input with the pairs of the iteration that lies this many back."""
    return f"pairs_{number}"


def _training_key(run: Run, plan: Plan) -> dict[str, Any]:
    return {
        "trainer": part_key(plan.trainer),
        "objective": part_key(plan.objective),
        "npo": part_key(plan.npo),
        "lora": part_key(run.model.lora),
        "seed": run.seed,
        "iteration": plan.k,
    }


@verb(
    "optimise",
    4,
    _training_key,
    reads=lambda plan: {
        *("prompts", "policy", "pairs", "reference", "like"),
        *(["frozen"] if plan.reference != "start" and reads_frozen(plan) else []),
    },
)
def optimise(run: Run, plan: Plan, task: Task) -> Facts:
    """Train the policy on the pairs, against the reference if the objective reads one."""
    from dnpo.optimise import preference
    from dnpo.optimise.reference import KeptHidden, read_scores

    inputs = task.inputs
    seed = derive(run.seed, "optimise", plan.k)
    start = run.policy(inputs)
    frozen = run.policy(inputs, "frozen") if "frozen" in inputs else None
    for name in {"reference", "hidden"} & set(inputs):
        _same_weights(inputs[name], start if plan.reference == "start" else frozen)
    rows = read(inputs["pairs"] / "pairs.parquet", Pair)
    reference = read_scores(inputs["reference"], len(rows)) if "reference" in inputs else None
    expected = None
    if reference is None or plan.reference != "start":
        how = (plan.trainer, plan.objective)
        expected = preference.score_first(start, rows, *how, seed=seed, folder=task.folder)
    start.model = run.model.lora.on(start.model, derive(seed, "adapter"))
    entries, width = start.head.weight_VH.shape
    noise = plan.npo
    if isinstance(noise, MatchedOffset):
        noise = noise.at(_mean_shift(inputs["like"]))
    history = preference.optimise(
        start,
        rows,
        reference,
        plan.trainer,
        noise=noise.module(width, entries),
        objective=plan.objective,
        beta=float(plan.objective.beta),
        seed=seed,
        folder=task.folder,
        report=task.report,
        hidden=KeptHidden(inputs["hidden"]) if "hidden" in inputs else None,
        frozen=frozen,
        expected=expected,
    )
    tokens = {"tokens": preference.count_tokens(rows, plan.trainer, plan.objective, seed)}
    before = inputs["policy"] / "policy" if "policy" in inputs else None
    return {**_write_trained(start, history, task.folder, before), **tokens}


def reads_frozen(plan: Plan) -> bool:
    """Whether a training reads more of its reference than log-probabilities: hidden states, for noise or the loss."""
    return plan.npo.reads_states or getattr(plan.objective, "needs_states", False)


def _same_weights(folder: Path, policy: "Policy | None") -> None:
    """Refuse an input of other weights than the reference's, if these are loaded."""
    made_by = manifest(folder)["facts"]["weights"]
    if policy is not None and made_by != policy.fingerprint():
        raise DnpoError(
            f"store: {folder} was made by other weights than this iteration starts from (theirs have the hash "
            f"{made_by[:16]}, these {policy.fingerprint()[:16]}); remove that folder to compute it again"
        )


def _evaluation_key(run: Run, plan: Plan | None) -> dict[str, Any]:
    return {
        "eval": part_key(run.eval),
        "judge": part_key(run.judge),
        "generate": part_key(run.generate),
        **(
            {}
            if part_key(sampling_of(run, plan)) == part_key(run.generate)
            else {"new": part_key(sampling_of(run, plan))}
        ),
        "seed": run.seed,
        "iteration": BEFORE if plan is None else plan.k,
    }


def sampling_of(run: Run, plan: Plan | None) -> "Sampling":
    """How new responses to training prompts are sampled, which are compared with the rejected ones: as these were."""
    from dnpo.generate import Ahead

    return replace(plan.rollout, samples=1) if plan and isinstance(plan.rollout, Ahead) else run.generate


@verb("evaluate", 5, _evaluation_key)
def evaluate(run: Run, plan: Plan | None, task: Task) -> Facts:
    """Measure the policy that this iteration, or fine-tuning, trained."""
    from dnpo.evaluate import metrics

    inputs = task.inputs
    values = metrics.evaluate(
        run.policy(inputs),
        run.eval,
        read_split(inputs["prompts"], run.eval.split),
        run.judge,
        run.ledger,
        run.generate,
        again=sampling_of(run, plan),
        pairs=read(inputs["pairs"] / "pairs.parquet", Pair) if "pairs" in inputs else None,
        train=read_split(inputs["prompts"], "train"),
        source=policy_source(task.k + 1),
        limit=run.limit,
        seed=derive(run.seed, "evaluate"),
        folder=task.folder,
        report=task.report,
    )
    write_json(task.folder / "metrics.json", values)
    return values


# --- inputs of an iteration's training


@only_if(lambda plan: plan.reference != "none" and getattr(plan.objective, "reads_reference", True))
@verb("reference", 1, lambda run, plan: {"autocast": plan.trainer.autocast})
def reference(run: Run, plan: Plan, task: Task) -> Facts:
    """Compute the reference's log-probabilities of the pairs."""
    from dnpo.optimise.reference import score

    start, rows = run.policy(task.inputs), read(task.inputs["pairs"] / "pairs.parquet", Pair)
    score(start, rows, autocast=plan.trainer.autocast, folder=task.folder, report=task.report)
    return {"pairs": len(rows), "weights": start.fingerprint()}


def keeping(plan: Plan) -> tuple["Cache", bool]:
    """Whether the reference's hidden states are kept, and whether those of chosen tokens too."""
    modes = {plan.npo.cache_hidden if plan.npo.reads_states else "off", getattr(plan.objective, "keeps_states", "off")}
    mode: Cache = "on" if "on" in modes else "auto" if "auto" in modes else "off"
    return mode, getattr(plan.objective, "keeps_states", "off") != "off"


@verb(
    "hidden",
    1,
    lambda run, plan: {"autocast": plan.trainer.autocast, **({"both": True} if keeping(plan)[1] else {})},
    title="hidden states",
)
def keep_hidden(run: Run, plan: Plan, task: Task) -> Facts:
    """Keep the reference's hidden states of rejected tokens, or of all completion tokens."""
    from dnpo.optimise import reference

    rows = read(task.inputs["pairs"] / "pairs.parquet", Pair)
    mode, both = keeping(plan)
    if mode == "auto" and plan.trainer.passes(len(rows)) <= 1:
        raise Declined  # a single epoch reads nothing twice
    start = run.policy(task.inputs)
    facts = reference.keep_hidden(
        start,
        rows,
        autocast=plan.trainer.autocast,
        required=mode == "on",
        folder=task.folder,
        report=task.report,
        both=both,
        setting="objective.cache_hidden" if both else "npo.cache_hidden",
    )
    return {**facts, "weights": start.fingerprint()}


def find_aids(run: Run, plan: Plan, prompts: Stage, frozen: Stage | None, pairs: Stage) -> dict[str, Stage]:
    """Lay out the stages that only save work in training: hidden states, if they are read and kept.

    Args:
        frozen: the policy that the reference is; None for the base model.
    """
    if keeping(plan)[0] == "off":
        return {}
    return {"hidden": keep_hidden(run, plan, prompts=prompts, policy=frozen, pairs=pairs)}


def match(run: Run, plan: Plan, *, prompts: Stage, pairs: Stage, **others: Stage | None) -> Stage | None:
    """Lay out the training whose mean shift ``plan.npo`` matches, if any; a run with that noise has the same stage."""
    noisy = with_matched_noise(plan)
    if noisy is None:
        return None
    aids = find_aids(run, noisy, prompts, others["frozen"], pairs)
    stage = optimise(run, noisy, prompts=prompts, pairs=pairs, aids=aids, **others)
    return replace(stage, title=f"iteration {plan.k} · match")


def with_matched_noise(plan: Plan) -> Plan | None:
    """The same plan with the noise that its ``npo`` matches; None if it matches none."""
    like = plan.npo.like
    return None if like is None else replace(plan, npo=like)


# --- files


def read_split(folder: Path, split: str) -> "Held":
    """Read the prompts of a split and the human responses to them."""
    from dnpo.evaluate import Held

    return Held(read(folder / f"{split}.parquet", Prompt), read(folder / f"{split}-human.parquet", Response))


def read_given(folder: Path, split: str) -> list[Response]:
    """Read the rejected responses of the data's own pairs in a split; none where the data have no pairs."""
    path = folder / f"{split}-given.parquet"
    return read(path, Response) if path.is_file() else []


def _read_train(plan: Plan, folder: Path) -> "Held":
    """Read the training prompts that an iteration uses, and the human responses to them."""
    from dnpo.evaluate import Held

    train = read_split(folder, "train")
    used = {row.id for row in plan.prompts(train.prompts, plan.k)}
    rows = [both for both in zip(*train, strict=True) if both[0].id in used]
    return Held([prompt for prompt, _ in rows], [human for _, human in rows])


def _read_candidates(plan: Plan, inputs: Mapping[str, Path]) -> list[Response]:
    """Read an iteration's responses: generated ones, or those that the data's own pairs reject."""
    if "responses" in inputs:
        return read_all(sorted(inputs["responses"].glob("shard-*.parquet")), Response)
    used = {row.id for row in _read_train(plan, inputs["prompts"]).prompts}
    return [response for response in read_given(inputs["prompts"], "train") if response.id in used]


def _write_trained(
    policy: "Policy", history: list[dict[str, float]], folder: Path, earlier: Path | None
) -> dict[str, Any]:
    """Write a trained policy and its step metrics; after a training without steps, the policy it started from.

    The checkpoint is removed last, so a stage that is killed while writing continues from it.
    """
    if history:
        policy.save(folder / "policy", earlier)
    elif earlier is not None:
        shutil.copytree(earlier, folder / "policy", dirs_exist_ok=True)
    else:
        (folder / "policy").mkdir(exist_ok=True)  # empty: the base model itself
    from dnpo.optimise.training import discard_checkpoint

    write_json(folder / "steps.json", history)
    discard_checkpoint(folder)
    facts = {"policy_steps": len(history), "policy": describe_saved(folder / "policy")}
    tenth = history[-max(len(history) // 10, 1) :]
    first = history[: max(len(history) // 10, 1)]
    means = {f"{name} (last tenth)": mean_over_steps(tenth, name) for name in history[-1]} if history else {}
    starts = {f"{name} (first tenth)": mean_over_steps(first, name) for name in history[0]} if history else {}
    return {**facts, **starts, **means}


def _mean_shift(folder: Path) -> float:
    """By how much noise lowered the reference's log-probability of rejected responses, averaged over training steps."""
    steps = json.loads((folder / "steps.json").read_text())
    return mean_over_steps(steps, "npo/shift") if steps else 0.0
