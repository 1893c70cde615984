"""The verbs of an iteration: each reads its inputs, calls one part, and writes the results.

There are the five of ``loop.py``, and three that prepare what training reads: ``arrange`` chooses and weighs pairs,
``reference`` and ``keep_hidden`` compute the reference's numbers.

A stage's result depends only on the settings in the decorator above its function and on the inputs that ``loop.py``
passes. Raise the version when a change of the code changes the results.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo import dsl, ranks
from dnpo.data.curriculum import Context, NoCurriculum
from dnpo.data.prompts import All
from dnpo.errors import DataError, Declined, DnpoError, JudgeError
from dnpo.judges import ask, check_verdicts, tally
from dnpo.optimise.parts import MatchedOffset, MovingAverage
from dnpo.records import HUMAN, Pair, Verdict, mean_over_steps, policy_source
from dnpo.seeding import derive
from dnpo.settings import part_key
from dnpo.stages import files, live
from dnpo.stages.files import (
    load_pairs,
    open_candidates,
    open_split,
    open_train,
    read_split,
    write_preferences,
    write_trained,
)
from dnpo.stages.plan import BEFORE, Facts, Plan, Run, Task, only_if, verb
from dnpo.store import Stage, manifest, write_json
from dnpo.tables import Rows, read, write

if TYPE_CHECKING:
    from dnpo.generate import Sampling
    from dnpo.generate.engines import Engines
    from dnpo.judges import Judge
    from dnpo.optimise.ema import Average
    from dnpo.optimise.npo import NoiseModule
    from dnpo.optimise.parts import Cache, Noise
    from dnpo.policy.model import Policy


COMPARE = "compare_pairs"  # judges with this method compute the probability that one response is the better one


@only_if(lambda plan: plan.rollout.generates and not plan.rollout.live)
@verb(
    "generate",
    3,
    lambda run, plan: {"generate": part_key(plan.rollout), "seed": run.seed, "iteration": plan.k, **_selection(plan)},
    shared=True,
)
def generate(run: Run, plan: Plan, task: Task) -> Facts:
    """Generate the current policy's responses to the iteration's prompts."""
    from dnpo.generate import Ahead, hf

    assert isinstance(plan.rollout, Ahead), "a rollout that generates"
    policy = run.policy(task.inputs)
    with _engines(policy, task) as engines:
        responses = hf.generate(
            policy,
            open_train(plan, task.inputs["prompts"]).prompts,
            plan.rollout,
            source=policy_source(plan.k),
            limit=run.limit,
            seed=derive(run.seed, "generate", plan.k),
            folder=task.folder,
            report=task.report,
            engine=engines.of(plan.rollout),
        )
    cut = sum(finish == "length" for finish in responses.column("finish"))
    counts = {"responses": len(responses), "cut": cut, "tokens": sum(responses.column("tokens"))}
    return counts | engines.finish()


def _engines(policy: "Policy", task: Task) -> "Engines":
    """The engines that sample the policy's responses in a stage."""
    from dnpo.generate.engines import Engines

    saved = task.inputs["policy"] / "policy" if "policy" in task.inputs else None
    return Engines(policy, task.folder, saved, task.report)


def _selection(plan: Plan) -> dict[str, Any]:
    """The part of a key for the iteration's choice of prompts; empty if it uses all."""
    return {} if isinstance(plan.prompts, All) else {"prompts": part_key(plan.prompts)}


def _given(plan: Plan) -> dict[str, Any]:
    """The choice of prompts and the iteration, if responses are given; the key of generated responses has both."""
    return {} if plan.rollout.generates else {**_selection(plan), "iteration": plan.k}


@only_if(lambda plan: plan.dsl.needs_scores and not plan.rollout.live)
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
    train, candidates = open_train(plan, task.inputs["prompts"]), open_candidates(plan, task.inputs)
    judge, total = _ready(run, plan, task), len(candidates) + len(train.human) * plan.dsl.admits_human
    size = files.SIZE if judge.in_shards else len(train.prompts)

    def work(some: files.Candidates) -> files.Shard:
        responses = [*(some.human if plan.dsl.admits_human else ()), *some.others[0]]
        report = task.report if len(responses) == total else files.Portion(task.report, len(responses))
        return {"verdicts": ask(judge, some.prompts, responses, run.ledger, report)}, {}

    made = files.Shards(task.folder, "verdicts", {"verdicts": Verdict})
    task.report.begin(total, "verdicts", total * min(made.done * size, len(train.prompts)) // len(train.prompts))
    made.make(files.divide(train, size, candidates), work)
    verdicts = Rows.open([task.folder / "verdicts.parquet"], Verdict)
    try:
        check_verdicts(judge, verdicts, task.report)
    except JudgeError:
        made.discard()  # responses without a score are judged again
        raise
    return tally(verdicts)


def _ready(run: Run, plan: Plan, task: Task, policy: "Policy | None" = None) -> "Judge":
    """The judge with the policies that it reads, if it reads any.

    Args:
        policy: the current policy, if it is loaded.
    """
    known = {} if policy is None else {"policy": policy}
    found = {name: known.get(name) or run.policy(task.inputs, name) for name in sorted(plan.judge.reads_policies)}
    return plan.judge.with_policies(found) if found else plan.judge


@only_if(lambda plan: not plan.rollout.live)
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
    """Label pairs: decide which response is chosen and which is rejected, and compute how sure the label is.

    Raises:
        DataError: no pair is left.
    """
    train, generated = open_train(plan, task.inputs["prompts"]), open_candidates(plan, task.inputs)
    judged = [task.inputs["verdicts"] / "verdicts.parquet"] if "verdicts" in task.inputs else []
    verdicts = files.split_by_source(Rows.open(judged, Verdict), HUMAN)
    hard = isinstance(plan.strength, dsl.HardLabels)
    compare = getattr(_ready(run, plan, task), COMPARE) if plan.strength.asks else None

    def work(some: files.Candidates) -> files.Shard:
        responses, *scored = some.others
        judged = [verdict for part in scored for verdict in part]
        pairs, counts = dsl.label_some(plan.dsl, some.prompts, some.human, responses, judged, plan.k)
        if not hard:
            of = {prompt.id: prompt for prompt in some.prompts}
            pairs = dsl.with_strengths(pairs, plan.strength(of, pairs, compare))
        task.report.advance(len(some.prompts))
        return {"pairs": pairs}, counts._asdict()

    made = files.Shards(task.folder, "pairs", {"pairs": Pair})
    task.report.begin(len(train.prompts), "prompts", min(made.done * files.SIZE, len(train.prompts)))
    found = made.make(files.divide(train, files.SIZE, generated, *verdicts), work)
    counts = dsl.add_up([dsl.Counts(**each) for each in found])
    pairs = Rows.open([task.folder / "pairs.parquet"], Pair)
    if not pairs:
        raise DataError(f"iteration {plan.k}: no pair is left to train on: {dsl.explain(counts, plan.dsl)}")
    task.report.status(dsl.summarise(counts))
    if not hard:
        counts["strength"] = sum(pairs.column("strength")) / len(pairs)
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
    """Choose the pairs to train on, and their weights, from this iteration's pairs and earlier ones.

    Raises:
        DataError: the curriculum leaves no pair.
    """
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
    """Name the input with the pairs of the iteration that is ``number`` iterations back."""
    return f"pairs_{number}"


@only_if(lambda plan: plan.reads_reference and plan.reference != "ema" and not plan.rollout.live)
@verb("reference", 1, lambda run, plan: {"autocast": plan.trainer.autocast}, shared=True)
def reference(run: Run, plan: Plan, task: Task) -> Facts:
    """Compute the reference's log-probabilities of the pairs."""
    from dnpo.optimise.reference import score

    start, rows = run.policy(task.inputs), load_pairs(task.inputs["pairs"])
    score(start, rows, autocast=plan.trainer.autocast, folder=task.folder, report=task.report)
    return {"pairs": len(rows), "weights": start.fingerprint()}


def cache_mode(plan: Plan) -> tuple["Cache", bool]:
    """Whether the reference's hidden states are kept, and whether they include the states of chosen tokens."""
    modes = {plan.npo.cache_hidden if plan.npo.reads_states else "off", getattr(plan.objective, "keeps_states", "off")}
    mode: Cache = "on" if "on" in modes else "auto" if "auto" in modes else "off"
    return mode, getattr(plan.objective, "keeps_states", "off") != "off"


@verb(
    "hidden",
    1,
    lambda run, plan: {"autocast": plan.trainer.autocast, **({"both": True} if cache_mode(plan)[1] else {})},
    title="hidden states",
    shared=True,
)
def keep_hidden(run: Run, plan: Plan, task: Task) -> Facts:
    """Keep the reference's hidden states of rejected tokens, or of all completion tokens."""
    from dnpo.optimise import reference

    rows = load_pairs(task.inputs["pairs"])
    mode, both = cache_mode(plan)
    if mode == "auto" and plan.trainer.passes(len(rows)) <= 1:
        raise Declined  # in a single epoch nothing is read twice
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


def _training_key(run: Run, plan: Plan) -> dict[str, Any]:
    average = {"ema": part_key(plan.ema), "reference": plan.reference} if plan.reads_average else {}
    return {
        "trainer": part_key(plan.trainer),
        "objective": part_key(plan.objective),
        "npo": part_key(plan.npo),
        "lora": part_key(run.model.lora),
        "seed": run.seed,
        "iteration": plan.k,
        **average,
        **(_live_key(plan) if plan.rollout.live else {}),
    }


def _live_key(plan: Plan) -> dict[str, Any]:
    """The settings that determine the pairs made in training."""
    asked = plan.judges or plan.strength.asks
    return {
        "rollout": part_key(plan.rollout),
        "reference": plan.reference,
        **({"judge": part_key(plan.judge)} if asked else {}),
        **({"dsl": part_key(plan.dsl), "strength": part_key(plan.strength)} if plan.makes_pairs else {}),
        **_selection(plan),
    }


def _training_reads(plan: Plan) -> set[str]:
    """The names of the inputs that a training reads, among those that ``loop.py`` passes."""
    always = {"prompts", "policy"}
    if not plan.rollout.live:
        own = reads_frozen(plan) and plan.reference not in ("start", "ema")
        return always | {"pairs", "reference", "like"} | ({"frozen"} if own else set())
    judging = plan.judge.reads_policies if plan.judges or plan.strength.asks else frozenset()
    return always | judging | ({"frozen"} if plan.reads_reference and plan.reference == "initial" else set())


@verb("optimise", 4, _training_key, reads=_training_reads, shared=True)
def optimise(run: Run, plan: Plan, task: Task) -> Facts:
    """Train the policy on the pairs, against the reference if the objective reads one."""
    seed = derive(run.seed, "optimise", plan.k)
    start = run.policy(task.inputs)
    before = task.inputs["policy"] / "policy" if "policy" in task.inputs else None
    train = _train_live if plan.rollout.live else _train_on_given
    history, facts = train(run, plan, task, start, seed)
    flop = facts["tokens"] * start.count_flop()
    found = {**write_trained(start, history, task.folder, before), **facts, "flop": flop}
    live.clear(task.folder)
    return found


def _train_on_given(
    run: Run, plan: Plan, task: Task, start: "Policy", seed: int
) -> tuple[list[dict[str, float]], Facts]:
    """Train on pairs that were made before training."""
    from dnpo.optimise import preference
    from dnpo.optimise.reference import KeptHidden, read_scores

    inputs = task.inputs
    frozen = run.policy(inputs, "frozen") if "frozen" in inputs else None
    for name in {"reference", "hidden"} & set(inputs):
        _same_weights(inputs[name], start if plan.reference == "start" else frozen)
    rows = load_pairs(inputs["pairs"])
    reference = read_scores(inputs["reference"], len(rows)) if "reference" in inputs else None
    expected = None
    if reference is None or plan.reference != "start":  # the check before the first step needs the policy's numbers
        how = (plan.trainer, plan.objective)
        expected = preference.score_first(start, rows, *how, seed=seed, folder=task.folder)
    start.model = run.model.lora.on(start.model, derive(seed, "adapter"))
    noise = plan.npo
    if isinstance(noise, MatchedOffset):
        noise = noise.at(_mean_shift(inputs["like"]))
    facts: Facts = {}
    history = preference.optimise(
        start,
        rows,
        reference,
        plan.trainer,
        noise=_make(noise, start),
        objective=plan.objective,
        beta=float(plan.objective.beta),
        seed=seed,
        folder=task.folder,
        report=task.report,
        hidden=KeptHidden(inputs["hidden"]) if "hidden" in inputs else None,
        frozen=frozen,
        expected=expected,
        average=_average(plan, start),
        reads_average=plan.reference == "ema",
        facts=facts,
    )
    tokens = preference.count_tokens(rows, plan.trainer, plan.objective, seed, len(history))
    return history, {"tokens": tokens, **facts}


def _train_live(run: Run, plan: Plan, task: Task, start: "Policy", seed: int) -> tuple[list[dict[str, float]], Facts]:
    """Train on what the policy generates in training."""
    opened = open_train(plan, task.inputs["prompts"])
    train = opened._replace(prompts=list(opened.prompts), human=list(opened.human))  # rollouts read it in another order
    judge = _ready(run, plan, task, start) if plan.judges or plan.strength.asks else plan.judge
    start.model = run.model.lora.on(start.model, derive(seed, "adapter"))
    frozen = None
    if plan.reads_reference and plan.reference != "ema":
        frozen = run.policy(task.inputs, "frozen") if plan.reference == "initial" else start.reference()
    own: dict[str, Any] = {"judge": judge, "frozen": frozen, "seed": seed}
    if not plan.makes_pairs:
        return live.train_on_responses(run, plan, task, train, start, **own)
    average, noise = _average(plan, start), _make(plan.npo, start)
    return live.train_on_pairs(run, plan, task, train, start, **own, average=average, noise=noise)


def _make(noise: "Noise", policy: "Policy") -> "NoiseModule":
    """Make noise on a reference of the policy's size."""
    entries, width = policy.head.weight_VH.shape
    return noise.module(width, entries)


def _average(plan: Plan, policy: "Policy") -> "Average | None":
    """The moving average of the policy in training, if anything reads it."""
    from dnpo.optimise.ema import Average

    if not plan.reads_average:
        return None
    assert isinstance(plan.ema, MovingAverage), "ema=on"
    return Average(policy, plan.ema.decay, plan.ema.every)


def reads_frozen(plan: Plan) -> bool:
    """Whether a training reads hidden states of its reference, for noise or the loss, besides log-probabilities."""
    return plan.npo.reads_states or getattr(plan.objective, "needs_states", False)


def _same_weights(folder: Path, policy: "Policy | None") -> None:
    """Check that an input was made with the reference's weights, if these are loaded."""
    made_by = manifest(folder)["facts"]["weights"]
    if policy is not None and made_by != policy.fingerprint():
        raise DnpoError(
            f"store: {folder} was made by other weights than this iteration starts from (their hash is "
            f"{made_by[:16]}, these {policy.fingerprint()[:16]}); remove that folder to compute it again"
        )


def _mean_shift(folder: Path) -> float:
    """The mean decrease, over training steps, of the reference's log-probability of rejected responses by noise."""
    steps = json.loads((folder / "steps.json").read_text())
    return mean_over_steps(steps, "npo/shift") if steps else 0.0


def find_caches(run: Run, plan: Plan, prompts: Stage, frozen: Stage | None, pairs: Stage | None) -> dict[str, Stage]:
    """Lay out the stages that only save work in training: hidden states, if they are read and kept.

    Args:
        frozen: the reference; None for the base model.
    """
    if cache_mode(plan)[0] == "off" or plan.rollout.live or plan.reference == "ema":
        return {}
    return {"hidden": keep_hidden(run, plan, prompts=prompts, policy=frozen, pairs=pairs)}


def match(run: Run, plan: Plan, *, prompts: Stage, pairs: Stage | None, **others: Stage | None) -> Stage | None:
    """Lay out the training whose mean shift ``plan.npo`` matches, if any; a run with that noise has the same stage."""
    noisy = with_matched_noise(plan)
    if noisy is None:
        return None
    caches = find_caches(run, noisy, prompts, others["frozen"], pairs)
    stage = optimise(run, noisy, prompts=prompts, pairs=pairs, caches=caches, **others)
    return replace(stage, title=f"iteration {plan.k} · match")


def with_matched_noise(plan: Plan) -> Plan | None:
    """The same plan with the noise that its ``npo`` matches; None if it matches no other noise."""
    like = plan.npo.like
    return None if like is None else replace(plan, npo=like)


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
    """How to sample new responses to training prompts: like the rejected responses, with which they are compared."""
    from dnpo.generate import Ahead, Live

    if plan is None or not isinstance(plan.rollout, Ahead):
        return run.generate
    return plan.rollout.ahead() if isinstance(plan.rollout, Live) else replace(plan.rollout, samples=1)


@verb("evaluate", 5, _evaluation_key, shared=True)
def evaluate(run: Run, plan: Plan | None, task: Task) -> Facts:
    """Measure the policy that this iteration, or fine-tuning, trained."""
    from dnpo.evaluate import metrics

    inputs = task.inputs
    policy = run.policy(inputs)
    engines = _engines(policy, task)
    values = metrics.evaluate(
        policy,
        run.eval,
        read_split(inputs["prompts"], run.eval.split),
        run.judge,
        run.ledger,
        run.generate,
        again=sampling_of(run, plan),
        pairs=Rows.open([inputs["pairs"] / "pairs.parquet"], Pair) if "pairs" in inputs else None,
        train=open_split(inputs["prompts"], "train"),
        source=policy_source(task.k + 1),
        limit=run.limit,
        seed=derive(run.seed, "evaluate"),
        folder=task.folder,
        report=task.report,
        engines=engines,
    )
    if ranks.leads():
        values |= {f"eval/{name}": value for name, value in engines.finish().items()}
        write_json(task.folder / "metrics.json", values)
    return values
