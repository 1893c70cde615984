"""dnpo's own training step: its Lightning modules' ``terms`` on its packed batches, and its optimizers."""

from functools import partial
from typing import Any

import torch

from benchmarks.problem import Pairs
from benchmarks.quiet import Quiet
from benchmarks.variant import (
    ALPHA,
    BETA,
    LEARNING_RATE,
    MAX_VARIANCE,
    NOISE_LEARNING_RATE,
    START_LOG_STD,
    Variant,
)
from dnpo.optimise.npo import SilentModule, TrainableModule
from dnpo.optimise.objective import Facts, PairLogps, logistic
from dnpo.optimise.parts import PairOptimisation
from dnpo.optimise.preference import Frozen, PairBatch, PreferenceTraining, split
from dnpo.policy.model import Policy
from dnpo.policy.packing import Packed, pack
from dnpo.settings import Bound


class Ours(Variant):
    """dnpo's training step.

    ``cached``: the reference's log-probabilities, and for NPO its hidden states, are computed before.
    ``online``: for DPO the reference scores every batch, as in other implementations; for NPO its log-probabilities
    are cached and only the hidden states of rejected responses are computed in every step, as dnpo does where they
    do not fit on the disk.
    """

    def __init__(self, objective: str, reference: str, **setting: Any) -> None:
        super().__init__(objective, reference, **setting)
        tokenizer: Any = None  # only rendering and generation need one
        self.policy = Policy(self.model, tokenizer)
        head = self.policy.head
        vocabulary, hidden_size = head.weight_VH.shape
        noisy, cached = objective == "npo", reference == "cached"
        noise = SilentModule()
        if noisy:
            noise = TrainableModule(
                hidden_size,
                vocabulary,
                alpha=ALPHA,
                max_variance=MAX_VARIANCE,
                learning_rate=NOISE_LEARNING_RATE,
                start_log_std=START_LOG_STD,
            ).to(self.device)
        self._online = None if cached else self.policy.reference()
        frozen = Frozen((self._online or self.policy).head.frozen(), self._online) if noisy else None
        optimizer = Bound("torch.optim.RMSprop", {"lr": LEARNING_RATE})
        self.training = PreferenceTraining(
            self.policy,
            PairOptimisation(optimizer=optimizer, warmup=0.0, decay=False, clip=0.0),
            len(self.batches),
            Quiet(),
            frozen=frozen,
            noise=noise,
            objective=partial(logistic, beta=BETA),
            beta=BETA,
        )
        self.training.policy_step = 1  # past the check that the policy starts as the reference
        self.optimizers, _ = self.training.configure_optimizers()
        with torch.no_grad():
            logps = [split(self.policy.logps(self._pack(pairs).to(self.device))) for pairs in self.batches]
            self._logps = [PairLogps(*(t.cpu() for t in both)) for both in logps]
            self._hidden = [self._states(pairs) for pairs in self.batches] if noisy and cached else None

    def _pack(self, pairs: Pairs) -> Packed:
        return pack(pairs.prompts * 2, pairs.chosen + pairs.rejected, share_prompt=True)

    def _states(self, pairs: Pairs) -> torch.Tensor:
        return self.policy.hidden(pack(pairs.prompts, pairs.rejected).to(self.device)).cpu()

    def _facts(self, pairs: Pairs) -> Facts:
        hard_B = torch.ones(len(pairs.prompts))
        lengths = (torch.tensor([float(len(row)) for row in rows]) for rows in (pairs.chosen, pairs.rejected))
        return Facts(hard_B, hard_B, torch.zeros_like(hard_B), *lengths)

    def _batch(self, index: int) -> PairBatch:
        pairs, noisy = self.batches[index], self.objective == "npo"
        batch = PairBatch(
            packed=self._pack(pairs),
            ids=tuple(map(str, range(len(pairs.prompts)))),
            share=1.0,
            reference=self._logps[index],
            facts=self._facts(pairs),
            rejected=pack(pairs.prompts, pairs.rejected) if noisy else None,
            hidden_NH=self._hidden[index] if self._hidden is not None else None,
            seeds=tuple(range(len(pairs.prompts))),
            rejected_share=1.0,
        ).to(self.device)
        return batch

    def forward_backward(self, index: int) -> float:
        """Compute the gradients with the terms of dnpo's Lightning module."""
        batch = self._batch(index)
        if self.objective == "dpo" and self._online is not None:
            with torch.no_grad():
                scored = split(self._online.logps(batch.packed))
            batch = PairBatch(**{**vars(batch), "reference": scored})
        loss, metrics = self.training.terms(batch)
        loss.backward()
        return float(metrics["loss/policy"].detach())

    def body(self, index: int) -> None:
        """Forward and backward of the blocks on a packed batch."""
        self.policy.hidden(self._pack(self.batches[index]).to(self.device)).sum().backward()
