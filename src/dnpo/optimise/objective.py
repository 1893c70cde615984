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


class Facts(NamedTuple):
    """What objectives know about B pairs besides log-probabilities.

    Attributes:
        strength_B: p(y⁺ ≻ y⁻), how sure each label is; 1 for hard labels.
        weight_B: the weight of each pair in the loss of a policy step.
        shift_B: how far σ(margin) is lowered.
        chosen_tokens_B: number of tokens of each chosen response.
        rejected_tokens_B: the same of rejected ones; 0 where nothing is rejected.
    """

    strength_B: Tensor
    weight_B: Tensor
    shift_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor


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


Objective = Callable[[PairLogps, PairLogps, Facts], Tensor]
"""(policy, reference, facts) → a loss for each of the B pairs, without their weights."""


def log_ratio_gap(policy: PairLogps, reference: PairLogps) -> Tensor:
    """[log p_θ(y⁺) − log p_r(y⁺)] − [log p_θ(y⁻) − log p_r(y⁻)], the margin at β = 1, in nats. Shape B."""
    return (policy.chosen_B - reference.chosen_B) - (policy.rejected_B - reference.rejected_B)


def logistic(policy: PairLogps, reference: PairLogps, facts: Facts | None = None, *, beta: float) -> Tensor:
    """p ℓ(m) + (1 − p) ℓ(−m) with ℓ(m) = −log σ(m) = softplus(−m), m = β · gap and p the strength of the label.

    This is SPCE (OSP paper, equations 8 and 9; the printed ones lack a minus). Without facts p is 1, and then it is the
    loss of SPIN (equation 4.7) and DPO (equation 7), in all digits. Shape B.
    """
    margin_B = beta * log_ratio_gap(policy, reference)
    if facts is None:
        return softplus(-margin_B)
    return softly(softplus(-margin_B), softplus(margin_B), facts.strength_B)


def softly(loss_B: Tensor, swapped_B: Tensor, strength_B: Tensor) -> Tensor:
    """p L(y⁺, y⁻) + (1 − p) L(y⁻, y⁺): a pair loss under labels that are right with probability p. Shape B."""
    return strength_B * loss_B + (1 - strength_B) * swapped_B


def weighted_mean(value_B: Tensor, weight_B: Tensor) -> Tensor:
    """Σ w x / Σ w; where all weights are 1, the bits of the plain mean, and 0 where they sum to 0."""
    least = torch.finfo(weight_B.dtype).tiny
    return (value_B * (weight_B * (len(weight_B) / weight_B.sum().clamp(min=least)))).mean()


def two_player(
    objective: Objective,
    policy: PairLogps,
    reference: PairLogps,
    noisy: NoisyReference,
    facts: Facts,
    alpha: float,
    *,
    beta: float,
) -> Terms:
    """Noise preference optimization (DNPO paper, section 4.3): policy term, noise term and variance term.

        mean L(θ, stop(φ); ε)  −  mean ℓ(margiñ(stop(θ), φ; ε′))  +  α · mean(s²)

    L is the objective. The noise term is the logistic loss of hard labels at its β whatever it is, so that noise always
    narrows the margin. Both means are over pairs by their weights. Because of the stop operators, one backward pass of
    the sum gives the policy the gradient of the first term only, and the noise that of the other two. If the noise is
    zero, the first term is the plain objective.
    """
    met_by_policy = PairLogps(reference.chosen_B, noisy.policy_B.detach())
    met_by_noise = PairLogps(reference.chosen_B, noisy.noise_B)
    return Terms(
        policy=weighted_mean(objective(policy, met_by_policy, facts), facts.weight_B),
        noise=-weighted_mean(logistic(policy.detach(), met_by_noise, beta=beta), facts.weight_B),
        variance=alpha * noisy.variance,
    )


def negative_log_likelihood(logp_N: Tensor) -> Tensor:
    """Mean of −log p over completion tokens: the loss of supervised fine-tuning. ``logp_N`` has one value per token."""
    return -logp_N.mean()


def saturation(margin_B: Tensor) -> Tensor:
    """σ(−margin), the gradient weight of the logistic loss; where its mean is near 0 the loss is saturated. Shape B."""
    return torch.sigmoid(-margin_B)
