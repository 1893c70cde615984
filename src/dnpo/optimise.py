"""Training: one manual optimisation step for all players, their metrics, and checkpoints to continue from.

``Training`` is what every kind shares: groups of micro-batches, one backward pass each, clipping, and a step for every
player that has parameters. ``FineTuning`` gives it the likelihood of human responses, ``PreferenceTraining`` the
two-player loss on pairs. Shapes as in ``objective.py`` and ``logprobs.py``; S = 2B sequences, the chosen ones first.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dnpo.data.batches import Batches, Slice, schedule
from dnpo.errors import NonFiniteLossError, SettingsError, StepZeroError
from dnpo.logprobs import Sequences, logp_of_targets, sequences, sum_by_sequence
from dnpo.model import Policy
from dnpo.npo import Noise
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
from dnpo.settings import Count, Fraction, Natural, NonNegative
from dnpo.store import Report

STEP_ZERO_TOLERANCE = 1e-3  # nats


class Optimisation:
    """How to train: what ``trainer=…`` and ``sft=…`` configure.

    Args:
        epochs: passes over the rows; 0 trains nothing.
        steps: policy steps at which to stop instead, however many epochs that takes; 0 means by epochs.
        batch_size: rows of one policy step.
        micro_batch_size: rows at most that go through the model at once; 0 means the whole batch. It changes memory,
            rounding, and which noise is drawn.
        optimizer: the policy's, waiting for its parameters.
        warmup: share of the policy steps over which its learning rate rises from 0.
        decay: whether it then falls linearly to 0 (else it stays).
        clip: gradient norm of a player at most; 0 means no clipping.
        autocast: bf16 matrix products over parameters of higher precision.
        checkpoint_every: policy steps between checkpoints; after a kill at most so many are repeated.
    """

    not_in_key = ("checkpoint_every",)

    def __init__(
        self,
        *,
        optimizer: Callable[..., Optimizer],
        epochs: Natural = 1,
        steps: Natural = 0,
        batch_size: Count = 64,
        micro_batch_size: Natural = 0,
        warmup: Fraction = 0.1,
        decay: bool = True,
        clip: NonNegative = 1.0,
        autocast: bool = False,
        checkpoint_every: Count = 50,
    ) -> None:
        self.optimizer, self.epochs, self.steps = optimizer, epochs, steps
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size or batch_size
        self.warmup, self.decay, self.clip, self.autocast = warmup, decay, clip, autocast
        self.checkpoint_every = checkpoint_every

    def slices(self, rows: int, seed: int) -> list[Slice]:
        """The micro-batches of a training on so many rows."""
        return schedule(rows, self.batch_size, self.micro_batch_size, self.epochs, seed, self.steps or None)

    def factor(self, step: int, total: int) -> float:
        """Multiple of the peak learning rate at a policy step: linear warm-up, then linear decay or none."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return (step + 1) / (warm + 1)
        return (total - step) / max(total - warm, 1) if self.decay else 1.0


@dataclass(frozen=True)
class Batch:
    """A micro-batch: a sequence a row for fine-tuning; of B pairs first the chosen, then the rejected responses.

    Attributes:
        ids: of its rows.
        share: the weight of its mean loss in its group's.
        last: whether the players step after it.
    """

    sequences: Sequences
    ids: tuple[str, ...]
    share: float
    last: bool


class Training(pl.LightningModule):
    """Manual optimisation of one or more players on micro-batches in a fixed order.

    Args:
        policy: the model in training; its module is the first player.
        optimisation: how to train.
        total: policy steps of the whole training.
        report: told of every step.
    """

    def __init__(self, policy: Policy, optimisation: Optimisation, total: int, report: Report) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained, not frozen base weights
        self.policy_module = policy.model
        self.policy, self.optimisation, self.total, self.report = policy, optimisation, total, report
        self.policy_step = 0
        self.history: list[dict[str, float]] = []
        self._group: dict[str, float] = {}
        self._tokens, self._clock = 0, time.monotonic()

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch (its mean) and what to report of it."""
        raise NotImplementedError

    @property
    def players(self) -> list[tuple[str, nn.Module]]:
        """Who is trained: the policy, and whoever else has parameters."""
        return [("policy", self.policy_module)]

    # --- one step

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch on the device of the model."""
        return replace(batch, sequences=batch.sequences.to(device))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Backward through one micro-batch; after the last of a group, clip and step every player."""
        loss, metrics = self.terms(batch)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"step {self.policy_step}: the loss is {float(loss.detach())} on rows {', '.join(batch.ids)}; lower "
                "the learning rate (trainer.optimizer.lr, npo.learning_rate) or look at these rows. The last "
                "checkpoint is kept"
            )
        self.manual_backward(loss * batch.share)
        for name, value in metrics.items():
            self._group[name] = self._group.get(name, 0.0) + float(value.detach()) * batch.share
        self._tokens += int(batch.sequences.mask_ST.sum())
        if batch.last:
            self._step()

    def _step(self) -> None:
        optimizers = _listed(self.optimizers())
        plain = _listed(self.optimizers(use_pl_optimizer=False))
        for (name, module), optimizer in zip(self.players, plain, strict=True):
            limit = self.optimisation.clip or math.inf
            trained = [p for p in module.parameters() if p.requires_grad]
            self._group[f"grad_norm/{name}"] = float(nn.utils.clip_grad_norm_(trained, limit))
            self._group[f"lr/{name}"] = optimizer.param_groups[0]["lr"]
        # Lightning counts every step of its wrapped optimizers; only the policy's shall count.
        for optimizer in [optimizers[0], *plain[1:]]:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for scheduler in _listed(self.lr_schedulers()):
            scheduler.step()
        now = time.monotonic()
        self._group["tokens_per_second"] = self._tokens / max(now - self._clock, 1e-9)
        self._tokens, self._clock = 0, now
        row = {"step": float(self.policy_step), **self._group}
        self.history.append(row)
        self._group = {}
        self.policy_step += 1
        self.report.advance()
        self.report.steps([row])

    def configure_optimizers(self) -> Any:
        """The policy's optimizer with its schedule by policy steps."""
        trained = [p for p in self.policy_module.parameters() if p.requires_grad]
        optimizer = self.optimisation.optimizer(trained)
        schedule_ = LambdaLR(optimizer, lambda step: self.optimisation.factor(step, self.total))
        return [optimizer], [schedule_]

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the history; leave out what is not trained."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["training"] = {"policy_step": self.policy_step, "history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counters and the history."""
        self.policy_step = checkpoint["training"]["policy_step"]
        self.history = checkpoint["training"]["history"]

    def on_train_start(self) -> None:
        """Say where this training stands, once a checkpoint has been taken up."""
        self.report.begin(self.total, "steps", self.policy_step)
        self.report.steps(self.history)
        self._clock = time.monotonic()


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
        noisy, variance = self.noise(
            hidden_NH[rejected_N],
            logits_NV[rejected_N],
            batch.target_N[rejected_N],
            batch.sequence_N[rejected_N] - pairs,
            clean.rejected_B,
            self.generator,
        )
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
            cause = "dropout is on: set every dropout of the model and model.lora.dropout to 0"
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
    return _fit(module, Batches(rows, slices, collate), folder)


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
    return _fit(module, Batches(pairs, slices, collate), folder)


class _Checkpoints(pl.Callback):
    """A checkpoint after every so many policy steps; it replaces the last one whole or not at all."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        training = cast(Training, module)
        at_group_end = not training._group
        if at_group_end and training.policy_step % self.every == 0 and training.policy_step < training.total:
            aside = self.path.with_suffix(".writing")
            trainer.save_checkpoint(aside)
            aside.replace(self.path)


def _fit(module: Training, batches: Batches[Any, Any], folder: Path) -> list[dict[str, float]]:
    """Run the training, from the checkpoint in ``folder`` if one is there, and give its history."""
    if not batches.rows:
        raise SettingsError("there is nothing to train on: no rows are left")
    if not batches.slices:
        return []
    checkpoint = folder / "checkpoint.ckpt"
    optimisation = module.optimisation
    device = module.policy.device
    trainer = pl.Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.index is None else [device.index],
        max_epochs=1,
        precision="bf16-mixed" if optimisation.autocast else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[_Checkpoints(checkpoint, optimisation.checkpoint_every)],
    )
    module.policy.model.train()
    with _interruptible(trainer):
        trainer.fit(module, batches, ckpt_path=checkpoint if checkpoint.is_file() else None, weights_only=True)
    module.policy.model.eval()
    checkpoint.unlink(missing_ok=True)
    return module.history


@contextmanager
def _interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Lightning turns Ctrl-C into a plain exit and ignores further ones: make it a KeyboardInterrupt again."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None and signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


def split(logp_S: Tensor) -> PairLogps:
    """2B values, the chosen first, as pairs."""
    chosen_B, rejected_B = logp_S.chunk(2)
    return PairLogps(chosen_B, rejected_B)


def _differ(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
