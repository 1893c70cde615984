"""dnpo's training step: its Lightning modules' ``terms`` on its packed batches, and its optimizers."""

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
from dnpo.optimise.batches import PairBatch
from dnpo.optimise.npo import SilentModule, TrainableModule
from dnpo.optimise.objective import Facts, PairLogps
from dnpo.optimise.parts import (
    Likelihood,
    Logistic,
    OddsRatio,
    PairOptimisation,
    PerToken,
    Refined,
    Squared,
    Statistics,
    watches,
)
from dnpo.optimise.preference import Frozen, PreferenceTraining
from dnpo.optimise.watch import Moments, measure_moments
from dnpo.policy.model import Policy
from dnpo.policy.packing import Packed, pack
from dnpo.settings import Bound

LOSSES: dict[str, Any] = {
    "ipo": Squared(beta=BETA),
    "simpo": PerToken(),
    "orpo": OddsRatio(),
    "nll": Likelihood(),
    "confident": Refined(beta=BETA, warmup=0.0, extrapolation=0.0),
    "refined": Refined(beta=BETA, warmup=0.0),
    "statistics": Statistics(base=Logistic(beta=BETA)),
}


def _pack_both(pairs: Pairs) -> Packed:
    return pack(pairs.prompts * 2, pairs.chosen + pairs.rejected, share_prompt=True)


class Ours(Variant):
    """dnpo's training step.

    ``cached``: the reference's log-probabilities, and for NPO its hidden states, are computed before. ``online``: for
    DPO the reference scores every batch, as in other implementations. For NPO its log-probabilities are cached, and
    only the hidden states of rejected responses are computed in every step, as dnpo does if they do not fit on the
    disk.

    For other objectives all data of the reference are cached. ``soft`` and ``weighted`` are the logistic objective;
    ``confident`` is ``refined`` without extrapolation.
    """

    def __init__(self, objective: str, reference: str, **setting: Any) -> None:
        super().__init__(objective, reference, **setting)
        tokenizer: Any = None  # only rendering and generation need one
        self.policy = Policy(self.model, tokenizer)
        head = self.policy.head
        vocabulary, hidden_size = head.weight_VH.shape
        noisy, cached = self._noisy, reference == "cached"
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
        loss = LOSSES.get(objective.removesuffix("+npo"), Logistic(beta=BETA))
        self._both = getattr(loss, "reads_rejected", True)
        watching = watches(loss, len(self.batches))
        reads_all = any(watch.reads_states for watch in watching)
        frozen = None
        if noisy or reads_all:
            frozen = Frozen((self._online or self.policy).head.frozen(), self._online)
        optimizer = Bound("torch.optim.RMSprop", {"lr": LEARNING_RATE})
        self.training = PreferenceTraining(
            self.policy,
            PairOptimisation(optimizer=optimizer, warmup=0.0, decay=False, clip=0.0),
            len(self.batches),
            Quiet(),
            frozen=frozen,
            noise=noise,
            objective=loss,
            beta=BETA,
            watches=watching,
        )
        self.training.policy_step = 1  # after the check that the policy starts as the reference
        self.optimizers, _ = self.training.configure_optimizers()
        with torch.no_grad():
            whole = [_pack_both(pairs).to(self.device) for pairs in self.batches]
            logps = [PairLogps(*self.policy.logps(packed).chunk(2)) for packed in whole]
            self._logps = [PairLogps(*(t.cpu() for t in both)) for both in logps]
            if not self._both:
                self._logps = [each._replace(rejected_B=torch.zeros_like(each.chosen_B)) for each in self._logps]
            kept = noisy and cached and not reads_all  # otherwise they are a part of the states of all tokens
            self._hidden = [self._states(pairs) for pairs in self.batches] if kept else None
            self._all = [self.policy.hidden(packed).cpu() for packed in whole] if reads_all else None
            for watch in watching:
                if watch.reads_moments:
                    watch.prepare(self._measure_moments())

    @property
    def _noisy(self) -> bool:
        return self.objective.endswith("npo")

    def _pack(self, pairs: Pairs) -> Packed:
        return _pack_both(pairs) if self._both else pack(pairs.prompts, pairs.chosen)

    def _measure_moments(self) -> Moments:
        chosen = [pack(pairs.prompts, pairs.chosen).to(self.device) for pairs in self.batches]
        numbers = [self._numbers(index) for index in range(len(chosen))]
        return measure_moments(self.policy.hidden, zip(numbers, chosen, strict=True), sum(map(len, numbers)))

    def _numbers(self, index: int) -> tuple[int, ...]:
        size = len(self.batches[index].prompts)
        return tuple(range(index * size, (index + 1) * size))

    def _states(self, pairs: Pairs) -> torch.Tensor:
        return self.policy.hidden(pack(pairs.prompts, pairs.rejected).to(self.device)).cpu()

    def _facts(self, pairs: Pairs) -> Facts:
        size = len(pairs.prompts)
        strength_B = torch.linspace(0.8, 1.0, size) if self.objective == "soft" else torch.ones(size)
        weight_B = torch.linspace(0.1, 2.0, size) if self.objective == "weighted" else torch.ones(size)
        lengths = (torch.tensor([float(len(row)) for row in rows]) for rows in (pairs.chosen, pairs.rejected))
        return Facts(strength_B, weight_B, torch.zeros(size), *lengths)

    def _batch(self, index: int) -> PairBatch:
        pairs, noisy = self.batches[index], self._noisy
        batch = PairBatch(
            packed=self._pack(pairs),
            ids=tuple(map(str, range(len(pairs.prompts)))),
            share=1.0,
            reference=self._logps[index],
            expected=None,
            facts=self._facts(pairs),
            rejected=pack(pairs.prompts, pairs.rejected) if noisy else None,
            hidden_NH=self._hidden[index] if self._hidden is not None else None,
            seeds=tuple(range(len(pairs.prompts))),
            rejected_share=1.0,
            numbers=self._numbers(index),
            states_NH=self._all[index] if self._all is not None else None,
        ).to(self.device)
        return batch

    def forward_backward(self, index: int) -> float:
        """Compute the gradients with the terms of dnpo's Lightning module."""
        batch = self._batch(index)
        if self.objective == "dpo" and self._online is not None:
            with torch.no_grad():
                scored = PairLogps(*self._online.logps(batch.packed).chunk(2))
            batch = PairBatch(**{**vars(batch), "reference": scored})
        loss, metrics = self.training.terms(batch)
        loss.backward()
        for watch in self.training.watches:
            watch.end_step()
        return float(metrics["loss/policy"].detach())

    def body(self, index: int) -> None:
        """Forward and backward of the blocks on a packed batch."""
        self.policy.hidden(self._pack(self.batches[index]).to(self.device)).sum().backward()
