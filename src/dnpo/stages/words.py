"""Check that the words of a plan go together, before anything is computed.

Every place of an iteration is filled by a part of its own choice (see :class:`dnpo.stages.plan.Plan`); some
combinations have no meaning. The data, which are read later, are checked by the gate.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dnpo.errors import SettingsError
from dnpo.optimise.parts import NoNoise
from dnpo.policy.base import Scratch
from dnpo.stages.plan import Plan
from dnpo.stages.verbs import COMPARE

if TYPE_CHECKING:
    from dnpo.evaluate import Evaluation
    from dnpo.judges import Judge
    from dnpo.optimise.parts import Noise
    from dnpo.policy.base import ModelPart


def check_words(plans: Sequence[Plan], model: "ModelPart", never: "Noise | None" = None) -> None:
    """Refuse plans whose words contradict each other.

    Args:
        plans: the plans of all iterations.
        model: the model that the run begins with.
        never: noise that is asked for, and starts after the last iteration.

    Raises:
        SettingsError: names the settings.
    """
    for plan in plans:
        try:
            _check(plan, plans, model)
        except SettingsError as error:
            where = f" (in iteration {plan.k} of {len(plans)})" if len(plans) > 1 else ""
            raise SettingsError(f"{error}{where}") from None
    if never is not None:
        _check_objective(replace(plans[-1], npo=never))


def _check(plan: Plan, plans: Sequence[Plan], model: "ModelPart") -> None:
    _check_start(plan, model)
    _check_labels(plan)
    _check_judge(plan)
    _check_scores(plan)
    _check_objective(plan)
    plan.prompts.check(len(plans))
    plan.curriculum.check(plan.k, len(plans))


def _check_start(plan: Plan, model: "ModelPart") -> None:
    if plan.start == "base" and isinstance(model, Scratch):
        raise SettingsError(
            "start=base: a model made from scratch has only random weights before fine-tuning; take start=initial, the "
            "policy after fine-tuning"
        )


def _check_labels(plan: Plan) -> None:
    have, needed = plan.rollout.samples, plan.dsl.fewest
    if plan.rollout.generates and have < needed:
        raise SettingsError(
            f"rollout.samples={have}: {type(plan.dsl).__name__} (dsl) compares generated responses with each other, so "
            f"it needs {needed} or more for each prompt"
        )
    if not plan.rollout.generates and needed > 0 and not plan.dsl.admits_human:
        raise SettingsError(
            f"rollout=given: {type(plan.dsl).__name__} (dsl) compares generated responses, and none are; take "
            "dsl=given, or rollout=ahead"
        )
    if plan.rollout.generates and not needed:
        raise SettingsError("dsl=given: labels the data's own pairs, but rollout=ahead generates; take rollout=given")


def _check_judge(plan: Plan) -> None:
    asks = plan.strength.asks
    if not (plan.dsl.needs_scores or asks):
        return
    if plan.rollout.generates and plan.dsl.needs_scores and not plan.judge.judges_generated:
        raise SettingsError(
            f"judge: {type(plan.judge).__name__} knows ratings of the data's own responses alone, and rollout=ahead "
            "generates others; take rollout=given, or a judge that reads texts"
        )
    problem = plan.judge.accepts_policy(plan.k, is_initial=plan.k == 0)
    if problem is not None:
        raise SettingsError(problem)
    if asks and not hasattr(plan.judge, COMPARE):
        raise SettingsError(
            "strength=asked: needs a judge that compares two responses and says how sure it is, such as judge=self"
        )


def _check_scores(plan: Plan) -> None:
    """Refuse parts that take differences of scores for rewards, where there are no scores, or points from 0 to 100."""
    readers = {"strength": plan.strength.reads_scores, "curriculum": plan.curriculum.needs_scores}
    for name in (name for name, reads in readers.items() if reads):
        what = (
            f"{type(getattr(plan, name)).__name__} takes the difference of two responses' scores for a reward in nats"
        )
        if not plan.dsl.needs_scores:
            raise SettingsError(
                f"{name}: {what}, and {type(plan.dsl).__name__} (dsl) makes pairs without scores; take dsl=two or "
                "ranked with judge=implicit, and none of it in iterations without such pairs"
            )
        if not plan.judge.in_nats:
            raise SettingsError(
                f"{name}: {what}, and the scores of {type(plan.judge).__name__} (judge) are points; take judge=implicit"
            )


def _check_objective(plan: Plan) -> None:
    objective = type(plan.objective).__name__
    reads_reference = getattr(plan.objective, "reads_reference", True)
    reads_rejected = getattr(plan.objective, "reads_rejected", True)
    if plan.reference == "none" and reads_reference:
        raise SettingsError(
            f"reference=none: {objective} (objective) reads the reference; take reference=start or initial"
        )
    if not isinstance(plan.npo, NoNoise) and not (reads_reference and reads_rejected and plan.reference != "none"):
        raise SettingsError(
            f"npo: {type(plan.npo).__name__} perturbs the reference's log-probability of rejected responses, which "
            f"{objective} (objective) with reference={plan.reference} does not read; take npo=off"
        )
    if reads_rejected and not plan.dsl.gives_pairs:
        raise SettingsError(
            f"dsl: {type(plan.dsl).__name__} gives chosen responses alone, and {objective} (objective) compares them "
            "with rejected ones; take objective=nll"
        )


def judge_of(evaluation: "Evaluation", plans: Sequence[Plan]) -> "Judge":
    """The judge of evaluations: ``eval.judge``, else the last iteration's if its scores say how good texts are."""
    from dnpo.judges.off import NoJudge

    if evaluation.judge is not None:
        return evaluation.judge
    last = plans[-1].judge
    return last if last.measures_texts else NoJudge()
