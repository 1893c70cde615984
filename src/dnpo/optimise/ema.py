"""A moving average of a policy's weights during training.

    θ_EMA ← a · θ_EMA + (1 − a) · θ    every n policy steps

It is computed in float32, and only of trained weights; frozen weights are shared with the policy, not copied. With a =
0 and n = 1 it is the policy itself, with a = 1 the policy before training.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from dnpo.errors import StoreError
from dnpo.policy.model import Policy
from dnpo.policy.quantised import states


class Average:
    """The moving average, as a policy that can respond and score like any other.

    Attributes:
        policy: the policy with the averaged weights, always in evaluation mode.

    Args:
        trained: the policy in training, before its first update; with LoRA it already has a new adapter.
        decay: a.
        every: n.
    """

    def __init__(self, trained: Policy, decay: float, every: int) -> None:
        self.decay, self.every = decay, every
        frozen: dict[int, Any] = {id(p): p for p in trained.model.parameters() if not p.requires_grad}
        module = copy.deepcopy(trained.model, frozen | states(trained.model)).eval()
        self._live = {name: p for name, p in trained.model.named_parameters() if p.requires_grad}
        self._own = {name: p for name, p in module.named_parameters() if name in self._live}
        for p in self._own.values():
            p.requires_grad_(False)
        # A float32 parameter contains the average itself; for narrower types a float32 copy is kept.
        self._wide: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float() for name, p in self._own.items()
        }
        self.policy = Policy(module, trained.tokenizer)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Update the average after the policy step of this number, from 0."""
        if (step + 1) % self.every:
            return
        for name, wide in self._wide.items():
            wide.lerp_(self._live[name].detach().to(wide.dtype), 1 - self.decay)
            if wide is not self._own[name]:
                self._own[name].copy_(wide)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights in float32, for a checkpoint."""
        return {name: wide.detach().cpu() for name, wide in self._wide.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Raises:
            StoreError: it has an average of other weights.
        """
        if state.keys() != self._wide.keys():
            raise StoreError("the checkpoint holds an average of other weights; remove it, and training begins again")
        for name, wide in self._wide.items():
            wide.copy_(state[name])
            self._own[name].copy_(wide)
