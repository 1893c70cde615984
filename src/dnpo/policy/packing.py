"""Pack sequences end to end into one row without padding, with attention that keeps them apart.

All layers except attention work on single tokens, so they need no padding; positions start again with every sequence.
Only attention needs separate sequences. With half-precision tensors on a GPU it is variable-length attention. Otherwise
it runs on batches of sequences of similar length, padded on the right, where causal attention does not read.

A prompt can be computed once for both responses of a pair, or for several samples: its tokens are in the row once, and
belong to each of these sequences.

Shapes: S sequences, T tokens of the row, M tokens of all sequences (T, if no prompt is shared), N completion tokens,
L tokens of the longest sequence of a batch, h heads, d their size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "packed"  # the name of the attention below in transformers
WASTE = 2**14  # number of query-key products of padding that costs about as much as one more batch


@dataclass(frozen=True, eq=False)
class Packed:
    """Prompts with their completions in one row.

    Attributes:
        ids_T: token ids.
        position_T: the position of each token in its sequence.
        tokens_M: the tokens of each sequence, as indices in the row, sequence after sequence.
        place_T: index in ``tokens_M`` of each token's first occurrence.
        again_X: for each further occurrence in ``tokens_M``, the token's index in the row.
        second_X: for each further occurrence, its index in ``tokens_M``.
        predict_N: indices of the hidden states that predict the completion tokens, sequence after sequence.
        target_N: the completion tokens' ids.
        completions_S: number of completion tokens of each sequence.
        lengths: number of tokens of each sequence, including the prompt.
        completions: ``completions_S`` as plain numbers.
    """

    ids_T: Tensor
    position_T: Tensor
    tokens_M: Tensor
    place_T: Tensor
    again_X: Tensor
    second_X: Tensor
    predict_N: Tensor
    target_N: Tensor
    completions_S: Tensor
    lengths: tuple[int, ...]
    completions: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of sequences, S."""
        return len(self.lengths)

    def to(self, device: torch.device) -> Self:
        """Return it with all tensors on another device."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) for n, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    @cached_property
    def batches(self) -> "list[PaddedBatch]":
        """The padded batches, each of sequences of similar length, the longest first."""
        starts = [0, *accumulate(self.lengths)]
        order = sorted(range(self.count), key=lambda s: -self.lengths[s])
        batches = []
        while order:
            longest, waste, some = self.lengths[order[0]], 0, []
            for s in order:
                waste += longest**2 - self.lengths[s] ** 2
                if waste > WASTE:
                    break
                some.append(s)
            order = order[len(some) :]
            batches.append(PaddedBatch(longest, [(starts[s], self.lengths[s]) for s in some]))
        return batches

    @cached_property
    def spread(self) -> "Spread":
        """The mapping of tokens of the row to the padded batches and back."""
        at_of_M = torch.empty(len(self.tokens_M), dtype=torch.long)
        sources, offset = [], 0
        for batch in self.batches:
            for row, (start, length) in enumerate(batch.sequences):
                at = offset + row * batch.longest
                at_of_M[start : start + length] = torch.arange(at, at + length)
                padding = torch.full((batch.longest - length,), start)
                sources.append(torch.cat([torch.arange(start, start + length), padding]))
            offset += len(batch.sequences) * batch.longest
        device = self.ids_T.device
        at_of_M, source = at_of_M.to(device), torch.cat(sources).to(device)
        return Spread(self.tokens_M[source], at_of_M[self.place_T], self.again_X, at_of_M[self.second_X])

    @cached_property
    def cumulative(self) -> Tensor:
        """The start of each sequence among the M tokens, and the end of the last one: S + 1 numbers."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.ids_T.device)


class PaddedBatch(NamedTuple):
    """A padded batch: the length of its rows and, for each sequence, (index of its first token among the M, length)."""

    longest: int
    sequences: list[tuple[int, int]]


class Spread(NamedTuple):
    """A mapping of the row's tokens to places in padded batches, and back.

    Attributes:
        source: the token for each place.
        place_T: the first place of each token.
        again_X: for each further place, its token.
        second_X: the further places.
    """

    source: Tensor
    place_T: Tensor
    again_X: Tensor
    second_X: Tensor


def pack(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, share_prompt: bool = False
) -> Packed:
    """Pack prompts and completions into one row.

    Args:
        prompts: S lists of token ids; none may be empty, since the prompt predicts the first completion token.
        completions: S lists of token ids; they may be empty.
        share_prompt: whether to pack each prompt once; then the second half of the sequences must have the prompts of
            the first half. This changes results only by rounding.

    Raises:
        ValueError: the two halves have different prompts, although ``share_prompt`` is set.
    """
    pairs = len(prompts) // 2 if share_prompt else 0
    if share_prompt and list(prompts[:pairs]) != list(prompts[pairs:]):
        raise ValueError("share_prompt: the second half of the sequences must have the prompts of the first half")
    first = [s - pairs if pairs and s >= pairs else s for s in range(len(prompts))]
    return pack_shared(prompts, completions, first)


def pack_shared(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], first: Sequence[int]) -> Packed:
    """Pack prompts and completions into one row; a prompt that several sequences share is packed once.

    Args:
        prompts, completions: as in :func:`pack`.
        first: for each sequence, the number of the earlier sequence whose prompt it shares, or else its own number.

    Raises:
        ValueError: ``first`` names a later sequence, or one with another prompt.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    if any(s < keeper or first[keeper] != keeper or prompts[s] != prompts[keeper] for s, keeper in enumerate(first)):
        raise ValueError(
            "first: expected each sequence's own number, or that of an earlier one that has its own and the same prompt"
        )
    ids: list[int] = []
    positions: list[int] = []
    places: list[list[int]] = []  # the places of each sequence's tokens in the row
    for s, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        shared = len(prompt) if first[s] < s else 0
        begins = len(ids) - shared
        places.append([*(places[first[s]][:shared] if shared else []), *range(begins + shared, begins + len(row))])
        ids += row[shared:]
        positions += range(shared, len(row))
    lengths = tuple(map(len, rows))
    tokens_M = torch.tensor([place for some in places for place in some], dtype=torch.long)
    starts = [0, *accumulate(lengths)]
    sharing = [s for s in range(len(rows)) if first[s] < s]
    again = [place for s in sharing for place in places[s][: len(prompts[s])]]
    second = [starts[s] + t for s in sharing for t in range(len(prompts[s]))]
    first_M = torch.ones(len(tokens_M), dtype=torch.bool)
    first_M[second] = False
    place_T = torch.empty(len(ids), dtype=torch.long)
    place_T[tokens_M[first_M]] = first_M.nonzero().squeeze(-1)
    predict = [place for some, prompt in zip(places, prompts, strict=True) for place in some[len(prompt) - 1 : -1]]
    return Packed(
        ids_T=torch.tensor(ids, dtype=torch.long),
        position_T=torch.tensor(positions, dtype=torch.long),
        tokens_M=tokens_M,
        place_T=place_T,
        again_X=torch.tensor(again, dtype=torch.long),
        second_X=torch.tensor(second, dtype=torch.long),
        predict_N=torch.tensor(predict, dtype=torch.long),
        target_N=torch.tensor([i for completion in completions for i in completion], dtype=torch.long),
        completions_S=torch.tensor([len(completion) for completion in completions]),
        lengths=lengths,
        completions=tuple(map(len, completions)),
    )


# --- attention --------------------------------------------------------------------------------------------------------


def register() -> None:
    """Register the attention with transformers, for models whose implementation is set to ``ATTENTION``."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its layout differs by batch; each would be compiled again
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packing: Packed | None = None,
    windows: set[int | None] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention, called by transformers in every layer: inputs 1 × h × T × d, output 1 × T × h × d.

    Without ``packing``, as in generation, it is scaled dot-product attention with the given mask. If a set ``windows``
    is given, each packed call adds its sliding window to it (None: no window).
    """
    if packing is None:
        if softcap is not None:
            causal = attention_mask is None and query.shape[2] > 1
            return _attend_with_cap(query, key, value, attention_mask, scaling, softcap, causal).transpose(1, 2), None
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found, None
    if dropout:
        raise ValueError("attention dropout is on; every dropout must be 0")
    if windows is not None:
        windows.add(sliding_window)
    if torch.is_autocast_enabled(query.device.type):  # rotary positions have converted queries and keys to float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    query_TD, key_TD, value_TD = (x.squeeze(0).transpose(0, 1).flatten(1) for x in (query, key, value))
    heads, key_heads = query.shape[1], key.shape[1]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None:
        out_TD = _variable_length(query_TD, key_TD, value_TD, heads, key_heads, packing, scaling, sliding_window)
    else:
        out_TD = _in_batches(query_TD, key_TD, value_TD, heads, key_heads, packing, scaling, sliding_window, softcap)
    return out_TD.view(1, len(out_TD), heads, -1), None


def _variable_length(
    query_TD: Tensor,
    key_TD: Tensor,
    value_TD: Tensor,
    heads: int,
    key_heads: int,
    packing: Packed,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The device's variable-length attention over the M tokens."""
    from torch.nn.attention.varlen import varlen_attn

    spread = Spread(packing.tokens_M, packing.place_T, packing.again_X, packing.second_X)
    shared = len(packing.again_X) > 0
    query_MD, key_MD, value_MD = (_spread(x, spread) if shared else x for x in (query_TD, key_TD, value_TD))
    longest = max(packing.lengths)
    key_Mhd, value_Mhd = (
        x.view(len(x), key_heads, -1).repeat_interleave(heads // key_heads, 1) for x in (key_MD, value_MD)
    )
    out_Mhd: Any = varlen_attn(
        query_MD.view(len(query_MD), heads, -1),
        key_Mhd,
        value_Mhd,
        packing.cumulative,
        packing.cumulative,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    out_MD: Tensor = out_Mhd.flatten(1)
    return _gather(out_MD, packing.place_T) if shared else out_MD


def _in_batches(
    query_TD: Tensor,
    key_TD: Tensor,
    value_TD: Tensor,
    heads: int,
    key_heads: int,
    packing: Packed,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention in batches of sequences of similar length; causal attention ignores their padding on the right."""
    sizes = [len(b.sequences) * b.longest for b in packing.batches]
    spread = packing.spread
    parts = zip(
        packing.batches, *(torch.split(_spread(x, spread), sizes) for x in (query_TD, key_TD, value_TD)), strict=True
    )
    outputs = []
    for batch, *parted in parts:
        query_ShLd, key_ShLd, value_ShLd = (
            x.view(len(batch.sequences), batch.longest, n, -1).transpose(1, 2)
            for x, n in zip(parted, (heads, key_heads, key_heads), strict=True)
        )
        narrow = window is not None and window < batch.longest
        mask_LL = _band(batch.longest, window, query_TD.device) if narrow and window is not None else None
        if softcap is not None:
            out_ShLd = _attend_with_cap(query_ShLd, key_ShLd, value_ShLd, mask_LL, scaling, softcap, mask_LL is None)
        else:
            out_ShLd = scaled_dot_product_attention(
                query_ShLd,
                key_ShLd,
                value_ShLd,
                attn_mask=mask_LL,
                is_causal=mask_LL is None,
                scale=scaling,
                enable_gqa=heads != key_heads,
            )
        outputs.append(out_ShLd.transpose(1, 2).flatten(2).flatten(0, 1))
    return _gather(torch.cat(outputs), spread.place_T)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """The mask of a sliding window: a query sees its token and the ``window`` − 1 tokens before it. Shape L × L."""
    back_LL = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return (back_LL >= 0) & (back_LL < window)


def _attend_with_cap(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, cap: float, causal: bool
) -> Tensor:
    """Attention with scores bounded by cap · tanh(· / cap), which no fused kernel offers."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = cap * torch.tanh(scores / cap)
    if causal:
        mask = _band(query.shape[2], query.shape[2], query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype) @ value


# --- copies with their gradients --------------------------------------------------------------------------------------


def _spread(value_TD: Tensor, spread: Spread) -> Tensor:
    apply: Any = _Spread.apply
    result: Tensor = apply(value_TD, spread)
    return result


def _gather(value_MD: Tensor, place_T: Tensor) -> Tensor:
    apply: Any = _Gather.apply
    result: Tensor = apply(value_MD, place_T)
    return result


class _Spread(Function):
    """Copy tokens to their places. Backward gathers instead of adding by index: it is faster and deterministic.

    The gradient at padding is ignored, since nothing depends on padding.
    """

    @staticmethod
    def forward(ctx: Any, value_TD: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return value_TD.index_select(0, spread.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD = grad.index_select(0, ctx.spread.place_T)
        if len(ctx.spread.again_X):
            grad_TD.index_add_(0, ctx.spread.again_X, grad.index_select(0, ctx.spread.second_X))
        return grad_TD, None


class _Gather(Function):
    """Copy each token from its first place. Backward writes the gradient there, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, value_MD: Tensor, place_T: Tensor) -> Tensor:
        ctx.place_T, ctx.shape = place_T, value_MD.shape
        return value_MD.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return grad_TD.new_zeros(ctx.shape).index_copy_(0, ctx.place_T, grad_TD), None
