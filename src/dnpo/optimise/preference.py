"""The two trainings of the loop: on human responses, and on pairs, with opposite losses for policy and noise.

``training.py`` has the code that both share. This file has the loss of a micro-batch, its metrics, and the check that
the policy is the reference before the first update. Shapes as in ``objective.py`` and ``logprobs.py``; S = 2B
sequences, the chosen ones first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam

from dnpo.errors import StepZeroError
from dnpo.optimise.batches import Batch, Collate, PairBatch, Reading, Scored, reads_rejected, with_weight
from dnpo.optimise.ema import Average
from dnpo.optimise.held import HeldOut, divide
from dnpo.optimise.live import Clock, LiveSteps, Source
from dnpo.optimise.npo import NoiseModule, Rejected
from dnpo.optimise.objective import (
    Facts,
    NoisyReference,
    Objective,
    PairLogps,
    log_ratio_gap,
    negative_log_likelihood,
    saturation,
    two_player,
    weighted_mean,
)
from dnpo.optimise.parts import Optimisation, PairOptimisation, watches
from dnpo.optimise.reference import KeptHidden
from dnpo.optimise.steps import Batches, Row, Slice, arrange
from dnpo.optimise.training import Training, fit, has_checkpoint, make_fused
from dnpo.optimise.watch import Moments, Seen, States, Watch, measure_moments
from dnpo.policy.logprobs import Head, token_logps
from dnpo.policy.model import Policy, by_length
from dnpo.policy.packing import Packed, pack
from dnpo.records import Pair, ReferenceLogps
from dnpo.store import Report
from dnpo.tables import Made, column, lengths

# Tolerance of log-ratios before the first update, in nats. The compared batches differ in shape, and with bf16
# products the error of each token is about a hundredth.
STEP_ZERO_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.5}


class FineTuning(Training):
    """Supervised fine-tuning on human responses: the mean negative log-likelihood of their tokens."""

    title = "supervised fine-tuning"
    setting = "sft"
    remedy = "lower its learning rate (sft.optimizer.lr) or look at these rows. The last checkpoint is kept"

    policy: Policy

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the completion tokens of the micro-batch."""
        packed = batch.packed
        loss = negative_log_likelihood(token_logps(self.policy.hidden(packed), self.policy.head, packed.target_N))
        return loss, {"loss/policy": loss}

    def measure(self, batches: Iterable[Batch]) -> float:
        """The mean loss over the completion tokens of all rows."""
        total, tokens = 0.0, 0
        for batch in batches:
            loss, _ = self.terms(batch)
            total += float(loss) * len(batch.packed.target_N)
            tokens += len(batch.packed.target_N)
        return total / tokens


@dataclass(frozen=True)
class Frozen:
    """The parts of the frozen reference that noise or the objective needs besides log-probabilities.

    Attributes:
        head: the output head.
        body: computes hidden states; None if they have been kept.
    """

    head: Head
    body: Policy | None


class PreferenceTraining(Training):
    """Trains the policy against a frozen reference, and the noise on that reference against the policy.

    Args:
        frozen: parts of the reference; None if nothing reads its hidden states in every step.
        noise: the noise; if it has no parameters, the policy is the only player.
        objective: (policy, reference, facts) → loss of each pair.
        beta: preference temperature of the noise term and of the reported margins and implicit rewards.
        watches: further measurements for the objective.
        average: the moving average of the policy's weights, if it is read.
        reads_average: whether the average is the reference; then its log-probabilities are computed in every step.
    """

    policy: Policy

    def __init__(
        self,
        policy: Policy,
        optimisation: Optimisation,
        total: int,
        report: Report,
        *,
        frozen: Frozen | None,
        noise: NoiseModule,
        objective: Objective,
        beta: float,
        watches: Sequence[Watch] = (),
        average: Average | None = None,
        reads_average: bool = False,
    ) -> None:
        super().__init__(policy, optimisation, total, report)
        self.average, self.reads_average = average, reads_average
        self.noise, self.objective, self.beta, self.watches = noise, objective, beta, watches
        self.frozen = frozen  # a plain object, so that its weights are neither registered nor saved

    @property
    def shared_policies(self) -> list[Policy]:
        """The policy, and a copy of the reference if there is one."""
        body = None if self.frozen is None else self.frozen.body
        copied = body is not None and body.model is not self.policy.model
        return [*super().shared_policies, *([body] if body is not None and copied else [])]

    @property
    def players(self) -> list[tuple[str, nn.Module]]:
        """The policy, and the noise if it can be trained."""
        trainable = any(True for _ in self.noise.parameters())
        return [*super().players, *([("noise", cast(nn.Module, self.noise))] if trainable else [])]

    def configure_optimizers(self) -> Any:
        """The policy's optimizer and, for the noise, Adam with a separate constant learning rate."""
        optimizers, schedules = super().configure_optimizers()
        if len(self.players) > 1:
            optimizers.append(make_fused(Adam, list(self.noise.parameters()), {"lr": self.noise.learning_rate}))
        return optimizers, schedules

    def training_step(self, batches: list[Any], batch_idx: int) -> None:
        """Make one policy step, then update the average and the watches."""
        super().training_step(batches, batch_idx)
        if self.average is not None:
            self.average.follow(self.policy_step - 1)
        for watch in self.watches:
            watch.end_step()

    def terms(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The three terms of the two-player loss on one micro-batch of pairs."""
        pairs = cast(PairBatch, batch)
        if self.reads_average:
            pairs = replace(pairs, reference=self._averaged_logps(pairs))
        hidden_NH = self.policy.hidden(pairs.packed)
        policy, reference = self._logps(pairs, hidden_NH), pairs.reference
        if self.policy_step == 0:
            self._check_step_zero(policy, pairs)
        states = self._prepare_states(pairs)
        facts, measured = self._measure(pairs, hidden_NH, policy, states)
        noisy, at_bound = self.noise(reference.rejected_B, self._prepare_rejected(pairs, states))
        # Variance and at_bound are means over tokens, but a micro-batch is weighted by the weights of its pairs.
        weight = pairs.rejected_share / pairs.share
        noisy, at_bound = noisy._replace(variance=noisy.variance * weight), at_bound * weight
        terms = two_player(self.objective, policy, reference, noisy, facts, self.noise.alpha, beta=self.beta)
        with torch.no_grad():
            metrics = self._metrics(policy.detach(), reference, noisy, facts.weight_B)
            metrics |= {name: weighted_mean(value_B, facts.weight_B) for name, value_B in measured.items()}
        metrics |= {"loss/policy": terms.policy}
        metrics |= {name: terms.policy.new_tensor(value) for name, value in pairs.notes.items()}
        if self.noise.active:
            metrics |= {"loss/noise": terms.noise, "loss/variance": terms.variance, "npo/at_bound": at_bound}
        return terms.total, metrics

    def measure(self, batches: Iterable[Batch]) -> float:
        """The mean loss of pairs, by their weights, without noise."""
        total = weight = 0.0
        for batch in cast(Iterable[PairBatch], batches):
            policy = self._logps(batch, self.policy.hidden(batch.packed))
            loss_B = self.objective(policy, batch.reference, batch.facts)
            total += float((loss_B * batch.facts.weight_B).sum())
            weight += float(batch.facts.weight_B.sum())
        return total / weight

    def _logps(self, batch: PairBatch, hidden_NH: Tensor) -> PairLogps:
        """The policy's log-probabilities of both responses, or only of chosen ones if rejected ones are not read."""
        return PairLogps.split(self.policy.sum_logps(hidden_NH, batch.packed), len(batch.ids))

    @torch.no_grad()
    def _averaged_logps(self, batch: PairBatch) -> PairLogps:
        """The log-probabilities under the average at this step."""
        assert self.average is not None, "the reference is the average"
        return PairLogps.split(self.average.policy.logps(batch.packed), len(batch.ids))

    def _measure(
        self, batch: PairBatch, hidden_NH: Tensor, policy: PairLogps, states: States | None
    ) -> tuple[Facts, dict[str, Tensor]]:
        """Add the watches' measurements to the facts; the metrics are one number for each pair."""
        facts, metrics = batch.facts, dict[str, Tensor]()
        if not self.watches:
            return facts, metrics
        own = States(hidden_NH, self.policy.head)
        seen = Seen(self.policy_step, batch.numbers, batch.packed, policy, batch.reference, own, states)
        for watch in self.watches:
            facts, more = watch.measure(facts, seen)
            metrics |= more
        return facts, metrics

    @torch.no_grad()
    def _prepare_states(self, batch: PairBatch) -> States | None:
        """The reference's hidden states of all completion tokens, if a watch reads them."""
        if self.frozen is None or not any(watch.reads_states for watch in self.watches):
            return None
        return States(self._hidden(batch.states_NH, batch.packed), self.frozen.head)

    def _prepare_rejected(self, batch: PairBatch, states: States | None) -> Rejected | None:
        """The reference's hidden states of the rejected tokens; they may be a part of ``states``."""
        if self.frozen is None or batch.rejected is None:
            return None
        packed = batch.rejected
        hidden_NH = (
            self._hidden(batch.hidden_NH, packed) if states is None else states.hidden_NH[-len(packed.target_N) :]
        )
        return Rejected(hidden_NH, self.frozen.head, packed.target_N, packed.completions, batch.seeds)

    @torch.no_grad()
    def _hidden(self, kept_NH: Tensor | None, packed: Packed) -> Tensor:
        """The reference's hidden states, read from disk or computed by a forward pass."""
        if kept_NH is not None:
            return kept_NH
        assert self.frozen is not None
        assert self.frozen.body is not None, "hidden states are kept or can be made"
        return self.frozen.body.hidden(packed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the watches' states, and the average."""
        super().on_save_checkpoint(checkpoint)
        if self.average is not None:
            checkpoint["average"] = self.average.state_dict()
        checkpoint["watches"] = [watch.state_dict() for watch in self.watches]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the watches' states, and the average."""
        super().on_load_checkpoint(checkpoint)
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        for watch, state in zip(self.watches, checkpoint.get("watches", []), strict=True):
            watch.load_state_dict(state)

    def _metrics(
        self, policy: PairLogps, reference: PairLogps, noisy: NoisyReference, weight_B: Tensor
    ) -> dict[str, Tensor]:
        clean_B = self.beta * log_ratio_gap(policy, reference)
        shift_B = reference.rejected_B - noisy.policy_B
        noisy_B = clean_B - self.beta * shift_B
        metrics = {
            "margin/clean": clean_B,
            "margin/saturation": saturation(noisy_B),
            "rewards/chosen": self.beta * (policy.chosen_B - reference.chosen_B),
            "rewards/rejected": self.beta * (policy.rejected_B - reference.rejected_B),
            # Before the first update every margin is 0 up to rounding, so its sign has no meaning.
            "rewards/accuracy": (clean_B > 0).float() if self.policy_step else torch.full_like(clean_B, 0.5),
            "logps/chosen": policy.chosen_B,
            "logps/rejected": policy.rejected_B,
        }
        if self.noise.active:
            metrics |= {
                "margin/noisy": noisy_B,
                "margin/shift": noisy_B - clean_B,
                "margin/saturation_clean": saturation(clean_B),
                "npo/shift": shift_B,
            }
        means = {name: weighted_mean(value_B, weight_B) for name, value_B in metrics.items()}
        return means | ({"npo/variance": noisy.variance} if self.noise.active else {})

    @torch.no_grad()
    def _check_step_zero(self, policy: PairLogps, batch: PairBatch) -> None:
        """Check that the policy before the first update is the one that training should start from.

        If the reference is that policy, all margins are then 0 and the logistic loss is ln 2.
        """
        expected = batch.expected
        if expected is None:
            return
        tolerance = STEP_ZERO_TOLERANCE[self.policy.head.cast(self.device).weight_VH.dtype]
        off_by = _difference(policy.detach(), expected)
        if off_by <= tolerance:
            return
        with self.policy.evaluating():
            calm = self._logps(batch, self.policy.hidden(batch.packed))
        if _difference(calm, expected) <= tolerance:
            cause = "dropout is on: every dropout of the model has to be 0"
        elif hasattr(self.policy.model, "peft_config"):
            cause = "the adapter is not new: this iteration must add one to the weights that are its reference"
        else:
            cause = "the reference has other weights: it must be the policy that this iteration starts from"
        raise StepZeroError(
            f"step 0: the policy is not the one that training starts from. Log-ratios differ by up to {off_by:.3g} "
            f"nats on rows {', '.join(batch.ids[:4])}, expected at most {tolerance}. Most likely {cause}"
        )


def _difference(policy: PairLogps, expected: PairLogps) -> float:
    """The largest log-ratio gap, in nats."""
    return float(log_ratio_gap(policy, expected).abs().max())


def fine_tune(
    policy: Policy,
    rows: Sequence[tuple[str, list[int], list[int]]],
    optimisation: Optimisation,
    *,
    seed: int,
    folder: Path,
    report: Report,
    facts: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train the policy in place on human responses.

    Args:
        policy: the policy; its module is changed.
        rows: id, prompt token ids and response token ids of each row.
        optimisation: how to train.
        seed: seed of the order of the rows.
        folder: folder for checkpoints; training continues from one that it has.
        report: receives the progress.
        facts: receives facts about held-out rows, if their loss is measured.

    Returns:
        A row of metrics for each policy step.

    Raises:
        SettingsError: no row is left to hold out or to train on.
    """

    def collate(piece: Slice[tuple[str, list[int], list[int]]]) -> Batch:
        some = piece.rows
        # The loss is a mean over tokens, so a micro-batch is weighted by its tokens.
        share = sum(len(r[2]) for r in some) / sum(len(r[2]) for r in piece.group)
        return Batch(pack([r[1] for r in some], [r[2] for r in some]), tuple(r[0] for r in some), share)

    used, apart = divide(lambda: [row[0] for row in rows], range(len(rows)), optimisation, FineTuning.setting)
    known = Made(len(used), lambda n: rows[used[n]])
    groups = arrange(optimisation, len(known), seed)
    module = FineTuning(policy, optimisation, len(groups), report)
    if apart:
        _hold_out(module, [rows[i] for i in apart], collate, folder)
    history = fit(module, Batches(known, groups, optimisation.rows_at_once, collate), folder)
    _add_facts(facts, module)
    return history


def optimise(
    policy: Policy,
    pairs: Sequence[Pair],
    reference: Sequence[ReferenceLogps] | None,
    optimisation: PairOptimisation,
    *,
    noise: NoiseModule,
    objective: Objective,
    beta: float,
    seed: int,
    folder: Path,
    report: Report,
    hidden: KeptHidden | None = None,
    frozen: Policy | None = None,
    expected: Mapping[int, ReferenceLogps] | None = None,
    average: Average | None = None,
    reads_average: bool = False,
    facts: dict[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train the policy in place on pairs.

    Args:
        policy: the policy; its module is changed. With LoRA it has a fresh adapter.
        pairs: pairs with the token ids of prompts and both responses.
        reference: the reference's log-probabilities of the pairs, in their order; None if the objective reads none.
        optimisation, folder, report: as in :func:`fine_tune`.
        noise: noise on the reference's log-probability of rejected responses; it is trained too.
        objective: (policy, reference, facts) → loss of each pair.
        beta: preference temperature of the noise term and the reported margins.
        seed: seed of the order of the pairs and of the noise.
        hidden: the reference's hidden states of the pairs' rejected tokens, or of all completion tokens, if they have
            been kept.
        frozen: the reference; None if it is the policy before training.
        expected: the policy's log-probabilities of the first step's pairs before training, by number, from
            :func:`score_first`; None if the reference is the policy before training.
        average, reads_average: as in :class:`PreferenceTraining`.
        facts: as in :func:`fine_tune`.

    Returns:
        A row of metrics for each policy step.

    Raises:
        SettingsError: a weight is negative, all are 0, or no pair is left to hold out or to train on.
        StepZeroError: the policy before the first update is not the one that training should start from.
        NonFiniteLossError: the loss became NaN or infinite.
        OutOfMemoryError: a step does not fit into memory.
    """
    used, apart = _divide(pairs, optimisation)
    first = reference if expected is None else expected

    def choose(numbers: Sequence[int]) -> Made[Scored]:
        return Made(
            len(numbers),
            lambda n: Scored(numbers[n], pairs[numbers[n]], reference[numbers[n]] if reference else None),
        )

    rows = choose(used)

    def expect(some: Sequence[Scored]) -> list[ReferenceLogps] | None:
        return [first[row.number] for row in some] if first else None

    reads = Reading.of(objective, noise)
    collate = Collate(reads, optimisation.share_prompt, seed, expect, hidden)
    groups = arrange(optimisation, len(rows), seed)
    watching = watches(objective, len(groups))
    parts = None
    if reads.states:
        reads_all = reads.all_states
        body = (frozen or policy.reference()) if hidden is None or (reads_all and not hidden.both) else None
        parts = Frozen((body or frozen or policy).head.frozen(), body)
    moments = None
    for watch in watching:
        if watch.reads_moments:
            moments = moments or _measure_moments(frozen or policy, pairs, used, optimisation)
            watch.prepare(moments)
    module = PreferenceTraining(
        policy,
        optimisation,
        len(groups),
        report,
        frozen=parts,
        noise=noise,
        objective=objective,
        beta=beta,
        watches=watching,
        average=average,
        reads_average=reads_average,
    )
    if apart:
        plain = Collate(Reading(reads.rejected, False, False), optimisation.share_prompt, seed, lambda some: None, None)
        _hold_out(module, choose(apart), plain, folder)
    history = fit(module, Batches(rows, groups, optimisation.rows_at_once, collate), folder)
    _add_facts(facts, module)
    return history


def _divide(pairs: Sequence[Pair], optimisation: PairOptimisation) -> tuple[Sequence[int], Sequence[int]]:
    """The numbers of the pairs to train on and of those held out, without pairs whose weight is 0."""
    return divide(lambda: column(pairs, "id"), with_weight(pairs), optimisation, PreferenceTraining.setting)


def _hold_out(
    module: FineTuning | PreferenceTraining, rows: Sequence[Row], collate: Callable[[Slice[Row]], Batch], folder: Path
) -> None:
    """Have a training measure the loss on these rows, in evaluation mode."""
    policy, how = module.policy, module.optimisation
    held, size = tuple(rows), how.rows_at_once
    parts = [held[i : i + size] for i in range(0, len(held), size)]

    @torch.no_grad()
    def measure() -> float:
        products = torch.autocast(policy.device.type, torch.bfloat16, enabled=how.autocast)
        with policy.evaluating(), products:
            return module.measure(collate(Slice(0, part, part)).to(policy.device) for part in parts)

    module.held = HeldOut(measure, len(held), how, module.setting, folder, module.report)


def _add_facts(facts: dict[str, Any] | None, module: Training) -> None:
    """Add the facts about held-out rows, if there are any."""
    if module.held is not None and facts is not None:
        facts["held_out"] = module.held.facts(len(module.history), module.total)


def optimise_live(
    policy: Policy,
    source: Source[Scored],
    clock: Clock,
    optimisation: PairOptimisation,
    *,
    noise: NoiseModule,
    objective: Objective,
    beta: float,
    seed: int,
    folder: Path,
    report: Report,
    frozen: Policy | None = None,
    average: Average | None = None,
    reads_average: bool = False,
) -> "LiveTraining":
    """Train the policy in place on pairs that are made during the training.

    Args:
        source: makes the pairs, with the reference's log-probabilities unless the reference is the average.
        clock: decides when pairs are made.
        policy, optimisation, noise, objective, beta, seed, folder, report, frozen: as in :func:`optimise`.
        average, reads_average: as in :class:`PreferenceTraining`.

    Raises:
        DataError: a whole pass over the prompts gives no pair.
        StepZeroError, NonFiniteLossError, OutOfMemoryError: as :func:`optimise`.
    """
    reads = Reading.of(objective, noise)
    start = policy.switched_off()

    def expect(some: Sequence[Scored]) -> list[ReferenceLogps]:
        return _score_plainly(start, some, both=reads.rejected)

    collate = Collate(reads, optimisation.share_prompt, seed, expect, None)
    batches: LiveSteps[Scored, PairBatch] = LiveSteps(
        source,
        clock,
        batch_size=optimisation.batch_size,
        epochs=optimisation.epochs,
        steps=optimisation.steps,
        order=lambda count: arrange(optimisation, count, seed),
        seed=seed,
        report=report,
        micro_batch_size=optimisation.rows_at_once,
        collate=collate,
    )
    collate.notes = lambda: batches.notes
    parts = None
    if reads.states:
        body = average.policy if average is not None and reads_average else frozen or policy.reference()
        parts = Frozen(body.head if reads_average else body.head.frozen(), body)
    module = PreferenceTraining(
        policy,
        optimisation,
        len(batches),
        report,
        frozen=parts,
        noise=noise,
        objective=objective,
        beta=beta,
        watches=watches(objective, len(batches)),
        average=average,
        reads_average=reads_average,
    )
    history = fit(module, batches, folder)
    return LiveTraining(history, batches.draws, batches.rollouts)


class LiveTraining(NamedTuple):
    """The result of :func:`optimise_live`.

    Attributes:
        history: a row of metrics for each policy step.
        draws: how often each pair was trained on, in the order in which the pairs were made.
        rollouts: for each rollout, the number of its first pair, and the policy step before which the policy responded.
    """

    history: list[dict[str, float]]
    draws: list[int]
    rollouts: list[tuple[int, int]]


def _measure_moments(
    reference: Policy, pairs: Sequence[Pair], used: Sequence[int], optimisation: PairOptimisation
) -> Moments:
    """Means and variances of the reference's hidden states on the chosen responses of pairs."""
    tokens = [p + c for p, c in zip(lengths(pairs, "prompt_ids"), lengths(pairs, "chosen_ids"), strict=True)]

    def pack_some(numbers: Sequence[int]) -> Packed:
        some = [pairs[i] for i in numbers]
        return pack([pair.prompt_ids for pair in some], [pair.chosen_ids for pair in some])

    chosen = ([used[i] for i in some] for some in by_length([tokens[i] for i in used]))
    batches = ((numbers, pack_some(numbers)) for numbers in chosen)
    device = reference.device
    products = torch.autocast(device.type, torch.bfloat16, enabled=optimisation.autocast)
    with reference.evaluating(), products:
        return measure_moments(lambda packed: reference.hidden(packed.to(device)), batches, len(pairs))


def score_first(
    policy: Policy,
    pairs: Sequence[Pair],
    optimisation: PairOptimisation,
    objective: Objective,
    *,
    seed: int,
    folder: Path,
) -> dict[int, ReferenceLogps]:
    """The policy's log-probabilities of the first step's pairs, by number, from a plain forward pass.

    With them, training checks that it begins with this policy. A training that continues from a checkpoint has passed
    this check already.
    """
    used, _ = _divide(pairs, optimisation)
    groups = arrange(optimisation, len(used), seed)
    if has_checkpoint(folder) or not groups:
        return {}
    rows = [Scored(used[i], pairs[used[i]], None) for i in groups[0]]
    scored = _score_plainly(policy, rows, both=reads_rejected(objective))
    return {row.number: logps for row, logps in zip(rows, scored, strict=True)}


def _score_plainly(policy: Policy, rows: Sequence[Scored], *, both: bool) -> list[ReferenceLogps]:
    """Log-probabilities of pairs in evaluation mode; 0 for rejected responses unless both are read."""
    prompts = [row.pair.prompt_ids for row in rows]
    with policy.evaluating():
        chosen = policy.score(prompts, [row.pair.chosen_ids for row in rows])
        rejected = policy.score(prompts, [row.pair.rejected_ids for row in rows]) if both else [0.0] * len(rows)
    return [ReferenceLogps(row.number, c, r) for row, c, r in zip(rows, chosen, rejected, strict=True)]


def count_tokens(
    pairs: Sequence[Pair], optimisation: PairOptimisation, objective: Objective, seed: int, steps: int
) -> int:
    """The number of tokens that a training of some steps reads: prompts, and the responses that the objective reads."""
    used, both = _divide(pairs, optimisation)[0], reads_rejected(objective)
    read = [lengths(pairs, name) for name in ("prompt_ids", "chosen_ids", *(["rejected_ids"] if both else []))]
    tokens = [sum(part[i] for part in read) for i in used]
    return sum(tokens[i] for group in arrange(optimisation, len(used), seed)[:steps] for i in group)
