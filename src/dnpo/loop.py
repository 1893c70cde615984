"""The algorithm: K iterations of five verbs.

    generate  →  judge  →  label  →  optimise  →  evaluate

A verb takes stages and returns a stage (see ``stages/plan.py``) without computing anything. So a run can be inspected
before it starts, finished stages are reused from the store, and runs with a common beginning share its stages.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dnpo.stages.measures import measure
from dnpo.stages.plan import BEFORE, Plan, Run
from dnpo.stages.verbs import (
    evaluate,
    find_aids,
    fine_tune,
    generate,
    judge,
    label,
    match,
    optimise,
    prepare,
    reference,
)
from dnpo.store import Stage


@dataclass(frozen=True)
class Iteration:
    """The stages of one iteration. ``policy`` is the one that it trained; ``k`` is ``BEFORE`` for fine-tuning."""

    k: int
    prompts: Stage
    policy: Stage
    evaluation: Stage
    measures: tuple[Stage, ...] = ()
    responses: Stage | None = None
    verdicts: Stage | None = None
    pairs: Stage | None = None
    reference: Stage | None = None
    like: Stage | None = None

    @property
    def stages(self) -> list[Stage]:
        """The iteration's own stages, in the order in which they run."""
        first = [self.prompts] if self.k == BEFORE else []
        data = [*first, self.responses, self.verdicts, self.pairs]
        own = [*data, self.reference, self.like, self.policy, self.evaluation, *self.measures]
        return [stage for stage in own if stage is not None]


def chain(run: Run) -> Iterator[Iteration]:
    """Lay out fine-tuning, then every iteration, each starting from the policy of the one before."""
    prompts = prepare(run, None)
    policy = fine_tune(run, None, prompts=prompts)
    evaluation = evaluate(run, None, prompts=prompts, policy=policy)
    yield Iteration(BEFORE, prompts, policy, evaluation, measure(run, None, prompts, policy, evaluation))
    for plan in run.plans:
        iteration = iterate(run, plan, prompts, policy)
        yield iteration
        policy = iteration.policy


def iterate(run: Run, plan: Plan, prompts: Stage, policy: Stage) -> Iteration:
    """Lay out one iteration: the policy answers, a judge scores, pairs are labelled, a policy is trained on them."""
    responses = generate(run, plan, prompts=prompts, policy=policy)
    verdicts = judge(run, plan, prompts=prompts, responses=responses) if plan.dsl.needs_scores else None
    pairs = label(run, plan, prompts=prompts, responses=responses, verdicts=verdicts)

    frozen = reference(run, plan, prompts=prompts, policy=policy, pairs=pairs)
    like = match(run, plan, prompts=prompts, policy=policy, pairs=pairs, reference=frozen)
    aids = find_aids(run, plan, prompts, policy, pairs)
    trained = optimise(run, plan, prompts=prompts, policy=policy, pairs=pairs, reference=frozen, like=like, aids=aids)
    evaluation = evaluate(run, plan, prompts=prompts, policy=trained, pairs=pairs)
    measures = measure(run, plan, prompts, trained, evaluation, start=policy, pairs=pairs)
    return Iteration(plan.k, prompts, trained, evaluation, measures, responses, verdicts, pairs, frozen, like)
