"""No training step makes a tensor of [tokens, vocabulary], under any objective and noise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnpo.optimise import npo, preference, watch
from dnpo.optimise.npo import SilentModule, TrainableModule
from dnpo.optimise.parts import Likelihood, Logistic, OddsRatio, PerToken, Refined, Squared, Statistics
from dnpo.policy import logprobs
from dnpo.policy import model as policy_model
from dnpo.policy.model import Policy
from tests.conftest import Report, World, torch_optimizer
from tests.test_optimise import how, said_by

MakePolicy = Callable[..., Policy]
WIDTH, ENTRIES, TILE = 8, 1_024, 64
PAIRS = 8

OBJECTIVES: dict[str, Any] = {
    "logistic": Logistic(beta=1.0, smoothing=0.1),
    "squared": Squared(beta=0.1),
    "squared, per token": Squared(beta=1.0, mean=True),
    "odds ratio": OddsRatio(),
    "per token": PerToken(),
    "likelihood": Likelihood(),
    "refined": Refined(beta=1.0, warmup=0.0),
    "refined, not extrapolated": Refined(beta=1.0, warmup=0.0, extrapolation=0.0),
    "statistics": Statistics(base=Logistic(beta=1.0)),
    "statistics of refined": Statistics(base=Refined(beta=1.0, warmup=0.0)),
}
NOISY = ("logistic", "squared", "squared, per token", "refined", "refined, not extrapolated", "statistics")


class Allocations(TorchDispatchMode):
    """The elements of the largest tensor that any operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                elements = x.untyped_storage().nbytes() // x.element_size()
                if elements > self.largest:
                    self.largest, self.by = elements, str(func)
        return found


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that the vocabulary has many."""
    monkeypatch.setitem(logprobs.TILE, "cpu", TILE)


def step(objective: Any, noisy: bool, make_policy: MakePolicy, world: World, folder: Path) -> tuple[Allocations, int]:
    """Two steps of a whole training, and the smaller number of response tokens of both sides."""
    policy = make_policy(hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=8, vocab_size=ENTRIES)
    pairs = world.pairs(PAIRS)
    with Allocations() as found:
        preference.optimise(
            policy,
            pairs,
            said_by(policy, pairs) if getattr(objective, "reads_reference", True) else None,
            how(optimizer=torch_optimizer("SGD", lr=0.01), epochs=2, batch_size=PAIRS),
            noise=TrainableModule(WIDTH, ENTRIES) if noisy else SilentModule(),
            objective=objective,
            beta=1.0,
            seed=0,
            folder=folder,
            report=Report(),
        )
    return found, min(sum(len(p.chosen_ids) for p in pairs), sum(len(p.rejected_ids) for p in pairs))


@pytest.mark.parametrize(
    ("name", "noisy"), [*((name, False) for name in OBJECTIVES), *((name, True) for name in NOISY)]
)
def test_no_step_allocates_the_logits_of_all_tokens(
    name: str, noisy: bool, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Not of one side either: the largest tensors are tiles of logits, and weights and gradients of the head."""
    found, tokens = step(OBJECTIVES[name], noisy, make_policy, world, tmp_path)
    assert WIDTH * ENTRIES <= found.largest < tokens * ENTRIES, found.by


def whole(hidden_NH: Tensor, head: logprobs.Head, target_N: Tensor) -> Tensor:
    """Log-probabilities from all logits at once."""
    return (hidden_NH @ head.weight_VH.t()).log_softmax(-1).gather(1, target_N.unsqueeze(-1)).squeeze(-1)


def whole_extrapolated(policy: watch.States, reference: watch.States, target_N: Tensor, by: float) -> Tensor:
    """The extrapolated policy's log-probabilities from all logits at once."""
    mixed_NV = (1 + by) * policy.head.logits(policy.hidden_NH) - by * reference.head.logits(reference.hidden_NH)
    return mixed_NV.log_softmax(-1).gather(1, target_N.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    ("name", "noisy", "module", "function", "naive"),
    [
        ("logistic", False, policy_model, "token_logps", whole),
        ("likelihood", False, policy_model, "token_logps", whole),
        ("refined", False, watch, "extrapolated_logps", whole_extrapolated),
        ("logistic", True, npo, "tiles", lambda head: [(0, len(head.weight_VH))]),
    ],
)
def test_the_check_finds_logits_that_are_computed_at_once(
    name: str,
    noisy: bool,
    module: Any,
    function: str,
    naive: Any,
    make_policy: MakePolicy,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, function, naive)
    found, tokens = step(OBJECTIVES[name], noisy, make_policy, world, tmp_path)
    assert found.largest >= tokens * ENTRIES
