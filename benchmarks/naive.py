"""A plain implementation: pad, run the whole model, full float32 logits, log-softmax, gather.

It covers DPO, and NPO with the mathematics of ``dnpo.optimise.npo`` (log s = W h + b, s² = u·m / (u + m)), and does not
save memory. Shapes: S = 2B sequences, the chosen ones first; L tokens of the longest; N completion tokens;
V vocabulary; H hidden.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax, logsigmoid
from torch.optim import Adam

from benchmarks.problem import Pairs
from benchmarks.variant import ALPHA, BETA, MAX_VARIANCE, NOISE_LEARNING_RATE, START_LOG_STD, Variant


class Padded:
    """A batch as right-padded rows.

    Attributes:
        ids_SL: token ids.
        mask_SL: 1 at tokens, 0 at padding.
        completion_SL: true on completion tokens.
    """

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        rows = pairs.sequences
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        self.ids_SL = torch.zeros(len(rows), longest, dtype=torch.long)
        self.mask_SL = torch.zeros_like(self.ids_SL)
        self.completion_SL = torch.zeros(len(rows), longest, dtype=torch.bool)
        for s, (prompt, response) in enumerate(rows):
            length = len(prompt) + len(response)
            self.ids_SL[s, :length] = torch.tensor(prompt + response)
            self.mask_SL[s, :length] = 1
            self.completion_SL[s, len(prompt) : length] = True
        self.ids_SL, self.mask_SL, self.completion_SL = (
            t.to(device) for t in (self.ids_SL, self.mask_SL, self.completion_SL)
        )

    def select_rejected(self) -> "Padded":
        """The rows of the rejected responses."""
        half = copy.copy(self)
        for name in ("ids_SL", "mask_SL", "completion_SL"):
            setattr(half, name, getattr(self, name).chunk(2)[1])
        return half

    def completions(self, value_SL: Tensor) -> Tensor:
        """Select the positions that predict completion tokens, one before each; shape N × …"""
        return value_SL[:, :-1][self.completion_SL[:, 1:]]

    @property
    def target_N(self) -> Tensor:
        """The completion tokens."""
        return self.ids_SL[self.completion_SL]

    def sums(self, value_N: Tensor) -> Tensor:
        """Sum values of completion tokens by sequence; shape S."""
        sequence_N = self.completion_SL.nonzero()[:, 0]
        return value_N.new_zeros(len(self.ids_SL)).index_add(0, sequence_N, value_N)


class Naive(Variant):
    """DPO or NPO on padded rows with full logits."""

    def __init__(self, objective: str, reference: str, **setting: Any) -> None:
        super().__init__(objective, reference, **setting)
        adapters = hasattr(self.model, "peft_config")
        self._frozen: nn.Module = self.model if adapters else copy.deepcopy(self.model).requires_grad_(False)
        self._off: Callable[[], AbstractContextManager[Any]] = getattr(self.model, "disable_adapter", nullcontext)
        self.noise: tuple[Tensor, Tensor] | None = None
        if objective == "npo":
            weight_VH = nn.Parameter(torch.zeros(self.shape.vocabulary, self.shape.hidden, device=self.device))
            bias_V = nn.Parameter(torch.full((self.shape.vocabulary,), START_LOG_STD, device=self.device))
            self.noise = weight_VH, bias_V
            self.optimizers.append(Adam(self.noise, lr=NOISE_LEARNING_RATE))
        # Log-probabilities and hidden states are cached; logits would take too much memory.
        self._cache = (
            [self._reference(Padded(b, self.device))[:2] for b in self.batches] if reference == "cached" else None
        )

    def _logps(self, model: nn.Module, batch: Padded) -> tuple[Tensor, Tensor, Tensor]:
        """log p(response | prompt) of each sequence, last hidden states, logits: shapes S, S × L × H, S × L × V."""
        inner: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        hidden_SLH = inner.model(input_ids=batch.ids_SL, attention_mask=batch.mask_SL, use_cache=False)[0]
        logits_SLV = inner.lm_head(hidden_SLH).float()
        logp_SLV = log_softmax(logits_SLV, -1)
        logp_SL = logp_SLV[:, :-1].gather(-1, batch.ids_SL[:, 1:, None])[..., 0]
        return (logp_SL * batch.completion_SL[:, 1:]).sum(-1), hidden_SLH, logits_SLV

    @torch.no_grad()
    def _reference(self, batch: Padded) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The frozen reference's log-probabilities; for noise also hidden states and logits of rejected responses."""
        with self._off():
            logps_S, hidden_SLH, logits_SLV = self._logps(self._frozen, batch)
        if self.noise is None:
            return logps_S, None, None
        half = batch.select_rejected()
        return logps_S, half.completions(hidden_SLH.chunk(2)[1]), half.completions(logits_SLV.chunk(2)[1])

    def forward_backward(self, index: int) -> float:
        """Score both responses with policy and reference, and compute the gradients of the loss."""
        batch = Padded(self.batches[index], self.device)
        policy_S = self._logps(self.model, batch)[0]
        reference_S, hidden_NH, logits_NV = (*self._cache[index], None) if self._cache else self._reference(batch)
        chosen_B, rejected_B = policy_S.chunk(2)
        its_chosen_B, its_rejected_B = reference_S.chunk(2)
        if hidden_NH is None:
            term = self._term(chosen_B, rejected_B, its_chosen_B, its_rejected_B)
            loss = term
        else:
            met_B, trained_on_B, variance = self._noisy(batch.select_rejected(), hidden_NH, logits_NV)
            term = self._term(chosen_B, rejected_B, its_chosen_B, met_B.detach())
            against = self._term(chosen_B.detach(), rejected_B.detach(), its_chosen_B, trained_on_B)
            loss = term - against + ALPHA * variance
        loss.backward()
        return float(term.detach())

    @staticmethod
    def _term(chosen_B: Tensor, rejected_B: Tensor, its_chosen_B: Tensor, its_rejected_B: Tensor) -> Tensor:
        return -logsigmoid(BETA * ((chosen_B - its_chosen_B) - (rejected_B - its_rejected_B))).mean()

    def _noisy(self, batch: Padded, hidden_NH: Tensor, logits_NV: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """log p̃_r(y⁻|x) in the policy's loss and in the noise's loss, and mean(s²)."""
        assert self.noise is not None
        if logits_NV is None:
            inner: Any = self._frozen.get_base_model() if hasattr(self._frozen, "peft_config") else self._frozen
            with torch.no_grad():
                logits_NV = inner.lm_head(hidden_NH).float()
        log_u_NV = 2 * linear(hidden_NH.float(), *self.noise)
        log_variance_NV = logsigmoid(log_u_NV - math.log(MAX_VARIANCE)) + math.log(MAX_VARIANCE)
        variance_NV, std_NV = log_variance_NV.exp(), (log_variance_NV / 2).exp()

        def perturb(std_NV: Tensor) -> Tensor:
            logp_NV = log_softmax(logits_NV + std_NV * torch.randn_like(logits_NV), -1)
            return batch.sums(logp_NV.gather(-1, batch.target_N[:, None])[:, 0])

        return perturb(std_NV.detach()), perturb(std_NV), variance_NV.mean()

    def body(self, index: int) -> None:
        """Forward and backward of the blocks on padded rows."""
        run_padded_body(self.model, Padded(self.batches[index], self.device))


def run_padded_body(model: Any, batch: Padded) -> None:
    """Forward and backward of the blocks on padded rows."""
    inner: Any = model.get_base_model() if hasattr(model, "peft_config") else model
    inner.model(input_ids=batch.ids_SL, attention_mask=batch.mask_SL, use_cache=False)[0].sum().backward()
