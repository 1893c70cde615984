"""What every variant of a training step has in common."""

import torch
from torch import nn
from torch.optim import Optimizer, RMSprop

from benchmarks.problem import Pairs, Shape, model

BETA = 0.1
LEARNING_RATE = 1e-5
NOISE_LEARNING_RATE = 1e-3
ALPHA = 0.1
START_LOG_STD = -1.0
MAX_VARIANCE = 1.0


class Skip(Exception):
    """A variant that cannot be measured here, with the reason."""


class Variant:
    """One way to train on a batch of pairs, from token ids to updated weights.

    Args:
        objective: ``dpo`` or ``npo``.
        reference: ``online`` runs the reference in every step, ``cached`` has run it before.
        shape, device, dtype, lora: of the model.
        batches: all that it will be trained on, for what is computed before.
    """

    def __init__(
        self,
        objective: str,
        reference: str,
        *,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        lora: int,
        batches: list[Pairs],
    ) -> None:
        self.objective, self.reference, self.shape, self.device, self.batches = (
            objective,
            reference,
            shape,
            device,
            batches,
        )
        self.model = model(shape, device, dtype, lora)
        self.optimizers: list[Optimizer] = [RMSprop(trained(self.model), lr=LEARNING_RATE)]

    def forward_backward(self, index: int) -> float:
        """The gradients of one batch; the loss's policy term, which all variants should agree on."""
        raise NotImplementedError

    def body(self, index: int) -> None:
        """Forward and backward of the blocks alone, laid out as the step lays them out."""
        raise NotImplementedError

    def step(self, index: int) -> float:
        """Train on one batch; the policy term before the update."""
        loss = self.forward_backward(index)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    def prepare_gradients(self) -> None:
        """Zero all gradients in place, so that a measured backward pass finds their memory allocated."""
        for p in self.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in module.parameters() if p.requires_grad]


class Silent:
    """Nobody is told how far the training is."""

    def begin(self, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int = 1) -> None: ...

    def note(self, text: str) -> None: ...

    def steps(self, rows: list[dict[str, float]]) -> None: ...
