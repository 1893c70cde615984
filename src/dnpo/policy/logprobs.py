"""Compute exact log-probabilities of completion tokens from hidden states, in memory independent of the vocabulary.

Every loss is computed from them. The logits of N completion tokens are N × V numbers, by far the largest tensor of a
training, and they are read only twice. So they are computed one tile of the vocabulary at a time, added to a
log-sum-exp, and recomputed in the backward pass. There is one matrix product per tile for up to ``ROWS`` tokens, so
each row of the head's gradient is summed within one product, in float32.

Sums are float32 for any precision of the matrix products: in bf16 the error of a sum over a few hundred tokens is
several times the early training signal. With float64 inputs everything is float64, for tests.

Shapes: S sequences, N completion tokens of all sequences, H hidden size, V vocabulary, C entries of a tile of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ROWS = 8192  # maximum number of tokens in one product; more would not be faster, and tiles would grow with the batch
TILE = {"cpu": 1024, "cuda": 8192}  # vocabulary entries of one product
APART = 16  # extra numbers between the rows of a tile, if rows would begin whole pages apart
KEPT = {"cpu": 3 * 2**24, "cuda": 2**30}  # bytes of logits that are kept for the backward pass, not recomputed


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap · tanh(scale · (h Wᵀ + b) / cap).

    Attributes:
        weight_VH: W.
        bias_V: b, if there is one.
        scale: factor that some model families apply to logits.
        cap: bound that some model families apply by tanh; infinite if there is none.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float = float("inf")

    def detach(self) -> "Head":
        """The head with the same weights, detached: no gradient flows through them."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    def frozen(self) -> "Head":
        """A detached copy, which does not change when this head is trained."""
        bias_V = None if self.bias_V is None else self.bias_V.detach().clone()
        return replace(self, weight_VH=self.weight_VH.detach().clone(), bias_V=bias_V)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """All logits at once, shape N × V, without gradients; used to inspect them, not in training."""
        return self.cast(hidden_NH.device).tile(hidden_NH.detach(), 0, len(self.weight_VH))

    def cast(self, device: torch.device) -> "Head":
        """The head in the type of its matrix products (bf16 under autocast), detached."""
        weight_VH = self.weight_VH.detach()
        if torch.is_autocast_enabled(device.type):
            weight_VH = weight_VH.to(torch.get_autocast_dtype(device.type))
        return replace(self, weight_VH=weight_VH, bias_V=None if self.bias_V is None else self.bias_V.detach())

    def tile(self, hidden_NH: Tensor, first: int, end: int) -> Tensor:
        """The logits of the entries from ``first`` to ``end``, shape N × C; the head must come from :meth:`cast`."""
        bias_C = None if self.bias_V is None else self.bias_V[first:end]
        out_NC = _empty_tile(hidden_NH, self.weight_VH.dtype, end - first)
        logits_NC = product(hidden_NH.to(self.weight_VH.dtype), self.weight_VH[first:end].t(), plus=bias_C, out=out_NC)
        if self.scale != 1:
            logits_NC *= self.scale
        if self.cap != float("inf"):
            logits_NC.div_(self.cap).tanh_().mul_(self.cap)
        return logits_NC

    def softmax_(self, logits_NC: Tensor, lse_N: Tensor) -> Tensor:
        """Compute exp(logits − lse). This is in place, unless the cap still needs the logits."""
        own_NC = logits_NC if self.cap == float("inf") else logits_NC.clone()
        return own_NC.sub_(lse_N.unsqueeze(-1)).exp_()

    def back_(self, error_NC: Tensor, logits_NC: Tensor) -> Tensor:
        """Propagate the gradient of a tile's logits through the cap, in place; the caller applies the scale."""
        return error_NC if self.cap == float("inf") else error_NC.mul_(1 - (logits_NC / self.cap).square())


def token_logps(hidden_NH: Tensor, head: Head, target_N: Tensor) -> Tensor:
    """log softmax(logits)[target] of each token, shape N, float32.

    Gradients flow to the hidden states and, if they require it, to the head's weight and bias.

    Args:
        hidden_NH: the last hidden states that predict the tokens, in any floating type.
        head: the output head.
        target_N: the tokens.
    """
    if not torch.is_grad_enabled():  # without a backward pass no tile needs to be kept
        hidden_NH, head = hidden_NH.detach(), head.detach()
    apply: Any = _TokenLogps.apply
    blocks = list(zip(torch.split(hidden_NH, ROWS), torch.split(target_N, ROWS), strict=True))
    room = KEPT.get(hidden_NH.device.type, KEPT["cuda"]) // len(blocks)
    parts = [apply(hidden_nH, head.weight_VH, head.bias_V, target_n, head, room) for hidden_nH, target_n in blocks]
    logp_N: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    return logp_N


class _TokenLogps(Function):
    """log softmax(logits)[target]; tiles of logits beyond ``KEPT`` bytes are recomputed in the backward pass.

    With d = softmax − onehot(target), the gradient of the logits is −g d. The factor g is one number for each token, so
    it is applied to the N × H side of each product, never to an N × C tile. Each entry and token takes four products if
    the head is trained, or three (the minimum) in a kept tile. With a frozen head there are two products, because d W
    does not depend on g: it is computed in the forward pass, and rescaled when the log-sum-exp grows.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor, head: Head, room: int
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        trains = needs_weight or needs_bias
        head = head.cast(hidden_NH.device)
        tally, mean, kept = Tally(target_N), None, {}
        for first, end in tiles(head):
            logits_NC = head.tile(hidden_NH, first, end)
            room -= logits_NC.untyped_storage().nbytes()
            if trains and room >= 0:
                kept[first] = logits_NC
                tally.add(logits_NC, first)
            elif needs_hidden and not trains:
                tally.add(logits_NC, first)
                mean = mean or _Mean(hidden_NH, tally.lse_N)
                mean.add(logits_NC, tally, head, first, end)
            else:
                tally.add_(logits_NC, first)
            del logits_NC  # before the next tile is computed
        logp_N, lse_N = tally.logps()
        unit_NH = None if mean is None else mean.less_target(tally, head)
        ctx.head, ctx.kept = head, kept
        ctx.save_for_backward(hidden_NH, target_N, lse_N, unit_NH)
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, target_N, lse_N, unit_NH = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head, minus_N1 = ctx.head, -ctx.head.scale * grad_N.unsqueeze(-1).to(lse_N.dtype)
        if unit_NH is not None:
            return (unit_NH * minus_N1).to(hidden_NH.dtype), None, None, None, None, None
        weighted_NH = (hidden_NH * minus_N1).to(head.weight_VH.dtype)
        hidden_grad_NH = torch.zeros_like(hidden_NH, dtype=lse_N.dtype) if needs_hidden else None
        weight_grad_VH = lse_N.new_empty(head.weight_VH.shape) if needs_weight else None
        bias_grad_V = lse_N.new_empty(len(head.weight_VH)) if needs_bias else None
        for first, end in tiles(head):
            logits_NC = ctx.kept.pop(first) if first in ctx.kept else head.tile(hidden_NH, first, end)
            error_NC = head.softmax_(logits_NC, lse_N)
            subtract_one_at_(error_NC, target_N, first)
            head.back_(error_NC, logits_NC)
            if hidden_grad_NH is not None:
                add_product_(hidden_grad_NH, error_NC, head.weight_VH[first:end])
            if weight_grad_VH is not None:
                product(error_NC.t().to(weighted_NH.dtype), weighted_NH, out=weight_grad_VH[first:end])
            if bias_grad_V is not None:
                torch.mv(error_NC.t(), minus_N1.squeeze(-1), out=bias_grad_V[first:end])
        if hidden_grad_NH is not None:
            hidden_grad_NH = hidden_grad_NH.mul_(minus_N1).to(hidden_NH.dtype)
        return hidden_grad_NH, weight_grad_VH, bias_grad_V, None, None, None


class _Mean:
    """Accumulates Σ_v softmax_v W_v for every token, with the cap's slope; rescales when the log-sum-exp grows."""

    def __init__(self, hidden_NH: Tensor, lse_N: Tensor) -> None:
        self.mean_NH = torch.zeros_like(hidden_NH, dtype=lse_N.dtype)
        self.lse_N = lse_N

    def add(self, logits_NC: Tensor, tally: "Tally", head: Head, first: int, end: int) -> None:
        """Add the tile that was last added to ``tally``; the tile's logits are overwritten."""
        self.mean_NH *= (self.lse_N - tally.lse_N).exp_().unsqueeze(-1)
        self.lse_N = tally.lse_N
        part_NC = head.back_(head.softmax_(logits_NC, self.lse_N), logits_NC)
        add_product_(self.mean_NH, part_NC, head.weight_VH[first:end])

    def less_target(self, tally: "Tally", head: Head) -> Tensor:
        """d W: the mean minus the target's row."""
        own_NH = head.weight_VH[tally.target_N].to(self.mean_NH.dtype)
        logit_N1 = tally.logit_N.unsqueeze(-1)
        return self.mean_NH.sub_(own_NH * head.back_(torch.ones_like(logit_N1), logit_N1))


class Tally:
    """Accumulates log softmax(logits)[target] for every token, one tile of logits at a time.

    Attributes:
        target_N: the tokens.
        logit_N: their logits; only those in tiles that are already added are valid.
        lse_N: the log-sum-exp over the tiles added so far.
    """

    def __init__(self, target_N: Tensor) -> None:
        self.target_N = target_N
        self.logit_N = self.lse_N = torch.full(target_N.shape, float("-inf"), device=target_N.device)

    def add(self, logits_NC: Tensor, first: int) -> None:
        """Add the tile that begins at entry ``first``."""
        inside_N, at_N1 = target_in(logits_NC, self.target_N, first)
        self.logit_N = torch.where(inside_N, logits_NC.gather(1, at_N1).squeeze(-1), self.logit_N)
        self.lse_N = torch.logaddexp(self.lse_N, logits_NC.logsumexp(-1))

    def add_(self, logits_NC: Tensor, first: int) -> Tensor:
        """Add a tile and overwrite it with exp(logits − m); returns m, the largest logit of each token so far."""
        inside_N, at_N1 = target_in(logits_NC, self.target_N, first)
        self.logit_N = torch.where(inside_N, logits_NC.gather(1, at_N1).squeeze(-1), self.logit_N)
        most_N = logits_NC.amax(-1)
        logits_NC.sub_(most_N.unsqueeze(-1)).exp_()
        self.lse_N = torch.logaddexp(self.lse_N, most_N + logits_NC.sum(-1).log())
        return most_N

    def logps(self) -> tuple[Tensor, Tensor]:
        """log softmax[target] and the log-sum-exp, once all tiles are added."""
        return self.logit_N - self.lse_N, self.lse_N


def tiles(head: Head) -> Iterator[tuple[int, int]]:
    """Yield the tiles of the vocabulary as (first entry, one past the last)."""
    entries = len(head.weight_VH)
    size = TILE.get(head.weight_VH.device.type, TILE["cuda"])
    yield from ((first, min(first + size, entries)) for first in range(0, entries, size))


def _empty_tile(hidden_NH: Tensor, dtype: torch.dtype, entries: int) -> Tensor | None:
    """Allocate a tile of logits on a CPU; None: its product allocates it.

    Rows that begin whole pages apart collide in the caches, which makes a product a tenth slower, so such rows get gaps
    between them.
    """
    if hidden_NH.device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return None
    rows_N = hidden_NH.new_empty(len(hidden_NH), entries + APART * (entries % 1024 == 0), dtype=dtype)
    return rows_N[:, :entries]


def target_in(value_NC: Tensor, target_N: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Whether each target is in the tile that begins at ``first``, and its column (N × 1; arbitrary if it is not)."""
    within_N = target_N - first
    inside_N = (within_N >= 0) & (within_N < value_NC.shape[1])
    return inside_N, within_N.clamp(0, value_NC.shape[1] - 1).unsqueeze(-1)


def subtract_one_at_(value_NC: Tensor, target_N: Tensor, first: int) -> None:
    """Subtract 1 at the target if it is in the tile that begins at entry ``first``."""
    inside_N, at_N1 = target_in(value_NC, target_N, first)
    value_NC.scatter_add_(1, at_N1, -inside_N.unsqueeze(-1).to(value_NC.dtype))


def product(one: Tensor, other: Tensor, *, plus: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """A product of two matrices of the same type, plus a row if given, in float32 (float64 for float64)."""
    if one.dtype in (torch.float32, torch.float64):
        return torch.mm(one, other, out=out) if plus is None else torch.addmm(plus.to(one.dtype), one, other, out=out)
    # For half types, some devices return the product's float32 sums without rounding.
    result = torch.mm(one, other, out_dtype=torch.float32) if one.is_cuda else torch.mm(one, other).float()
    if plus is not None:
        result += plus
    return result if out is None else out.copy_(result)


def add_product_(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Compute ``total += one @ other``, with the product in the second matrix's type."""
    if other.dtype in (torch.float32, torch.float64):
        torch.addmm(total, one, other, out=total)
    else:
        total += product(one.to(other.dtype), other)


def sum_by_sequence(value_N: Tensor, lengths_S: Tensor) -> Tensor:
    """Sum token values by sequence, shape S; a sequence without tokens gets 0.

    Values are added in order, in float64, so on every device a sum depends only on the values in it.

    Args:
        value_N: values of the tokens of all sequences, sequence after sequence.
        lengths_S: number of tokens of each sequence.
    """
    reduce: Any = torch.segment_reduce
    sum_S: Tensor = reduce(value_N.double(), "sum", lengths=lengths_S, initial=0.0, unsafe=True)
    return sum_S.to(value_N.dtype)
