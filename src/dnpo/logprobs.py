"""Hidden states → exact log-probabilities of completion tokens.

Only the positions that predict a completion token go through the output head. Sums are float32 whatever the precision
of the matrix product: in bf16 a sum over a few hundred tokens is off by several times the early training signal.

Shapes: S sequences, T tokens of the longest, N completion tokens of all sequences, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Sequences:
    """Prompts with their completions, padded on the right, and where the completions are.

    Attributes:
        ids_ST: token ids, prompt then completion then padding.
        mask_ST: 1 on prompt and completion, 0 on padding.
        sequence_N: which sequence each completion token belongs to, in ascending order.
        position_N: the position whose hidden state predicts it: the one before it.
        target_N: its token id.
    """

    ids_ST: Tensor
    mask_ST: Tensor
    sequence_N: Tensor
    position_N: Tensor
    target_N: Tensor

    @property
    def count(self) -> int:
        """S."""
        return self.ids_ST.shape[0]

    def to(self, device: torch.device) -> "Sequences":
        """The same on another device."""
        return Sequences(
            *(t.to(device) for t in (self.ids_ST, self.mask_ST, self.sequence_N, self.position_N, self.target_N))
        )


def sequences(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> Sequences:
    """Lay prompts and completions out as right-padded rows.

    Args:
        prompts: S lists of token ids, none of them empty: the first completion token is predicted from the prompt.
        completions: S lists of token ids; an empty one contributes no token.
        pad_id: what fills the rows; it never counts.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    longest = max(map(len, rows))
    ids_ST = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask_ST = torch.zeros_like(ids_ST)
    for s, row in enumerate(rows):
        ids_ST[s, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask_ST[s, : len(row)] = 1
    lengths_S = torch.tensor([len(completion) for completion in completions])
    starts_S = torch.tensor([len(prompt) for prompt in prompts])
    sequence_N = torch.arange(len(rows)).repeat_interleave(lengths_S)
    first_S = lengths_S.cumsum(0) - lengths_S
    within_N = torch.arange(len(sequence_N)) - first_S[sequence_N]
    at_N = starts_S[sequence_N] + within_N
    return Sequences(ids_ST, mask_ST, sequence_N, at_N - 1, ids_ST[sequence_N, at_N])


def token_logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """The output head's logits in float32, shape N × V."""
    return linear(hidden_NH.to(weight_VH.dtype), weight_VH, bias_V).float()


def logp_of_targets(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """log softmax(logits)[target] of each token, shape N."""
    return logits_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1) - logits_NV.logsumexp(-1)


def sum_by_sequence(value_N: Tensor, sequence_N: Tensor, count: int) -> Tensor:
    """Sums of token values by sequence, shape S; a sequence without tokens has 0."""
    return torch.zeros(count, dtype=value_N.dtype, device=value_N.device).index_add(0, sequence_N, value_N)
