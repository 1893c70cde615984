"""The noise on the reference's log-probability of rejected responses (DNPO paper, section 4.3).

All kinds of noise have the same interface. From log p_r(y⁻|x) and the reference's hidden states they compute log
p̃_r(y⁻|x) twice: for the policy term and for the noise term. Some kinds have no parameters, so they are not trained.
Noise never affects the policy's log-probabilities or the chosen response.

Logits and noise are N × V numbers each, so they are computed one tile of the vocabulary at a time (see
``logprobs.py``), and again in the backward pass. The noise ε is drawn from seeds and not stored. A seed belongs to a
response and a training step, so ε does not depend on the sizes of micro-batches or tiles.

Shapes: B pairs, N rejected completion tokens of all pairs, H hidden size, V vocabulary, C entries of a tile of it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, logsigmoid

from dnpo.optimise.objective import NoisyReference
from dnpo.policy.logprobs import Head, Tally, product, sum_by_sequence, target_in, tiles
from dnpo.seeding import derive

KEPT = {"cpu": 7 * 2**25, "cuda": 2**31}  # bytes that are kept for the backward pass; the rest is recomputed
HIGH = math.sqrt(0.9)  # a standard deviation above this share of its bound counts as near the bound
BLOCK = {"cpu": 32, "cuda": 128}  # number of tokens of a response whose noise in a tile is drawn from one seed


class Rejected(NamedTuple):
    """The frozen reference's numbers for the rejected completion tokens of a batch.

    Attributes:
        hidden_NH: the last hidden states (after the final norm) that predict the tokens, response after response.
        head: the reference's output head.
        target_N: the tokens.
        lengths: number of tokens of each of the B responses.
        seeds: seeds of the noise, one for each response.
    """

    hidden_NH: Tensor
    head: Head
    target_N: Tensor
    lengths: Sequence[int]
    seeds: Sequence[int]


class NoiseModule(nn.Module):
    """The base class of noise on the reference's log-probability of rejected responses; ``parts.py`` creates them.

    Attributes:
        active: whether it changes the reference; metrics of noise are reported only if it does.
        reads_states: whether it needs the reference's hidden states, or only its log-probability.
        alpha: weight of the variance term.
        learning_rate: learning rate of Adam for the noise, if it is trained.
    """

    active = True
    reads_states = False

    def __init__(self, alpha: float = 0.0, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.alpha, self.learning_rate = alpha, learning_rate

    def forward(self, clean_B: Tensor, rejected: Rejected | None) -> tuple[NoisyReference, Tensor]:
        """Compute log p̃_r(y⁻|x) for both terms, and the share of all s² above 90 % of their bound.

        Args:
            clean_B: log p_r(y⁻|x) without noise.
            rejected: the reference's hidden states, if ``reads_states``.
        """
        raise NotImplementedError


class SilentModule(NoiseModule):
    """No noise: the policy term is the plain objective."""

    active = False

    def forward(self, clean_B: Tensor, rejected: Rejected | None) -> tuple[NoisyReference, Tensor]:
        """The clean log-probability, twice."""
        nothing = clean_B.new_zeros(())
        return NoisyReference(clean_B, clean_B, nothing), nothing


class TrainableModule(NoiseModule):
    """A standard deviation for every token position and vocabulary entry, log s = W h + b, trained against the policy.

    W starts at 0 and b at ``start_log_std``. The variance is bounded smoothly, s² = u·m / (u + m) = m · σ(log u − log
    m) with u = exp(2(W h + b)) and m = ``max_variance``: it follows u while u is small, and approaches m without
    reaching it. A hard clamp would have no gradient beyond the bound, and without a bound s² grows without limit.
    """

    reads_states = True

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        alpha: float = 0.1,
        max_variance: float = 1.0,
        learning_rate: float = 1e-3,
        start_log_std: float = -1.0,
    ) -> None:
        super().__init__(alpha, learning_rate)
        self.max_variance = max_variance
        self.weight_VH = nn.Parameter(torch.zeros(vocabulary, width))
        self.bias_V = nn.Parameter(torch.full((vocabulary,), start_log_std))

    def variance(self, hidden_NH: Tensor) -> Tensor:
        """The whole of s², shape N × V, to inspect it; training computes it in tiles."""
        log_u_NV = 2 * linear(hidden_NH.to(self.weight_VH.dtype), self.weight_VH, self.bias_V)
        return (logsigmoid(log_u_NV - math.log(self.max_variance)) + math.log(self.max_variance)).exp()

    def forward(self, clean_B: Tensor, rejected: Rejected | None) -> tuple[NoisyReference, Tensor]:
        """Both terms, and the share near the bound. Only ``noise_B`` and ``variance`` carry gradients."""
        assert rejected is not None, "trainable noise reads the reference's hidden states"
        apply: Any = _TrainedNoise.apply
        policy_N, noise_N, variance, at_bound = apply(self.weight_VH, self.bias_V, self.max_variance, rejected)
        lengths_B = torch.tensor(rejected.lengths, device=clean_B.device)
        policy_B, noise_B = (sum_by_sequence(logp_N, lengths_B) for logp_N in (policy_N, noise_N))
        return NoisyReference(policy_B, noise_B, variance), at_bound


class FixedModule(NoiseModule):
    """The same variance everywhere, not trained."""

    reads_states = True

    def __init__(self, *, variance: float) -> None:
        super().__init__()
        self.fixed = variance

    @torch.no_grad()
    def forward(self, clean_B: Tensor, rejected: Rejected | None) -> tuple[NoisyReference, Tensor]:
        """Both terms; nothing carries a gradient."""
        assert rejected is not None, "fixed noise reads the reference's hidden states"
        head, draw = rejected.head.cast(clean_B.device), _Draw(rejected, math.sqrt(self.fixed))
        terms = [Tally(rejected.target_N) for _ in range(2)]
        for first, end in tiles(head):
            logits_NC = head.tile(rejected.hidden_NH, first, end)
            for number, term in enumerate(terms):
                term.add(draw(logits_NC, first, number) + logits_NC, first)
        lengths_B = torch.tensor(rejected.lengths, device=clean_B.device)
        policy_B, noise_B = (sum_by_sequence(term.logps()[0], lengths_B) for term in terms)
        return NoisyReference(policy_B, noise_B, clean_B.new_tensor(self.fixed)), clean_B.new_zeros(())


class OffsetModule(NoiseModule):
    """The mean effect of noise as a constant.

    No gradient flows from ε to the policy, so noise affects it only as an offset of the margin. Here the offset is the
    same for every pair: log p̃_r(y⁻|x) = log p_r(y⁻|x) − ``shift``, and the margin shrinks by β · ``shift``.
    """

    def __init__(self, *, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, clean_B: Tensor, rejected: Rejected | None) -> tuple[NoisyReference, Tensor]:
        """The clean log-probability minus the shift, twice."""
        nothing, shifted_B = clean_B.new_zeros(()), clean_B - self.shift
        return NoisyReference(shifted_B, shifted_B, nothing), nothing


class _TrainedNoise(Function):
    """Trainable noise: log p̃ of each token for both terms, and mean(s²).

    Let x = 2(W h + b) − log m, r = √σ(x), and let ε have variance m. Then the noisy logits are z + r ε, and s² = m r².
    Let g be the gradient of log p̃ of a token, p̃ the noisy softmax, and c the gradient of mean(s²) divided by N V:

        ∂L/∂(W h + b)  =  g · (onehot − p̃) r σ(−x) ε  +  2 m c · r² σ(−x)

    g, c and the normalisation of p̃ are one number for each token. Everything else in both terms is known when a tile
    is computed, and is kept, up to ``KEPT`` bytes. A kept tile takes three products for each entry and token: z, x and
    the gradient of W. Other tiles are recomputed in the backward pass and take five.
    """

    @staticmethod
    def forward(
        ctx: Any, weight_VH: Tensor, bias_V: Tensor, max_variance: float, rejected: Rejected
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        make = _Tiles(weight_VH, bias_V, max_variance, rejected)
        to_policy, to_noise = Tally(rejected.target_N), Tally(rejected.target_N)
        total, signs = (weight_VH.new_zeros((), dtype=torch.float64) for _ in range(2))
        kept, room = {}, KEPT.get(weight_VH.device.type, KEPT["cuda"]) if any(ctx.needs_input_grad) else 0
        count = 0
        for first, end in tiles(make.head):
            logits_NC, root_NC, rest_NC = make.tile(first, end)
            noise_NC = make.draw(logits_NC, first, 0)
            to_policy.add_(noise_NC.mul_(root_NC).add_(logits_NC), first)
            make.draw(noise_NC, first, 1, out=noise_NC)
            noisy_NC = logits_NC.addcmul_(root_NC, noise_NC)
            total += torch.linalg.vector_norm(root_NC, dim=-1).square_().sum()  # autocast does not change its type
            count += noisy_NC.numel()
            signs += (root_NC - HIGH).sign_().sum()
            room -= noisy_NC.untyped_storage().nbytes() + root_NC.untyped_storage().nbytes()
            if room >= 0:
                most_N = to_noise.add_(noisy_NC, first)
                kept[first] = make.slopes(noisy_NC, root_NC, rest_NC, noise_NC, most_N, first)
            else:
                to_noise.add(noisy_NC, first)
            del logits_NC, root_NC, rest_NC, noise_NC, noisy_NC  # before the next tile is computed
        ctx.kept, ctx.make, ctx.lse_N = kept, make, to_noise.lse_N
        ctx.save_for_backward(weight_VH, bias_V)
        policy_N, noise_N = to_policy.logps()[0], to_noise.logps()[0]
        variance, at_bound = max_variance * total / max(count, 1), (count + signs) / max(2 * count, 1)
        ctx.mark_non_differentiable(policy_N, at_bound)
        return policy_N, noise_N, variance.to(weight_VH.dtype), at_bound

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, grad_N, grad_variance, _ = grads
        weight_VH, bias_V = ctx.saved_tensors
        make, target_N = ctx.make, ctx.make.rejected.target_N
        weight_grad_VH, bias_grad_V = torch.empty_like(weight_VH), torch.empty_like(bias_V)
        hidden_NH = make.rejected.hidden_NH
        pull = 2 * make.max_variance * grad_variance / max(len(hidden_NH) * len(weight_VH), 1)
        hidden_NH = hidden_NH.to(make.exponent.weight_VH.dtype)
        for first, end in tiles(make.head):
            made = ctx.kept.pop(first) if first in ctx.kept else make.slopes_again(first, end, ctx.lse_N)
            factor_N1 = (-grad_N * (made.less_N - ctx.lse_N).exp()).unsqueeze(-1)
            slope_NC = made.softmax_NC.mul_(factor_N1).addcmul_(made.variance_NC, pull)
            inside_N, at_N1 = target_in(slope_NC, target_N, first)
            slope_NC.scatter_add_(1, at_N1, (grad_N * made.own_N * inside_N).unsqueeze(-1))
            del made
            product(slope_NC.t().to(hidden_NH.dtype), hidden_NH, out=weight_grad_VH[first:end])
            torch.sum(slope_NC, 0, out=bias_grad_V[first:end])
        return weight_grad_VH, bias_grad_V, None, None


class _Slopes(NamedTuple):
    """The parts of a tile from which the gradient of W h + b is computed.

    Attributes:
        softmax_NC: exp(z + r ε − ``less_N``) r σ(−x) ε.
        less_N: a number that is subtracted so that the exponential neither overflows nor vanishes.
        own_N: r σ(−x) ε at the target, if the target is in this tile.
        variance_NC: r² σ(−x).
    """

    softmax_NC: Tensor
    less_N: Tensor
    own_N: Tensor
    variance_NC: Tensor


class _Tiles:
    """Computes the tiles of trainable noise, in the forward pass and again in the backward pass."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor, max_variance: float, rejected: Rejected) -> None:
        self.rejected, self.max_variance = rejected, max_variance
        self.head = rejected.head.cast(weight_VH.device)
        self.exponent = _exponent(weight_VH, bias_V, max_variance, self.head)
        self.doubled_NH = 2 * rejected.hidden_NH
        self.draw = _Draw(rejected, math.sqrt(max_variance))

    def tile(self, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """z, r and σ(−x)."""
        exponent_NC = self.exponent.tile(self.doubled_NH, first, end)
        rest_NC = exponent_NC.neg().sigmoid_()  # more exact than 1 − σ(x), which is rounded to 0 for large x
        return self.head.tile(self.rejected.hidden_NH, first, end), exponent_NC.sigmoid_().sqrt_(), rest_NC

    def slopes(
        self, softmax_NC: Tensor, root_NC: Tensor, rest_NC: Tensor, noise_NC: Tensor, less_N: Tensor, first: int
    ) -> _Slopes:
        """Compute the slopes of a tile from its tensors, which are overwritten."""
        rest_NC.mul_(root_NC)
        variance_NC = root_NC.mul_(rest_NC)
        noise_NC.mul_(rest_NC)
        _, at_N1 = target_in(noise_NC, self.rejected.target_N, first)
        return _Slopes(softmax_NC.mul_(noise_NC), less_N, noise_NC.gather(1, at_N1).squeeze(-1), variance_NC)

    def slopes_again(self, first: int, end: int, lse_N: Tensor) -> _Slopes:
        """Recompute the slopes of a tile that was not kept."""
        logits_NC, root_NC, rest_NC = self.tile(first, end)
        noise_NC = self.draw(logits_NC, first, 1)
        softmax_NC = logits_NC.addcmul_(root_NC, noise_NC).sub_(lse_N.unsqueeze(-1)).exp_()
        return self.slopes(softmax_NC, root_NC, rest_NC, noise_NC, lse_N, first)


def _exponent(weight_VH: Tensor, bias_V: Tensor, max_variance: float, head: Head) -> Head:
    """A head that maps 2h to 2(W h + b) − log m; its products have the type of the reference head's products."""
    half = head.weight_VH.dtype in (torch.bfloat16, torch.float16)
    weight_VH = weight_VH.detach().to(head.weight_VH.dtype if half else weight_VH.dtype)
    return Head(weight_VH, 2 * bias_V.detach() - math.log(max_variance))


class _Draw:
    """ε ~ N(0, std²), drawn independently for every token, entry and term; repeated calls give the same numbers."""

    def __init__(self, rejected: Rejected, std: float) -> None:
        device = rejected.hidden_NH.device
        self.std, self.generator = std, Generator(device)
        size = BLOCK.get(device.type, BLOCK["cuda"])
        self.blocks: list[tuple[int, int, int, int]] = []  # first token, one past the last, seed, number of the block
        start = 0
        for length, seed in zip(rejected.lengths, rejected.seeds, strict=True):
            for number, at in enumerate(range(0, length, size)):
                self.blocks.append((start + at, start + min(at + size, length), seed, number))
            start += length

    def __call__(self, like_NC: Tensor, first: int, term: int, out: Tensor | None = None) -> Tensor:
        """The noise of one term in the tile that begins at entry ``first``."""
        noise_NC = torch.empty_like(like_NC) if out is None else out
        for start, end, seed, number in self.blocks:
            self.generator.manual_seed(derive(seed, number, first, term))
            noise_NC[start:end].normal_(0.0, self.std, generator=self.generator)
        return noise_NC
