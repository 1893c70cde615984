"""The algorithm: K iterations of five verbs.

    generate  →  judge  →  label  →  optimise  →  evaluate

The verbs are stages (``stages.py``): the chain is laid out first, so that it can be looked at as a plan, and then run
stage by stage through the store, which skips what is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dnpo.stages import verbs as stages
from dnpo.stages.measures import measures
from dnpo.stages.verbs import Run
from dnpo.store import Stage


@dataclass(frozen=True)
class Iteration:
    """One iteration's stages; ``k`` is −1 for what comes before the first iteration."""

    k: int
    prompts: Stage
    policy: Stage
    evaluation: Stage
    responses: Stage | None = None
    verdicts: Stage | None = None
    pairs: Stage | None = None
    reference: Stage | None = None
    like: Stage | None = None
    measures: tuple[Stage, ...] = ()

    @property
    def stages(self) -> list[Stage]:
        """Its own stages, in the order in which they run."""
        first = [self.prompts] if self.k < 0 else []
        data = [*first, self.responses, self.verdicts, self.pairs]
        own = [*data, self.reference, self.like, self.policy, self.evaluation, *self.measures]
        return [stage for stage in own if stage is not None]


def chain(run: Run) -> Iterator[Iteration]:
    """Lay out a run: fine-tuning, then every iteration on the policy of the one before."""
    prompts = stages.prepare(run)
    policy = stages.fine_tune(run, prompts)
    report = stages.evaluate(run, -1, prompts, policy, None)
    yield Iteration(-1, prompts, policy, report, measures=measures(run, -1, prompts, policy, report, None, None))
    for plan in run.plans:
        responses = stages.generate(run, plan, prompts, policy)
        verdicts = stages.judge(run, plan, prompts, responses)
        pairs = stages.label(run, plan, prompts, responses, verdicts)
        reference = stages.reference(run, plan, prompts, policy, pairs)
        like = stages.match(run, plan, prompts, policy, pairs, reference)
        start, policy = policy, stages.train(run, plan, prompts, policy, pairs, reference, like)
        report = stages.evaluate(run, plan.k, prompts, policy, pairs)
        beside = measures(run, plan.k, prompts, policy, report, start, pairs)
        yield Iteration(plan.k, prompts, policy, report, responses, verdicts, pairs, reference, like, beside)
