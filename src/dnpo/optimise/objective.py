"""The equations as pure functions of log-probabilities of whole responses.

Shapes: B pairs. Log-probabilities are sums over completion tokens, in nats and float32 (or wider).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class PairLogps(NamedTuple):
    """log p(y⁺|x) and log p(y⁻|x) of a batch of pairs under one model."""

    chosen_B: Tensor
    rejected_B: Tensor

    @classmethod
    def split(cls, logp_S: Tensor, pairs: int) -> "PairLogps":
        """Split the values of all sequences, the chosen ones first; if there are no rejected ones, theirs are 0."""
        chosen_B, *rejected = torch.split(logp_S, pairs)
        return cls(chosen_B, rejected[0] if rejected else torch.zeros_like(chosen_B))

    def to(self, device: torch.device) -> "PairLogps":
        """Return it with both tensors on another device."""
        return PairLogps(self.chosen_B.to(device), self.rejected_B.to(device))

    def detach(self) -> "PairLogps":
        """The same numbers, detached: no gradient flows through them."""
        return PairLogps(self.chosen_B.detach(), self.rejected_B.detach())


class Facts(NamedTuple):
    """Numbers of B pairs that objectives read in addition to log-probabilities.

    Attributes:
        strength_B: p(y⁺ ≻ y⁻), how sure each label is; 1 for hard labels.
        weight_B: the weight of each pair in the loss of a policy step.
        shift_B: how far σ(margin) is lowered.
        chosen_tokens_B: number of tokens of each chosen response.
        rejected_tokens_B: number of tokens of each rejected response; 0 if there is none.
        suspect_B: 1 if a label is suspected to be wrong, else 0; only for objectives that look for such labels.
        drift_B: distance of the policy's hidden states from the reference's, with gradient; only for objectives that
            penalise it.
    """

    strength_B: Tensor
    weight_B: Tensor
    shift_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor
    suspect_B: Tensor | None = None
    drift_B: Tensor | None = None

    def to(self, device: torch.device) -> "Facts":
        """Return it with all tensors on another device."""
        return self._replace(**{name: t.to(device) for name, t in self._asdict().items() if t is not None})


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
    """The three terms of the two-player loss, and the margins in the first term."""

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


# --- losses of pairs


def logistic(
    policy: PairLogps,
    reference: PairLogps,
    facts: Facts | None = None,
    *,
    beta: float,
    smoothing: float | Tensor = 0.0,
    xi_min: float = 0.05,
) -> Tensor:
    """p ℓ(m) + (1 − p) ℓ(−m) with ℓ(m) = −log σ(m) = softplus(−m), m = β · gap and p the strength of the label.

    This is SPCE (OSP paper, equations 8 and 9; as printed, they lack a minus). If p is 1, as without facts, it is
    exactly the loss of SPIN (equation 4.7) and DPO (equation 7). Its derivative by m is σ(m) − p. Shape B.

    Args:
        smoothing: ε, the probability that a label counts as its opposite: p′ = (1 − ε) p + ε (1 − p).
        xi_min: where σ(m) − shift is below this, the loss of a pair with a shift is a tangent, see :func:`shifted`.
    """
    margin_B = beta * log_ratio_gap(policy, reference)
    if facts is None:
        facts = hard(margin_B)
    right_B, wrong_B = (
        torch.where(facts.shift_B > 0, shifted(signed_B, facts.shift_B, xi_min), softplus(-signed_B))
        for signed_B in (margin_B, -margin_B)
    )
    return softly(right_B, wrong_B, smooth(facts.strength_B, smoothing))


def shifted(margin_B: Tensor, shift_B: Tensor, xi_min: float) -> Tensor:
    """−log u with u = σ(m) − shift: the loss under the worst distribution near the data. Shape B.

    If u is below ``xi_min``, the loss is the tangent there, −log ξ_min + (ξ_min − u) / ξ_min, since u may be negative.
    """
    u_B = torch.sigmoid(margin_B) - shift_B
    within_B = u_B.clamp(min=xi_min)
    return (within_B - u_B) / xi_min - within_B.log()


def squared(
    policy: PairLogps, reference: PairLogps, facts: Facts | None = None, *, beta: float, mean: bool = False
) -> Tensor:
    """(gap − (2p − 1) / (2β))²: IPO (equation 17), with the target for labels of strength p. Shape B.

    For p = 1 the target is 1 / (2β). Up to a constant, the loss is p L(y⁺, y⁻) + (1 − p) L(y⁻, y⁺).

    Args:
        mean: use log-ratios per token, as TRL does, instead of log-ratios of whole responses, as in the paper.
    """
    if facts is None:
        facts = hard(policy.chosen_B)
    if mean:
        policy, reference = per_token(policy, facts), per_token(reference, facts)
    return (log_ratio_gap(policy, reference) - (2 * facts.strength_B - 1) / (2 * beta)).square()


def odds_ratio(policy: PairLogps, facts: Facts, *, weight: float) -> Tensor:
    """−log p̄(y⁺) − λ log σ(log odds p̄(y⁺) − log odds p̄(y⁻)), p̄ = p^(1/tokens): ORPO (equations 6 and 7). Shape B.

    Args:
        weight: λ.
    """
    logps = per_token(policy, facts)
    gap_B = log_odds(logps.chosen_B) - log_odds(logps.rejected_B)
    right_B = weight * softplus(-gap_B) - logps.chosen_B
    wrong_B = weight * softplus(gap_B) - logps.rejected_B
    return softly(right_B, wrong_B, facts.strength_B)


def log_odds(logp_B: Tensor) -> Tensor:
    """log p − log(1 − p), computed from log p. Values above −1e-6 count as −1e-6."""
    logp_B = logp_B.clamp(max=-1e-6)
    return logp_B - torch.log(-torch.expm1(logp_B))


def without_reference(policy: PairLogps, facts: Facts, *, beta: float, margin: float) -> Tensor:
    """softplus(−(β (log p̄(y⁺) − log p̄(y⁻)) − γ)), p̄ = p^(1/tokens): SimPO (equation 6). Shape B.

    Args:
        margin: γ, the margin by which the chosen response should win.
    """
    logps = per_token(policy, facts)
    gap_B = beta * (logps.chosen_B - logps.rejected_B)
    return softly(softplus(margin - gap_B), softplus(margin + gap_B), facts.strength_B)


def surprise(policy: PairLogps, facts: Facts, *, mean: bool) -> Tensor:
    """−log p(y⁺), per token if ``mean``: fine-tuning on chosen responses. Shape B."""
    return -(per_token(policy, facts) if mean else policy).chosen_B


def drift(policy_mean_BH: Tensor, reference_mean_BH: Tensor, variance_H: Tensor) -> Tensor:
    """(1/H) Σ_c Δμ_c² / var_c: how far a response's mean hidden states have moved (HG-DPO, section 3). Shape B.

    Args:
        policy_mean_BH: means over the tokens of each response.
        reference_mean_BH: the reference's means.
        variance_H: the variance of each channel over the reference's tokens; if it is smaller than a millionth of the
            mean variance, that millionth is used.
    """
    least = 1e-6 * variance_H.mean()
    return ((policy_mean_BH - reference_mean_BH).square() / variance_H.clamp(min=least)).mean(-1)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of all values is; neighbours are interpolated linearly."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(share))


# --- used by several of them


def softly(loss_B: Tensor, swapped_B: Tensor, strength_B: Tensor) -> Tensor:
    """p L(y⁺, y⁻) + (1 − p) L(y⁻, y⁺): the expected loss of pairs with labels of probability p. Shape B."""
    return strength_B * loss_B + (1 - strength_B) * swapped_B


def smooth(strength_B: Tensor, smoothing: float | Tensor) -> Tensor:
    """p′ = (1 − ε) p + ε (1 − p): the strength of labels if a share ε of them counts as their opposite. Shape B."""
    return (1 - smoothing) * strength_B + smoothing * (1 - strength_B)


def per_token(logps: PairLogps, facts: Facts) -> PairLogps:
    """Means over completion tokens; 0 for a response without tokens."""
    return PairLogps(
        logps.chosen_B / facts.chosen_tokens_B.clamp(min=1), logps.rejected_B / facts.rejected_tokens_B.clamp(min=1)
    )


def hard(like_B: Tensor) -> Facts:
    """The facts of pairs with hard labels, weight 1 and one token."""
    one_B = torch.ones_like(like_B)
    return Facts(one_B, one_B, torch.zeros_like(one_B), one_B, one_B)


def weighted_mean(value_B: Tensor, weight_B: Tensor) -> Tensor:
    """Σ w x / Σ w: exactly the plain mean if all weights are 1, and 0 if the weights sum to 0."""
    total = weight_B.sum().clamp(min=torch.finfo(weight_B.dtype).tiny)
    scale = torch.full_like(total, len(weight_B)) / total  # number / tensor would round differently
    return (value_B * (weight_B * scale)).mean()


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

    L is the objective. For every objective, the noise term is the logistic loss of hard labels at the objective's β, so
    that noise always narrows the margin. Both means are over pairs, by their weights. One backward pass of the sum
    suffices: because of the stop operators, the policy gets only the gradient of the first term, and the noise only the
    gradient of the other two. If the noise is zero, the first term is the plain objective.
    """
    met_by_policy = PairLogps(reference.chosen_B, noisy.policy_B.detach())
    met_by_noise = PairLogps(reference.chosen_B, noisy.noise_B)
    return Terms(
        policy=weighted_mean(objective(policy, met_by_policy, facts), facts.weight_B),
        noise=-weighted_mean(logistic(policy.detach(), met_by_noise, beta=beta), facts.weight_B),
        variance=alpha * noisy.variance,
    )


def negative_log_likelihood(logp_N: Tensor) -> Tensor:
    """Mean of −log p over completion tokens, the loss of supervised fine-tuning. ``logp_N`` has one value per token."""
    return -logp_N.mean()


def saturation(margin_B: Tensor) -> Tensor:
    """σ(−margin), the gradient weight of the logistic loss; a mean near 0 is a saturated loss. Shape B."""
    return torch.sigmoid(-margin_B)
