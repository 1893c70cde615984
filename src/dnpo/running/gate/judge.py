"""Check the judge: whether it answers, and on which prompts it was fitted."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from dnpo.data.seen import hash_conversation
from dnpo.errors import DnpoError
from dnpo.evaluate import OWN_JUDGE
from dnpo.judges import Judge
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt
from dnpo.running.gate.finding import Finding, refuse
from dnpo.running.gate.rows import Rows
from dnpo.settings import rename_settings
from dnpo.stages.measures import SECOND
from dnpo.stages.plan import Plan, Run

if TYPE_CHECKING:
    from dnpo.policy.model import Policy


def labels(first_scored: int | None, judge: Judge, rows: Rows) -> Finding:
    """Check that the judge can judge these rows, and that there is a judge if labels need scores.

    Args:
        first_scored: the first iteration whose labels need scores; None if no labels do.
    """
    if not judge.gives_scores:
        if first_scored is None:
            return Finding("labels", "pass", "no labels need scores, and judge=off gives none")
        text = f"dsl labels by score from iteration {first_scored} on, but judge=off gives none"
        return Finding("labels", "stop", text, "judge=…, or dsl=off (as in method=spin and method=npo)")
    for some in rows.values():
        problem = judge.accepts(some)
        if problem is not None:
            return Finding("labels", "stop", problem, "judge=…")
    return Finding("labels", "pass", f"the judge accepts all {sum(map(len, rows.values())):,} rows")


def labels_of_run(run: Run, rows: Rows) -> Finding:
    """:func:`labels` for the first iteration whose labels need scores; without rows it finds only a missing judge."""
    scored = next((plan for plan in run.plans if plan.dsl.needs_scores), None)
    return labels(None, run.judge, rows) if scored is None else labels(scored.k, scored.judge, rows)


def measuring(judge: Judge, held: Sequence[Prompt], split: str) -> Finding:
    """Check that the judge of evaluations can judge the held-out rows, if it is not the labelling judge."""
    problem = judge.accepts(held)
    if problem is not None:
        setting = "eval.judge=…, or null, which uses the labelling judge if it can score texts"
        text = f"as judge of evaluations: {rename_settings(problem, OWN_JUDGE)}"
        return Finding("scores", "stop", text, setting)
    return Finding("scores", "pass", f"the judge of evaluations accepts all {len(held):,} {split} rows")


def second(judge: Judge, held: Sequence[Prompt], split: str) -> Finding:
    """Check that the second judge can judge the held-out rows."""
    if not judge.measures_texts:
        text = f"{type(judge).__name__} only labels the pairs of a run; a second judge must score single responses"
        return Finding("second judge", "stop", text, "judge@second_judge=…")
    problem = judge.accepts(held)
    if problem is not None:
        text = f"as second judge: {rename_settings(problem, SECOND)}"
        return Finding("second judge", "stop", text, "judge@second_judge=…")
    return Finding("second judge", "pass", f"the second judge accepts all {len(held):,} {split} rows")


def models(plans: Sequence[Plan], policy: "Policy") -> list[Finding]:
    """Check that judges that ask a policy of the run can ask this model; no finding without such judges.

    Args:
        policy: the base model, which may have no weights.
    """
    judges: list[Judge] = []
    for plan in plans:
        asked = plan.dsl.needs_scores or plan.strength.asks
        if asked and plan.judge.reads_policies and plan.judge not in judges:
            judges.append(plan.judge)
    problems = [problem for judge in judges if (problem := judge.accepts_model(policy)) is not None]
    if problems:
        return [Finding("judge's model", "stop", problems[0], "model.question, judge.template, or judge=…")]
    return [Finding("judge's model", "pass", "the judge can ask policies of this model")] if judges else []


def judge_prompts(
    seen: Collection[str], held: Sequence[Prompt], split: str, who: str = "judge", setting: str = "judge.path"
) -> Finding:
    """Check that a judge was not fitted on prompts of the evaluation.

    Args:
        seen: :func:`hash_conversation` of the prompts that the judge was fitted on.
        who: what to call the judge.
        setting: the setting that names its file.
    """
    name = f"prompts of the {who}"
    if not seen:
        return Finding(name, "pass", f"the {who} was not fitted on any prompts")
    both = [row for row in held if hash_conversation(row.messages) in seen]
    if both:
        text = (
            f"the {who} was fitted on {len(both):,} of the {len(held):,} {split} prompts, the first is {both[0].id}: "
            "its scores on them are no evidence"
        )
        return Finding(name, "warn", text, f"{setting}, or eval.split")
    text = f"none of the {len(seen):,} prompts that the {who} was fitted on is among {len(held):,} {split} prompts"
    return Finding(name, "pass", text)


def canary(judge: Judge, ledger: Ledger) -> Finding:
    """Ask the judge one real question, to check that it answers and to measure the cost."""
    try:
        asked = judge.canary(ledger)
    except DnpoError as error:
        return refuse("judge", error, "judge.…, as the message says")
    if asked is None:
        return Finding("judge", "pass", "this judge answers without a call")
    if not asked.scored:
        settings = asked.settings or "the judge's settings: its address, its model, its question"
        return Finding("judge", "stop", asked.text, settings)
    if asked.warning:
        return Finding(
            "judge", "warn", f"{asked.text}; {asked.warning}", "judge.version=…, if the weights were swapped"
        )
    return Finding("judge", "pass", asked.text)
