"""The equations of proximal policy optimization (Schulman et al. 2017) as pure functions.

Shapes: S responses of at most L tokens, padded on the right with zeros; N tokens of all responses. Log-probabilities
are in nats.
"""

import torch
from torch import Tensor

TINY = 1e-8  # keeps a variance of 0 from dividing by 0


def token_rewards(score_S: Tensor, logp_SL: Tensor, reference_SL: Tensor, length_S: Tensor, *, beta: float) -> Tensor:
    """The score at the last token, and at every token −β (log π − log π_ref). Shape S × L.

    A response's rewards add up to its score minus β times its log-ratio, so the policy with the largest expected sum is
    π_ref · exp(score / β), normalised.

    Args:
        score_S: scores of the responses.
        logp_SL: log-probabilities of the tokens under the policy that responded.
        reference_SL: the same under the reference.
        length_S: number of tokens of each response, at least 1.
        beta: weight of the log-ratio.
    """
    last_S1 = (length_S - 1).unsqueeze(-1)
    return (-beta * (logp_SL - reference_SL)).scatter_add(1, last_S1, score_S.unsqueeze(-1).to(logp_SL.dtype))


def advantages(reward_SL: Tensor, value_SL: Tensor, *, discount: float, trace: float) -> Tensor:
    """Generalized advantage estimates: A_t = δ_t + γλ A_{t+1} with δ_t = r_t + γ V_{t+1} − V_t. Shape S × L.

    Schulman et al. 2016, equation 16. After the last token the value is 0, also of a response that was cut. With λ = 1
    an advantage is the discounted sum of later rewards, minus the value; with λ = 0 it is δ.

    Args:
        reward_SL: rewards; 0 in the padding.
        value_SL: values before each token; 0 in the padding.
        discount: γ.
        trace: λ.
    """
    zero_S1 = torch.zeros_like(value_SL[:, :1])
    delta_SL = reward_SL + discount * torch.cat([value_SL[:, 1:], zero_S1], 1) - value_SL
    advantage_S = zero_S1.squeeze(1)
    columns = []
    for delta_S in reversed(delta_SL.unbind(1)):
        advantage_S = delta_S + discount * trace * advantage_S
        columns.append(advantage_S)
    return torch.stack(columns[::-1], 1)


def whiten(value_N: Tensor) -> Tensor:
    """Shift values to mean 0 and scale them to variance 1; equal values become 0. Shape N."""
    return (value_N - value_N.mean()) * (value_N.var(correction=0) + TINY).rsqrt()


def policy_loss(logp_N: Tensor, old_N: Tensor, advantage_N: Tensor, *, clip: float) -> Tensor:
    """−min(ρ A, clamp(ρ, 1 − ε, 1 + ε) A) of each token, with ρ = π / π_old. Schulman et al. 2017, equation 7. Shape N.

    Args:
        logp_N: log-probabilities under the policy in training.
        old_N: the same under the policy that responded.
        advantage_N: advantages.
        clip: ε; infinite for −ρ A.
    """
    ratio_N = (logp_N - old_N).exp()
    return -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N)


def is_clipped(logp_N: Tensor, old_N: Tensor, advantage_N: Tensor, *, clip: float) -> Tensor:
    """1 where :func:`policy_loss` has no gradient because the ratio is clipped, 0 elsewhere. Shape N."""
    ratio_N = (logp_N - old_N).exp()
    up_N, down_N = (ratio_N > 1 + clip) & (advantage_N > 0), (ratio_N < 1 - clip) & (advantage_N < 0)
    return (up_N | down_N).to(logp_N.dtype)


def value_loss(value_N: Tensor, old_N: Tensor, return_N: Tensor, *, clip: float) -> Tensor:
    """½ max((V − R)², (V′ − R)²) of each token, with V′ = V_old + clamp(V − V_old, −ε, ε). Shape N.

    Args:
        value_N: values by the head in training.
        old_N: its values when the policy responded.
        return_N: the targets R.
        clip: ε; infinite for ½ (V − R)².
    """
    near_N = old_N + (value_N - old_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_N - return_N).square(), (near_N - return_N).square())


def divergence(logp_N: Tensor, old_N: Tensor) -> Tensor:
    """ρ − 1 − log ρ of each token, which is never negative; its mean over tokens of π_old estimates KL(π_old ‖ π).

    Schulman 2020, "Approximating KL divergence", k₃.
    """
    gap_N = logp_N - old_N
    return gap_N.expm1() - gap_N


def explained_variance(value_N: Tensor, return_N: Tensor) -> float:
    """1 − Var(R − V) / Var(R): 1 for exact values, 0 for constant ones; 0 also if R does not vary."""
    variance = return_N.var(correction=0)
    return float(1 - (return_N - value_N).var(correction=0) / variance) if variance > 0 else 0.0
