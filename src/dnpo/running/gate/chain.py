"""Check the chain of stages."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dnpo.running.gate.finding import Finding

if TYPE_CHECKING:
    from dnpo.loop import Iteration


def reference(iterations: "Sequence[Iteration]") -> Finding:
    """Check that samples, reference and training of every iteration start from the policy of the iteration before.

    With adapters stacked over iterations it is easy to compare with the fine-tuned model instead.
    """
    wrong = []
    for before, iteration in pairwise(iterations):
        start = before.policy.key
        stages = {
            "the samples": iteration.responses,
            "the reference": iteration.reference,
            "the training": iteration.policy,
            "the hidden states": iteration.policy.aids.get("hidden"),
        }
        wrong += [
            f"iteration {iteration.k}: {what} should start from {before.policy.title} ({start}), but from "
            f"{stage.inputs['policy'].title} ({stage.inputs['policy'].key})"
            for what, stage in stages.items()
            if stage is not None and stage.inputs["policy"].key != start
        ]
        read = iteration.policy.inputs.get("reference")
        if iteration.reference is not None and (read is None or read.key != iteration.reference.key):
            wrong.append(f"iteration {iteration.k}: the training does not read the reference of its iteration")
    if wrong:
        return Finding("reference", "stop", "; ".join(wrong), "none: the chain in dnpo.loop is laid out wrongly")
    return Finding(
        "reference", "pass", f"the reference of each of {len(iterations) - 1} iterations is the policy it starts from"
    )
