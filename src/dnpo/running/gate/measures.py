"""Check the base model's weights, and the files needed after training: benchmarks, a sentence encoder."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from dnpo.errors import DnpoError
from dnpo.evaluate import LEADERBOARD, Evaluation
from dnpo.policy.model import Policy
from dnpo.running.gate.finding import Finding, refuse
from dnpo.settings import named_within


def weights(policy: Policy, here: bool) -> Finding:
    """Report whether the base model's weights were checked; loading its outline has already refused wrong weights.

    Args:
        policy: the base model on the meta device.
        here: whether its files are on this machine.
    """
    count = len(policy.causal_lm.state_dict())
    if not here:
        text = f"the {count:,} tensors are not downloaded yet; they are checked when they are loaded"
        return Finding("weights", "pass", text)
    return Finding("weights", "pass", f"the files have all {count:,} tensors, as config.json says, and all are finite")


def findings(evaluation: Evaluation, ahead: Collection[str]) -> list[Finding]:
    """Check the measures whose stages are not computed yet.

    Args:
        ahead: names of these stages.
    """
    result = []
    if evaluation.texts is not None and "texts" in ahead:
        result.append(_try("texts", evaluation.texts.check, "everything it needs is here", "eval.texts.encoder"))
    if evaluation.leaderboard is not None and "leaderboard" in ahead:
        done = "lm-eval is installed, and the benchmarks can be read"
        result.append(
            _try(
                "leaderboard",
                evaluation.leaderboard.check,
                done,
                "eval.leaderboard.…, as the message says",
                LEADERBOARD,
            )
        )
    return result


def _try(
    name: str, check: Callable[[], None], done: str, setting: str, names: Mapping[str, str] = MappingProxyType({})
) -> Finding:
    try:
        with named_within(names):
            check()
    except DnpoError as error:
        return refuse(name, error, setting)
    return Finding(name, "pass", done)
