"""Check that the parts of a plan can be combined, before anything is computed.

Each attribute of a plan can have any part (see :class:`dnpo.stages.plan.Plan`), but some combinations have no meaning.
The gate checks the data, which are read later.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dnpo.data.curriculum import NoCurriculum
from dnpo.dsl import HardLabels, HumanChosen
from dnpo.errors import SettingsError
from dnpo.generate import Live
from dnpo.optimise.parts import NoNoise, watches
from dnpo.policy.base import Scratch
from dnpo.stages.plan import Plan, Run
from dnpo.stages.verbs import COMPARE

if TYPE_CHECKING:
    from dnpo.evaluate import Evaluation
    from dnpo.judges import Judge
    from dnpo.optimise.parts import Noise
    from dnpo.policy.base import ModelPart


def check_words(plans: Sequence[Plan], model: "ModelPart", never: "Noise | None" = None) -> None:
    """Refuse plans whose parts contradict each other.

    Args:
        plans: the plans of all iterations.
        model: the model that the run begins with.
        never: configured noise that would start only after the last iteration.

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


def check_trainings(run: Run) -> None:
    """Refuse settings of trainings that have wrong values, or do not fit each other or quantised weights.

    Raises:
        SettingsError: names the settings.
    """
    kind = run.model.quantization
    for name, how in run.trainings():
        how.check_numbers(name)
        if how.measures and how.parallel == "sharded":
            raise SettingsError(
                f"{name}.{how.asked}: needs all weights in one process to measure the loss on held-out rows, and each "
                f"process has only a part; take {name}.parallel=replicated"
            )
        if how.compile and kind is not None:
            raise SettingsError(
                f"{name}.compile=true: layers with quantised weights (model.quantization={kind}) are not compiled; "
                f"take {name}.compile=false"
            )


def _check(plan: Plan, plans: Sequence[Plan], model: "ModelPart") -> None:
    _check_start(plan, model)
    _check_average(plan, plans)
    _check_live(plan)
    _check_labels(plan)
    _check_judge(plan)
    _check_scores(plan)
    _check_objective(plan)
    _check_held(plan)
    plan.prompts.check(len(plans))
    plan.curriculum.check(plan.k, len(plans))


def _check_start(plan: Plan, model: "ModelPart") -> None:
    if plan.start == "base" and isinstance(model, Scratch):
        raise SettingsError(
            "start=base: a model made from scratch has only random weights before fine-tuning; take start=initial, the "
            "policy after fine-tuning"
        )


def _check_average(plan: Plan, plans: Sequence[Plan]) -> None:
    if plan.reads_average and not plan.ema.on:
        who = "rollout.by=ema" if getattr(plan.rollout, "by", "") == "ema" else "reference=ema"
        raise SettingsError(f"{who}: there is no moving average of the weights; take ema=on")
    if plan.ema.on and not any(each.reads_average for each in plans):  # some iterations may not need it
        raise SettingsError(
            f"ema=on: nothing reads the moving average (reference={plan.reference}, and the policy responds); take "
            "reference=ema with an objective that reads a reference, rollout=live rollout.by=ema, or ema=off"
        )


def _check_live(plan: Plan) -> None:
    """Refuse parts that need all pairs before a training that makes them, and objectives that need a live rollout."""
    how, objective = plan.rollout, type(plan.objective).__name__
    if not isinstance(how, Live):
        if not plan.makes_pairs:
            raise SettingsError(
                f"rollout: {objective} (objective) trains on responses that the policy generates meanwhile; take "
                "rollout=live"
            )
        return
    if not isinstance(plan.curriculum, NoCurriculum):
        raise SettingsError(
            f"curriculum: {type(plan.curriculum).__name__} chooses among all pairs of an iteration, but rollout=live "
            "makes them in training; take curriculum=off, or rollout=ahead"
        )
    if plan.npo.like is not None:
        raise SettingsError(
            "npo=matched: matches the noise of another training on the same pairs, but rollout=live makes different "
            "pairs in each; take npo=offset with a number"
        )
    if any(watch.reads_moments for watch in watches(plan.objective, 1)):
        raise SettingsError(
            f"objective: {objective} measures the reference on all pairs before training, but rollout=live makes them "
            "in training; take rollout=ahead"
        )
    if 0 < how.capacity < plan.trainer.batch_size:
        raise SettingsError(
            f"rollout.capacity={how.capacity}: is less than a policy step needs (trainer.batch_size="
            f"{plan.trainer.batch_size}); expected at least that, or 0 for the pairs of the last rollout alone"
        )
    if how.segment and not (plan.makes_pairs and plan.dsl.admits_human):
        raise SettingsError(
            f"rollout.segment={how.segment}: replaces a part of the human response, so the result must be compared "
            f"with the human response, but {type(plan.dsl if plan.makes_pairs else plan.objective).__name__} does not "
            "do so; take dsl=off or dsl=score, or rollout.segment=0"
        )
    asks = plan.judges or plan.strength.asks
    if asks and how.ahead_by and plan.judge.reads_policies:
        raise SettingsError(
            f"rollout.ahead_by={how.ahead_by}: {type(plan.judge).__name__} (judge) asks policies of this run, which "
            "share the machine with training; take rollout.ahead_by=0"
        )
    if asks and plan.judge.spends_freely:
        raise SettingsError(
            "judge.max_cost=null: with rollout=live a paid judge is asked all through training; give the maximum "
            "in US dollars that it may spend"
        )
    if not plan.makes_pairs:
        _check_rewards(plan)


def _check_rewards(plan: Plan) -> None:
    """For an objective on scored responses, refuse parts without effect and judges without scores of single texts."""
    objective, judge = type(plan.objective).__name__, type(plan.judge).__name__
    if not plan.judge.gives_scores or plan.judge.only_compares:
        what = "compares responses with each other" if plan.judge.gives_scores else "gives no scores"
        raise SettingsError(
            f"judge: {judge} {what}, but {objective} (objective) takes the score of a single response for its reward; "
            "take a judge that scores, such as judge=reward"
        )
    how = plan.rollout
    assert isinstance(how, Live), "_check_live has checked it"
    if plan.reference == "ema" or plan.reads_average:
        raise SettingsError(
            f"ema: {objective} (objective) reads no moving average, neither for responses (rollout.by) nor as its "
            "reference; take ema=off, rollout.by=policy, and reference=initial or start"
        )
    if how.ahead_by:
        raise SettingsError(
            f"rollout.ahead_by={how.ahead_by}: {objective} (objective) compares the policy with the one that "
            "responded, which must not be trained before its responses are used; take rollout.ahead_by=0"
        )
    plain = {"temperature": 1, "top_k": 0, "top_p": 1, "append_eos": False}
    for name in (name for name, value in plain.items() if getattr(how, name) != value):
        raise SettingsError(
            f"rollout.{name}={_say(getattr(how, name))}: {objective} (objective) has the right gradient only for "
            f"samples of the policy itself; take rollout.{name}={_say(plain[name])}"
        )
    if not isinstance(plan.dsl, HumanChosen) or not isinstance(plan.strength, HardLabels):
        place = "dsl" if not isinstance(plan.dsl, HumanChosen) else "strength"
        off = "off" if place == "dsl" else "hard"
        raise SettingsError(
            f"{place}: {type(getattr(plan, place)).__name__} labels pairs, but {objective} (objective) makes none; "
            f"take {place}={off}"
        )


def _say(value: Any) -> str:
    """A value as it is written in a setting."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_labels(plan: Plan) -> None:
    have, needed = plan.rollout.samples, plan.dsl.fewest
    if plan.rollout.generates and have < needed:
        raise SettingsError(
            f"rollout.samples={have}: {type(plan.dsl).__name__} (dsl) compares generated responses with each other, so "
            f"it needs {needed} or more for each prompt"
        )
    if not plan.rollout.generates and needed > 0 and not plan.dsl.admits_human:
        raise SettingsError(
            f"rollout=given: {type(plan.dsl).__name__} (dsl) compares generated responses, but there are none; take "
            "dsl=given, or rollout=ahead"
        )
    if plan.rollout.generates and not needed:
        word = "live" if plan.rollout.live else "ahead"
        raise SettingsError(f"dsl=given: labels the data's own pairs, but rollout={word} generates; take rollout=given")


def _check_judge(plan: Plan) -> None:
    asks = plan.strength.asks
    if not (plan.judges or asks):
        return
    word = "live" if plan.rollout.live else "ahead"
    if plan.rollout.generates and plan.dsl.needs_scores and not plan.judge.judges_generated:
        raise SettingsError(
            f"judge: {type(plan.judge).__name__} has ratings of the data's own responses alone, but rollout={word} "
            "generates others; take rollout=given, or a judge that reads texts"
        )
    is_initial = plan.k == 0 or (plan.rollout.live and plan.start == "initial")
    problem = plan.judge.accepts_policy(plan.k, is_initial=is_initial)
    if problem is not None:
        raise SettingsError(problem)
    if asks and not hasattr(plan.judge, COMPARE):
        raise SettingsError(
            "strength=asked: needs a judge that compares two responses and says how sure it is, such as judge=self"
        )


def _check_scores(plan: Plan) -> None:
    """Refuse parts that read differences of scores as rewards, where the scores are points or missing."""
    readers = {"strength": plan.strength.reads_scores, "curriculum": plan.curriculum.needs_scores}
    for name in (name for name, reads in readers.items() if reads):
        what = f"{type(getattr(plan, name)).__name__} reads the difference of two responses' scores as a reward in nats"
        if not plan.dsl.needs_scores:
            raise SettingsError(
                f"{name}: {what}, but {type(plan.dsl).__name__} (dsl) makes pairs without scores; take dsl=two or "
                f"ranked with judge=implicit, and leave {name} off in iterations without such pairs"
            )
        if not plan.judge.in_nats:
            raise SettingsError(
                f"{name}: {what}, but the scores of {type(plan.judge).__name__} (judge) are points; take judge=implicit"
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
            f"dsl: {type(plan.dsl).__name__} gives chosen responses alone, but {objective} (objective) compares them "
            "with rejected ones; take objective=nll"
        )


def _check_held(plan: Plan) -> None:
    """Refuse held-out pairs if their loss cannot be measured in training."""
    how, objective = plan.trainer, type(plan.objective).__name__
    if not how.measures:
        return
    why = None
    if plan.rollout.live:
        why = "rollout=live makes pairs in training, so none can be held out; take rollout=ahead"
    elif watches(plan.objective, 1):
        why = f"the loss of {objective} (objective) reads more than log-probabilities; take another objective"
    elif plan.reference == "ema":
        why = "with reference=ema the reference changes in training, so losses cannot be compared; take reference=start"
    if why is not None:
        raise SettingsError(f"trainer.{how.asked}: measures the loss on held-out pairs, but {why}")


def judge_of(evaluation: "Evaluation", plans: Sequence[Plan]) -> "Judge":
    """The judge of evaluations: ``eval.judge``, else the last iteration's judge if its scores measure quality."""
    from dnpo.judges.off import NoJudge

    if evaluation.judge is not None:
        return evaluation.judge
    last = plans[-1].judge
    return last if last.measures_texts else NoJudge()
