"""Check the chain of stages."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dnpo.running.gate.finding import OWN_ERROR, Finding

if TYPE_CHECKING:
    from dnpo.stages.plan import Iteration, Plan
    from dnpo.store import Stage


def reference(iterations: "Sequence[Iteration]", plans: "Sequence[Plan]") -> Finding:
    """Check that samples, reference and training of every iteration start from the policies that its plan names.

    If each iteration adds an adapter, the fine-tuned model is easily taken as reference by mistake.
    """
    wrong: list[str] = []
    initial = iterations[0].policy
    for (before, iteration), plan in zip(pairwise(iterations), plans, strict=False):
        start = {"previous": before.policy, "initial": initial, "base": None}[plan.start]
        frozen = {"start": start, "initial": initial, "ema": None, "none": None}[plan.reference]
        stages = {
            "the samples": (iteration.responses, before.policy),
            "the reference": (iteration.reference, frozen),
            "the training": (iteration.policy, start),
            "the hidden states": (iteration.policy.caches.get("hidden"), frozen),
        }
        for what, (stage, right) in stages.items():
            found = None if stage is None else stage.inputs.get("policy")
            if stage is not None and _key(found) != _key(right):
                wrong.append(
                    f"iteration {iteration.k}: {what} should start from {_describe(right)}, not from {_describe(found)}"
                )
        read = iteration.policy.inputs.get("reference")
        if iteration.reference is not None and (read is None or read.key != iteration.reference.key):
            wrong.append(f"iteration {iteration.k}: the training does not read the reference of its iteration")
    if wrong:
        return Finding("reference", "stop", "; ".join([*wrong, OWN_ERROR]))
    if not plans:
        return Finding("reference", "pass", "no iteration is trained, so none has a reference")
    words = {"start": "the policy it starts from", "initial": "the initial policy", "none": "none"}
    words["ema"] = "the moving average of its weights"
    first, *others = (
        (plan.k, words[plan.reference])
        for before, plan in zip([None, *plans], plans, strict=False)
        if before is None or before.reference != plan.reference
    )
    changes = "".join(f"; from iteration {k} on it is {what}" for k, what in others)
    whose = "an" if others else "every"
    return Finding("reference", "pass", f"the reference of {whose} iteration is {first[1]}{changes}")


def _key(stage: "Stage | None") -> str | None:
    return None if stage is None else stage.key


def _describe(stage: "Stage | None") -> str:
    return "the base model" if stage is None else f"{stage.title} ({stage.key})"
