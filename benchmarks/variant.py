"""The base class of all variants of a training step."""

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
OBJECTIVES = ("soft", "weighted", "ipo", "simpo", "orpo", "nll", "confident", "refined", "statistics")
NOISY = ("ipo+npo", "refined+npo", "statistics+npo")  # other objectives with trainable noise


class Skip(Exception):
    """A variant that cannot be measured here, with the reason."""


class Variant:
    """One way to train on a batch of pairs, from token ids to updated weights.

    Args:
        objective: ``dpo`` or ``npo``; for ours also one of ``OBJECTIVES`` or ``NOISY``.
        reference: ``online`` runs the reference in every step, ``cached`` before all steps.
        shape, device, dtype, lora, quantization: settings of the model.
        batches: all training batches, from which a variant may compute things before the first step.
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
        quantization: str | None = None,
    ) -> None:
        self.objective, self.reference, self.shape, self.device, self.batches = (
            objective,
            reference,
            shape,
            device,
            batches,
        )
        self.model = model(shape, device, dtype, lora, quantization=quantization)
        self.optimizers: list[Optimizer] = [RMSprop(find_trained(self.model), lr=LEARNING_RATE)]

    def forward_backward(self, index: int) -> float:
        """Compute the gradients of one batch; return the policy's term of the loss, equal for all variants."""
        raise NotImplementedError

    def body(self, index: int) -> None:
        """Forward and backward pass of the blocks alone, with the same layout of rows as in the step."""
        raise NotImplementedError

    def step(self, index: int) -> float:
        """Train on one batch; return the policy's term of the loss before the update."""
        loss = self.forward_backward(index)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    def prepare_gradients(self) -> None:
        """Zero all gradients in place, so that the memory of gradients is allocated before anything is measured."""
        for p in self.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()


def find_trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in module.parameters() if p.requires_grad]
