"""The two trainings of the loop: on human responses, and on pairs, where policy and noise play against each other.

``training.py`` has what they share. Here is what makes each of them: the loss of a micro-batch, what is reported of it,
and the check that before the first update the policy is the reference. Shapes as in ``objective.py`` and
``logprobs.py``; S = 2B sequences, the chosen ones first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam

from dnpo.data.batches import Batches, Slice
from dnpo.errors import StepZeroError
from dnpo.logprobs import Sequences, logp_of_targets, sequences, sum_by_sequence
from dnpo.model import Policy
from dnpo.npo import Noise, Rejected
from dnpo.objective import (
    NoisyReference,
    Objective,
    PairLogps,
    log_ratio_gap,
    negative_log_likelihood,
    saturation,
    two_player,
)
from dnpo.records import Pair
from dnpo.seeding import derive
from dnpo.store import Report
from dnpo.training import Batch, Optimisation, Training, fit

STEP_ZERO_TOLERANCE = 1e-3  # nats


class FineTuning(Training):
    """Supervised fine-tuning on human responses: the mean negative log-likelihood of their tokens."""

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the completion tokens of the micro-batch."""
        logits_NV = self.policy.logits(self.policy.hidden(batch.sequences))
        loss = negative_log_likelihood(logp_of_targets(logits_NV, batch.sequences.target_N))
        return loss, {"loss/policy": loss}


class PreferenceTraining(Training):
    """The policy against a frozen reference, and the noise on that reference against the policy.

    Args:
        reference: the policy as it was at the start, frozen.
        noise: may have no parameters; then the policy is the only player.
        objective: (policy, reference) → loss of each pair.
        beta: preference temperature, for margins and implicit rewards as they are reported.
        seed: of the noise.
    """

    def __init__(
        self,
        policy: Policy,
        optimisation: Optimisation,
        total: int,
        report: Report,
        *,
        reference: Policy,
        noise: Noise,
        objective: Objective,
        beta: float,
        seed: int,
    ) -> None:
        super().__init__(policy, optimisation, total, report)
        self.noise, self.objective, self.beta, self.seed = noise, objective, beta, seed
        # In a tuple, so that the frozen weights are neither registered nor saved.
        self._frozen = (reference,)
        self.generator = torch.Generator()

    @property
    def players(self) -> list[tuple[str, nn.Module]]:
        """The policy, and the noise if it can be trained."""
        trainable = any(True for _ in self.noise.parameters())
        return [*super().players, *([("noise", cast(nn.Module, self.noise))] if trainable else [])]

    def configure_optimizers(self) -> Any:
        """The noise has Adam with a constant learning rate of its own."""
        optimizers, schedules = super().configure_optimizers()
        if len(self.players) > 1:
            optimizers.append(Adam(self.noise.parameters(), lr=self.noise.learning_rate))
        return optimizers, schedules

    def on_fit_start(self) -> None:
        """Put the generator where the tensors are."""
        state = self.generator.get_state() if self.policy_step else None
        self.generator = torch.Generator(self.device)
        if state is None:
            self.generator.manual_seed(derive(self.seed, "noise"))
        else:
            self.generator.set_state(state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the noise generator's state."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["training"]["generator"] = self.generator.get_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the noise generator's state."""
        super().on_load_checkpoint(checkpoint)
        self.generator = torch.Generator(self.device)
        self.generator.set_state(checkpoint["training"]["generator"])

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The three terms of the two-player loss on one micro-batch of pairs."""
        policy = split(self.policy.logps(batch.sequences))
        reference, noisy, variance = self._reference(batch.sequences)
        if self.policy_step == 0:
            self._check_step_zero(policy, reference, batch)
        terms = two_player(self.objective, policy, reference, noisy, self.noise.alpha)
        with torch.no_grad():
            metrics = self._metrics(policy.detach(), reference, noisy, variance)
        metrics |= {"loss/policy": terms.policy}
        if self.noise.active:
            metrics |= {"loss/noise": terms.noise, "loss/variance": terms.variance}
        return terms.total, metrics

    def _reference(self, batch: Sequences) -> tuple[PairLogps, NoisyReference, Tensor]:
        """The frozen reference's log-probabilities without noise, those with it, and s²."""
        (reference,) = self._frozen
        with torch.no_grad():
            hidden_NH = reference.hidden(batch)
            logits_NV = reference.logits(hidden_NH)
            logp_N = logp_of_targets(logits_NV, batch.target_N)
            clean = split(sum_by_sequence(logp_N, batch.sequence_N, batch.count))
        pairs = batch.count // 2
        rejected_N = batch.sequence_N >= pairs
        rejected = Rejected(
            hidden_NH=hidden_NH[rejected_N],
            logits_NV=logits_NV[rejected_N],
            target_N=batch.target_N[rejected_N],
            sequence_N=batch.sequence_N[rejected_N] - pairs,
            clean_B=clean.rejected_B,
        )
        noisy, variance = self.noise(rejected, self.generator)
        return clean, noisy, variance

    def _metrics(
        self, policy: PairLogps, reference: PairLogps, noisy: NoisyReference, variance: Tensor
    ) -> dict[str, Tensor]:
        clean_B = self.beta * log_ratio_gap(policy, reference)
        shift_B = reference.rejected_B - noisy.policy_B
        noisy_B = clean_B - self.beta * shift_B
        chosen_B = self.beta * (policy.chosen_B - reference.chosen_B)
        rejected_B = self.beta * (policy.rejected_B - reference.rejected_B)
        metrics = {
            "margin/clean": clean_B.mean(),
            "margin/saturation": saturation(noisy_B),
            "rewards/chosen": chosen_B.mean(),
            "rewards/rejected": rejected_B.mean(),
            "rewards/accuracy": (clean_B > 0).float().mean(),
            "logps/chosen": policy.chosen_B.mean(),
            "logps/rejected": policy.rejected_B.mean(),
        }
        if self.noise.active:
            metrics |= {
                "margin/noisy": noisy_B.mean(),
                "margin/shift": (noisy_B - clean_B).mean(),
                "margin/saturation_clean": saturation(clean_B),
                "npo/shift": shift_B.mean(),
                "npo/variance": variance.mean(),
                "npo/at_bound": (variance > 0.9 * self.noise.max_variance).float().mean(),
            }
        return metrics

    @torch.no_grad()
    def _check_step_zero(self, policy: PairLogps, reference: PairLogps, batch: Batch) -> None:
        """Before the first update the policy is the reference: every margin is 0 and the logistic loss ln 2."""
        off_by = float(log_ratio_gap(policy.detach(), reference).abs().max())
        if off_by <= STEP_ZERO_TOLERANCE:
            return
        with self.policy.evaluating():
            calm = split(self.policy.logps(batch.sequences))
        if float(log_ratio_gap(calm, reference).abs().max()) <= STEP_ZERO_TOLERANCE:
            cause = "dropout is on: every dropout of the model has to be 0"
        elif hasattr(self.policy.model, "peft_config"):
            cause = "the adapter is not fresh: the reference must be the weights it was put on, in this very iteration"
        elif _differ(self.policy.model, self._frozen[0].model):
            cause = "the reference has other weights: it must be a copy of the policy that this iteration starts from"
        else:
            cause = "equal weights answer differently: the two do not see the same rendered template or attention mask"
        raise StepZeroError(
            f"step 0: the policy is not the reference. Log-ratios differ by up to {off_by:.3g} nats on rows "
            f"{', '.join(batch.ids[:4])}, expected at most {STEP_ZERO_TOLERANCE}. Most likely {cause}"
        )


def fine_tune(
    policy: Policy,
    rows: Sequence[tuple[str, list[int], list[int]]],
    optimisation: Optimisation,
    *,
    seed: int,
    folder: Path,
    report: Report,
) -> list[dict[str, float]]:
    """Train the policy in place on human responses.

    Args:
        policy: its module is changed.
        rows: id, prompt token ids and response token ids of each row.
        optimisation: how to train.
        seed: draws the order of the rows.
        folder: where checkpoints go; one that is there is continued.
        report: told of every step.

    Returns:
        One row of metrics a policy step.
    """

    def collate(rows: Sequence[tuple[str, list[int], list[int]]], piece: Slice) -> Batch:
        laid_out = sequences([r[1] for r in rows], [r[2] for r in rows], policy.pad_id)
        # The loss is a mean over tokens, so a micro-batch weighs by its tokens.
        share = sum(len(r[2]) for r in rows) / sum(lengths[i] for i in piece.group)
        return Batch(laid_out, tuple(r[0] for r in rows), share, piece.last)

    lengths = [len(r[2]) for r in rows]

    slices = optimisation.slices(len(rows), seed)
    module = FineTuning(policy, optimisation, sum(s.last for s in slices), report)
    return fit(module, Batches(rows, slices, collate), folder)


def optimise(
    policy: Policy,
    pairs: Sequence[Pair],
    optimisation: Optimisation,
    *,
    noise: Noise,
    objective: Objective,
    beta: float,
    seed: int,
    folder: Path,
    report: Report,
) -> list[dict[str, float]]:
    """Train the policy in place against the reference that it is at the start.

    Args:
        policy: its module is changed; with LoRA it carries a fresh adapter.
        pairs: with the token ids of prompts and both responses.
        optimisation, folder, report: as in :func:`fine_tune`.
        noise: on the reference's log-probability of rejected responses; trained along.
        objective: (policy, reference) → loss of each pair.
        beta: preference temperature for the reported margins.
        seed: draws the order of the pairs and the noise.

    Returns:
        One row of metrics a policy step.

    Raises:
        StepZeroError: before the first update the policy is not the reference.
        NonFiniteLossError: the loss became NaN or infinite.
    """

    def collate(pairs: Sequence[Pair], piece: Slice) -> Batch:
        prompts = [p.prompt_ids for p in pairs]
        completions = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
        laid_out = sequences(prompts * 2, completions, policy.pad_id)
        return Batch(laid_out, tuple(p.id for p in pairs), piece.share, piece.last)

    slices = optimisation.slices(len(pairs), seed)
    module = PreferenceTraining(
        policy,
        optimisation,
        sum(s.last for s in slices),
        report,
        reference=policy.reference(),
        noise=noise,
        objective=objective,
        beta=beta,
        seed=seed,
    )
    return fit(module, Batches(pairs, slices, collate), folder)


def split(logp_S: Tensor) -> PairLogps:
    """2B values, the chosen first, as pairs."""
    chosen_B, rejected_B = logp_S.chunk(2)
    return PairLogps(chosen_B, rejected_B)


def _differ(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
