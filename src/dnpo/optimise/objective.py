"""The equations as pure functions of log-probabilities of whole responses.

Shapes: B pairs. Log-probabilities are sums over completion tokens, in nats and float32 (or wider).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class PairLogps(NamedTuple):
    """log p(y⁺|x) and log p(y⁻|x) of a batch of pairs under one model."""

    chosen_B: Tensor
    rejected_B: Tensor

    def detach(self) -> "PairLogps":
        """The same numbers, detached: no gradient flows through them."""
        return PairLogps(self.chosen_B.detach(), self.rejected_B.detach())


class NoisyReference(NamedTuple):
    """log p̃_r(y⁻|x) twice, with independent draws of noise: for the policy term and for the noise term.

    Attributes:
        policy_B: for the policy term; has no gradient.
        noise_B: for the noise term; its gradient flows to the noise.
        variance: mean(s²) over rejected completion tokens and vocabulary entries, a scalar with gradient.
    """

    policy_B: Tensor
    noise_B: Tensor
    variance: Tensor


class Terms(NamedTuple):
    """The three terms of the two-player loss, and the margins in the first."""

    policy: Tensor
    noise: Tensor
    variance: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the terms; one backward pass computes the gradients of both players."""
        return self.policy + self.noise + self.variance


Objective = Callable[[PairLogps, PairLogps], Tensor]
"""(policy, reference) → a loss for each of the B pairs."""


def log_ratio_gap(policy: PairLogps, reference: PairLogps) -> Tensor:
    """[log p_θ(y⁺) − log p_r(y⁺)] − [log p_θ(y⁻) − log p_r(y⁻)], the margin at β = 1, in nats. Shape B."""
    return (policy.chosen_B - reference.chosen_B) - (policy.rejected_B - reference.rejected_B)


def logistic(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """ℓ(β · gap) with ℓ(m) = −log σ(m) = softplus(−m): SPIN (equation 4.7) and DPO (equation 7). Shape B."""
    return softplus(-beta * log_ratio_gap(policy, reference))


def two_player(
    objective: Objective, policy: PairLogps, reference: PairLogps, noisy: NoisyReference, alpha: float
) -> Terms:
    """Noise preference optimization (DNPO paper, section 4.3): policy term, noise term and variance term.

        mean ℓ(margiñ(θ, stop(φ); ε))  −  mean ℓ(margiñ(stop(θ), φ; ε′))  +  α · mean(s²)

    Because of the stop operators, one backward pass of the sum gives the policy the gradient of the first term only,
    and the noise that of the other two. If the noise is zero, the first term is the plain objective.
    """
    met_by_policy = PairLogps(reference.chosen_B, noisy.policy_B.detach())
    met_by_noise = PairLogps(reference.chosen_B, noisy.noise_B)
    return Terms(
        policy=objective(policy, met_by_policy).mean(),
        noise=-objective(policy.detach(), met_by_noise).mean(),
        variance=alpha * noisy.variance,
    )


def negative_log_likelihood(logp_N: Tensor) -> Tensor:
    """Mean of −log p over completion tokens: the loss of supervised fine-tuning. ``logp_N`` has one value per token."""
    return -logp_N.mean()


def saturation(margin_B: Tensor) -> Tensor:
    """mean σ(−margin), the mean gradient weight of the logistic loss; near 0 the loss is saturated."""
    return torch.sigmoid(-margin_B).mean()
