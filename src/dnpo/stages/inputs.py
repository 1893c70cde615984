"""What training reads: a curriculum's choice of pairs, the reference's numbers, and a training to match.

These are verbs like those in ``verbs.py``; ``loop.py`` calls them between labelling and training.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dnpo.data.curriculum import Context, NoCurriculum
from dnpo.errors import DataError, Declined
from dnpo.records import Pair, read, write, write_preferences
from dnpo.seeding import derive
from dnpo.settings import part_key
from dnpo.stages.files import load_pairs
from dnpo.stages.plan import Facts, Plan, Run, Task, only_if, verb
from dnpo.stages.verbs import optimise
from dnpo.store import Stage

if TYPE_CHECKING:
    from dnpo.optimise.parts import Cache


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


def find_aids(run: Run, plan: Plan, prompts: Stage, frozen: Stage | None, pairs: Stage | None) -> dict[str, Stage]:
    """Lay out the stages that only save work in training: hidden states, if they are read and kept.

    Args:
        frozen: the reference; None for the base model.
    """
    if cache_mode(plan)[0] == "off" or plan.rollout.live or plan.reference == "ema":
        return {}
    return {"hidden": keep_hidden(run, plan, prompts=prompts, policy=frozen, pairs=pairs)}


def match(run: Run, plan: Plan, *, prompts: Stage, pairs: Stage | None, **others: Stage | None) -> Stage | None:
    """Lay out the training whose mean shift ``plan.npo`` matches, if any; a run with that noise shares the stage."""
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
