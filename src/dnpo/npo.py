"""The noise on the reference's confidence in rejected responses (DNPO paper, section 4.3).

Every kind answers the same call: from the reference's hidden states and logits at the rejected completion tokens it
gives log p̃_r(y⁻|x) twice, as the policy meets it and as the noise is trained on. Kinds without parameters simply have
nothing to train. Noise never touches the policy, nor the chosen response, and draws from a generator of its own.

Shapes: B pairs, N rejected completion tokens of all pairs, H hidden size, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear, logsigmoid

from dnpo.logprobs import logp_of_targets, sum_by_sequence
from dnpo.objective import NoisyReference
from dnpo.settings import Finite, NonNegative, Positive


class Rejected(NamedTuple):
    """The frozen reference on the rejected completion tokens of a batch.

    Attributes:
        hidden_NH: its last hidden states (after the final norm) that predict the tokens.
        logits_NV: its logits there, float32.
        target_N: the tokens.
        sequence_N: which of the B rejected responses each belongs to.
        clean_B: log p_r(y⁻|x) without noise.
    """

    hidden_NH: Tensor
    logits_NV: Tensor
    target_N: Tensor
    sequence_N: Tensor
    clean_B: Tensor


class Noise(nn.Module):
    """What ``npo=…`` configures.

    Attributes:
        active: whether it perturbs anything at all; only then are noise metrics worth reporting.
        alpha: weight of the variance term.
        learning_rate: of the noise's own optimizer (Adam), where there is something to train.
        max_variance: s² stays below it; infinity where nothing bounds it.
    """

    active = True

    def __init__(self, alpha: float = 0.0, learning_rate: float = 0.0, max_variance: float = math.inf) -> None:
        super().__init__()
        self.alpha, self.learning_rate, self.max_variance = alpha, learning_rate, max_variance

    def forward(self, rejected: Rejected, generator: Generator) -> tuple[NoisyReference, Tensor]:
        """log p̃_r(y⁻|x) for both terms, and s² of every entry (N × V, detached, or a scalar) for the metrics.

        Args:
            rejected: the reference on the rejected completion tokens.
            generator: where ε and ε′ are drawn from, on the device of the tensors.
        """
        raise NotImplementedError


class NoNoise(Noise):
    """Noise that adds nothing: the policy term is the plain objective."""

    active = False

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__()

    def forward(self, rejected: Rejected, generator: Generator) -> tuple[NoisyReference, Tensor]:
        """The clean log-probability, twice."""
        nothing = rejected.clean_B.new_zeros(())
        return NoisyReference(rejected.clean_B, rejected.clean_B, nothing), nothing


class TrainableNoise(Noise):
    """A standard deviation for every token position and vocabulary entry, log s = W h + b, trained against the policy.

    W starts at 0 and b at ``start_log_std``. The variance is bounded smoothly, s² = u·m / (u + m) with
    u = exp(2(W h + b)) and m = ``max_variance``: it follows u while u is small and approaches m without reaching it. A
    hard clamp would pass no gradient beyond the bound, and without a bound s² runs away.

    Args:
        alpha: weight of mean(s²) in the loss.
        max_variance: the bound m.
        learning_rate: of Adam, for W and b; constant.
        start_log_std: b at the start.
    """

    def __init__(
        self,
        hidden_size: int,
        vocabulary: int,
        *,
        alpha: NonNegative = 0.1,
        max_variance: Positive = 1.0,
        learning_rate: Positive = 1e-3,
        start_log_std: Finite = -1.0,
    ) -> None:
        super().__init__(alpha, learning_rate, max_variance)
        self.weight_VH = nn.Parameter(torch.zeros(vocabulary, hidden_size))
        self.bias_V = nn.Parameter(torch.full((vocabulary,), start_log_std))

    def variance(self, hidden_NH: Tensor) -> Tensor:
        """s², shape N × V."""
        return self._log_variance(hidden_NH).exp()

    def _log_variance(self, hidden_NH: Tensor) -> Tensor:
        """log s². In logarithms neither end loses its gradient: not where s² underflows, nor where it rounds to m."""
        log_u_NV = 2 * linear(hidden_NH.float(), self.weight_VH, self.bias_V)
        return logsigmoid(log_u_NV - math.log(self.max_variance)) + math.log(self.max_variance)

    def forward(self, rejected: Rejected, generator: Generator) -> tuple[NoisyReference, Tensor]:
        """See :class:`Noise`. Only ``noise_B`` and ``variance`` carry gradients."""
        log_variance_NV = self._log_variance(rejected.hidden_NH)
        variance_NV, std_NV = log_variance_NV.exp(), (log_variance_NV / 2).exp()
        policy_B = _perturbed(rejected, std_NV.detach(), generator)
        noise_B = _perturbed(rejected, std_NV, generator)
        return NoisyReference(policy_B, noise_B, variance_NV.mean()), variance_NV.detach()


class FixedNoise(Noise):
    """The same variance everywhere, not trained (the paper's ablation, N(0, 0.5) read as a variance)."""

    def __init__(self, hidden_size: int, vocabulary: int, *, variance: NonNegative = 0.5) -> None:
        super().__init__()
        self.fixed = variance

    def forward(self, rejected: Rejected, generator: Generator) -> tuple[NoisyReference, Tensor]:
        """See :class:`Noise`. Nothing carries a gradient."""
        variance = rejected.logits_NV.new_tensor(self.fixed)
        std_NV = variance.sqrt().expand_as(rejected.logits_NV)
        policy_B = _perturbed(rejected, std_NV, generator)
        noise_B = _perturbed(rejected, std_NV, generator)
        return NoisyReference(policy_B, noise_B, variance), variance


class Offset(Noise):
    """The control that the paper lacks: the mean effect of noise as a plain constant.

    The policy never meets ε, so noise acts on it as an offset of the margin. Here that offset is the same for every
    pair: log p̃_r(y⁻|x) = log p_r(y⁻|x) − ``shift``, and the margin shrinks by β · ``shift``.

    Args:
        shift: in nats; compare with the metric ``npo/shift`` of a run with noise.
    """

    def __init__(self, hidden_size: int, vocabulary: int, *, shift: Finite) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, rejected: Rejected, generator: Generator) -> tuple[NoisyReference, Tensor]:
        """The clean log-probability less the shift, twice."""
        nothing, shifted_B = rejected.clean_B.new_zeros(()), rejected.clean_B - self.shift
        return NoisyReference(shifted_B, shifted_B, nothing), nothing


def _perturbed(rejected: Rejected, std_NV: Tensor, generator: Generator) -> Tensor:
    """Σ_t log softmax(z_t + s_t ⊙ ε_t)[y_t] by sequence, with ε ~ N(0, 1) drawn anew for every entry. Shape B."""
    logits_NV = rejected.logits_NV
    noise_NV = torch.randn(logits_NV.shape, generator=generator, device=logits_NV.device, dtype=logits_NV.dtype)
    logp_N = logp_of_targets(logits_NV + std_NV * noise_NV, rejected.target_N)
    return sum_by_sequence(logp_N, rejected.sequence_N, len(rejected.clean_B))
