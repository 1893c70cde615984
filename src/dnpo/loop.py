"""The algorithm: K iterations of five verbs.

    generate  →  judge  →  label  →  optimise  →  evaluate

A verb takes stages and returns a stage (see ``stages/plan.py``) without computing anything. So a run can be inspected
before it starts, finished stages are reused from the store, and runs that begin alike share their first stages.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from dnpo.stages.before import fine_tune, prepare, teach
from dnpo.stages.measures import measure
from dnpo.stages.plan import BEFORE, Iteration, Plan, Run
from dnpo.stages.verbs import (
    arrange,
    evaluate,
    find_caches,
    generate,
    judge,
    label,
    match,
    name_earlier,
    optimise,
    reference,
)
from dnpo.store import Stage


def chain(run: Run) -> Iterator[Iteration]:
    """Lay out fine-tuning, then every iteration."""
    prompts = prepare(run, None)
    initial = fine_tune(run, None, prompts=prompts)
    evaluation = evaluate(run, None, prompts=prompts, policy=initial)
    taught = teach(run, None, prompts=prompts, policy=initial) if run.teaches else initial
    measures = measure(run, None, prompts, initial, evaluation)
    done = [Iteration(BEFORE, prompts, initial, evaluation, measures, taught=taught)]
    yield done[0]
    for plan in run.plans:
        done.append(iterate(run, plan, prompts, done))
        yield done[-1]


def iterate(run: Run, plan: Plan, prompts: Stage, done: Sequence[Iteration]) -> Iteration:
    """Lay out one iteration: the policy answers, a judge scores, pairs are labelled, a policy is trained on them.

    Args:
        done: fine-tuning, and the iterations so far.
    """
    policy, initial = done[-1].policy, done[0].policy
    responses = generate(run, plan, prompts=prompts, policy=policy)
    judges: dict[str, Any] = {"policy": policy, "initial": initial, "taught": done[0].taught}
    verdicts = judge(run, plan, prompts=prompts, responses=responses, **judges)
    labelled = label(run, plan, prompts=prompts, responses=responses, verdicts=verdicts, **judges)

    earlier: dict[str, Any] = {name_earlier(n): each.labelled for n, each in enumerate(reversed(done[1:]), 1)}
    pairs = arrange(run, plan, prompts=prompts, pairs=labelled, initial=initial, **earlier) or labelled

    start = {"previous": policy, "initial": initial, "base": None}[plan.start]
    frozen = {"start": start, "initial": initial, "ema": None, "none": None}[plan.reference]
    scores = reference(run, plan, prompts=prompts, policy=frozen, pairs=pairs)
    given: dict[str, Any] = {"prompts": prompts, "policy": start, "frozen": frozen, "pairs": pairs, "reference": scores}
    like = match(run, plan, **given)
    caches = find_caches(run, plan, prompts, frozen, pairs)
    trained = optimise(run, plan, **given, like=like, caches=caches, initial=initial, taught=done[0].taught)
    if plan.rollout.live and plan.makes_pairs:
        labelled = pairs = trained  # a live training makes its pairs between its steps
    evaluation = evaluate(run, plan, prompts=prompts, policy=trained, pairs=pairs)
    measures = measure(run, plan, prompts, trained, evaluation, start=start, initial=initial, pairs=pairs)
    own = (responses, verdicts, labelled, pairs, scores, like)
    return Iteration(plan.k, prompts, trained, evaluation, measures, *own)
