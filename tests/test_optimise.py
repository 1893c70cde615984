"""Training: step-0 gate, one step against brute force, accumulation, continuing after a stop, what is reported."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, RMSprop

from dnpo.errors import NonFiniteLossError, SettingsError, StepZeroError
from dnpo.logprobs import sequences
from dnpo.model import Lora, Policy, load
from dnpo.npo import FixedNoise, Noise, NoNoise, Offset, TrainableNoise
from dnpo.objective import logistic
from dnpo.optimise import PreferenceTraining, fine_tune, optimise, split
from dnpo.records import Pair
from dnpo.training import Batch, Optimisation
from tests.conftest import Report, World

MakePolicy = Callable[..., Policy]


def how(**settings: Any) -> Optimisation:
    """Training settings of the tests: four pairs a step."""
    given: dict[str, Any] = {
        "optimizer": partial(RMSprop, lr=1e-3),
        "batch_size": 4,
        "checkpoint_every": 2,
        "clip": 0.0,
    }
    return Optimisation(**(given | settings))


def train(
    policy: Policy,
    pairs: Sequence[Pair],
    folder: Path,
    noise: Noise | None = None,
    optimisation: Optimisation | None = None,
    report: Any = None,
    beta: float = 1.0,
) -> list[dict[str, float]]:
    """Optimise with the settings of the tests."""
    head = policy.head
    return optimise(
        policy,
        pairs,
        optimisation or how(),
        noise=noise or NoNoise(head.in_features, head.out_features),
        objective=partial(logistic, beta=beta),
        beta=beta,
        seed=3,
        folder=folder,
        report=report or Report(),
    )


def trainable(policy: Policy, **settings: Any) -> TrainableNoise:
    """Fresh noise for a policy."""
    return TrainableNoise(policy.head.in_features, policy.head.out_features, **settings)


def weights(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- the step-0 gate


def test_before_the_first_update_margins_are_zero_and_the_loss_is_ln_2(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    first = train(make_policy(), world.pairs(8), tmp_path)[0]
    assert first["margin/clean"] == 0.0
    assert first["loss/policy"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_gate_holds_for_lora_across_two_chained_iterations(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """The reference of iteration k is the policy it starts from: earlier adapters merged in, not switched off."""
    base = tmp_path / "base"
    make_policy().save(base)
    lora = Lora(rank=4)
    earlier: Path | None = None
    starts = []
    for k in range(3):
        policy = load(str(base), earlier)
        starts.append(policy.score([p.token_ids for p in world.prompts[:8]], [r.token_ids for r in world.human[:8]], 8))
        policy.model = lora.on(policy.model, seed=k)
        history = train(policy, world.pairs(16), tmp_path / f"training-{k}")
        assert history[0]["margin/clean"] == 0.0
        assert history[0]["loss/policy"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(history[-1]["margin/clean"]) > 1e-3, "the adapter has to learn for this test to mean anything"
        policy.model.eval()
        learnt = policy.score([p.token_ids for p in world.prompts[:8]], [r.token_ids for r in world.human[:8]], 8)
        folder = tmp_path / f"policy-{k}"
        policy.save(folder, earlier)
        assert [p.name for p in sorted(folder.iterdir())] == [f"adapter-{n:02d}" for n in range(k + 1)]
        again = load(str(base), folder)
        found = again.score([p.token_ids for p in world.prompts[:8]], [r.token_ids for r in world.human[:8]], 8)
        assert found == pytest.approx(learnt, abs=1e-3), "what is loaded is what was trained"
        earlier = folder
    assert starts[0] != pytest.approx(starts[1], abs=1e-2)
    assert starts[1] != pytest.approx(starts[2], abs=1e-2)


def gate(policy: Policy, reference: Policy, pairs: list[Pair]) -> None:
    """Only the first forward of a training, with the reference given."""
    module = PreferenceTraining(
        policy,
        how(),
        1,
        Report(),
        reference=reference,
        noise=NoNoise(1, 1),
        objective=partial(logistic, beta=1.0),
        beta=1.0,
        seed=0,
    )
    completions = [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs]
    laid_out = sequences([p.prompt_ids for p in pairs] * 2, completions, policy.pad_id)
    policy.model.train()
    module.terms(Batch(laid_out, tuple(p.id for p in pairs), 1.0, True))


def test_the_gate_names_a_reference_with_other_weights(make_policy: MakePolicy, world: World) -> None:
    with pytest.raises(StepZeroError, match="other weights"):
        gate(make_policy(0), make_policy(1), world.pairs(4))


def test_the_gate_names_dropout(make_policy: MakePolicy, world: World) -> None:
    policy = make_policy(attention_dropout=0.5)
    with pytest.raises(StepZeroError, match="dropout"):
        gate(policy, policy.reference(), world.pairs(4))


def test_the_gate_names_an_adapter_that_is_not_fresh(make_policy: MakePolicy, world: World) -> None:
    policy = make_policy()
    policy.model = Lora(rank=4).on(policy.model, seed=0)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    with pytest.raises(StepZeroError, match="adapter is not fresh"):
        gate(policy, policy.reference(), world.pairs(4))


# --- one step, against brute force


def test_a_step_agrees_with_brute_force(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """SGD on pairs of unequal lengths, against log-probabilities and gradients of single unpadded sequences."""
    beta, lr, pairs = 0.7, 0.05, world.pairs(8)
    policy = make_policy()
    slow = make_policy().model.double()

    def logp(prompt: list[int], completion: list[int]) -> Tensor:
        logits = slow(input_ids=torch.tensor([prompt + completion])).logits[0]
        total = torch.zeros((), dtype=torch.float64)
        for t, token in enumerate(completion):
            total = total + logits[len(prompt) + t - 1].log_softmax(-1)[token]
        return total

    reference = [[float(logp(p.prompt_ids, ids).detach()) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    losses = []
    for _ in range(2):  # the second step starts from margins that are not 0
        loss = torch.zeros((), dtype=torch.float64)
        for pair, (chosen, rejected) in zip(pairs, reference, strict=True):
            gap = logp(pair.prompt_ids, pair.chosen_ids) - chosen - logp(pair.prompt_ids, pair.rejected_ids) + rejected
            loss = loss - torch.log(1 / (1 + torch.exp(-beta * gap))) / len(pairs)
        slow.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in slow.parameters():
                p -= lr * p.grad
        losses.append(float(loss.detach()))

    settings = how(optimizer=partial(SGD, lr=lr), batch_size=8, steps=2, warmup=0.0, decay=False)
    history = train(policy, pairs, tmp_path, optimisation=settings, beta=beta)
    assert [row["loss/policy"] for row in history] == pytest.approx(losses, abs=1e-5)
    assert losses[1] < losses[0]
    for ours, theirs in zip(policy.model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-3)


def test_micro_batches_change_nothing_but_rounding(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Seven pairs in groups of four: the last group is smaller, and 3 + 1 micro-batches weigh as the whole does."""
    found = []
    for micro in (0, 3, 1):
        policy = make_policy()
        settings = how(micro_batch_size=micro, optimizer=partial(SGD, lr=0.05), epochs=2)
        history = train(policy, world.pairs(7), tmp_path / str(micro), optimisation=settings)
        assert len(history) == 4
        found.append((weights(policy), [row["loss/policy"] for row in history]))
    for some, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], abs=1e-5)
        for a, b in zip(some, found[0][0], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_clipping_bounds_the_step_and_reports_the_norm_before(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    before, policy = weights(make_policy()), make_policy()
    settings = how(optimizer=partial(SGD, lr=1.0), clip=0.01, steps=1, warmup=0.0)
    row = train(policy, world.pairs(4), tmp_path, optimisation=settings)[0]
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(before, weights(policy), strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-2)
    assert row["grad_norm/policy"] > 0.1


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (11, 0.5), (19, 1 / 18)])
def test_learning_rate_rises_linearly_then_falls_to_zero(step: int, factor: float) -> None:
    """20 steps, 10 % warm-up: two steps below the peak, then a straight line that would meet 0 at step 20."""
    assert how(warmup=0.1).factor(step, 20) == pytest.approx(factor)
    assert how(warmup=0.0, decay=False).factor(step, 20) == 1.0


# --- two players


def test_noise_is_trained_along_and_shrinks_the_margin(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    noise = trainable(policy, alpha=0.01, learning_rate=0.02)
    history = train(policy, world.pairs(32), tmp_path, noise=noise)
    assert history[-1]["npo/variance"] > history[0]["npo/variance"], "the noise term pushes s up"
    assert sum(row["margin/shift"] for row in history) / len(history) < -0.05
    assert all(
        row["margin/noisy"] == pytest.approx(row["margin/clean"] + row["margin/shift"], abs=1e-4) for row in history
    )
    assert all(row["npo/variance"] < 1.0 for row in history)
    assert history[0]["margin/clean"] == 0.0, "noise is not part of the gate's margins"
    assert {"loss/noise", "loss/variance", "grad_norm/noise", "lr/noise", "npo/at_bound"} <= set(history[0])


def test_vanishing_noise_trains_as_no_noise(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    plain, noisy = make_policy(), make_policy()
    train(plain, world.pairs(8), tmp_path / "a")
    train(noisy, world.pairs(8), tmp_path / "b", noise=trainable(noisy, start_log_std=-20.0, learning_rate=1e-9))
    for a, b in zip(weights(plain), weights(noisy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_offset_is_noise_without_chance(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    history = train(policy, world.pairs(8), tmp_path, noise=Offset(1, 1, shift=1.5), beta=0.5)
    assert [row["margin/shift"] for row in history] == pytest.approx([-0.75] * len(history), abs=1e-5)
    # The gate sees margin 0; the policy meets −β · 1.5.
    assert history[0]["loss/policy"] == pytest.approx(math.log1p(math.exp(0.75)), abs=1e-5)


def test_noise_does_not_disturb_other_chance(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    before = torch.get_rng_state()
    train(policy, world.pairs(8), tmp_path, noise=FixedNoise(1, 1))
    assert torch.equal(before, torch.get_rng_state())


# --- stopping and continuing


class Stop(Exception):
    """Stands for a kill between two steps."""


class Stopping(Report):
    """Raises after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, amount: int = 1) -> None:
        super().advance(amount)
        if self.done == self.after:
            raise Stop


@pytest.mark.parametrize("after", [3, 5, 9, 10])
def test_a_stopped_training_ends_as_an_undisturbed_one(
    after: int, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Both optimizers, schedule, order of the pairs, noise generator and history continue, bit for bit."""
    settings = how(epochs=2, micro_batch_size=3)

    def run(folder: Path, report: Report) -> tuple[list[Tensor], list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        noise = trainable(policy, learning_rate=0.01)
        history = train(policy, world.pairs(22), folder, noise=noise, optimisation=settings, report=report)
        timeless = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in history]
        return weights(policy), [p.detach().clone() for p in noise.parameters()], timeless

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = run(tmp_path / "a", Report())
    with pytest.raises(Stop):
        run(tmp_path / "b", Stopping(after))
    assert (tmp_path / "b" / "checkpoint.ckpt").is_file()
    report = Report()
    continued = run(tmp_path / "b", report)
    assert report.done == report.total == 12
    assert len(report.rows) == 12, "the steps before the stop are reported too"
    assert same(undisturbed[0], continued[0])
    assert same(undisturbed[1], continued[1])
    assert undisturbed[2] == continued[2]


def test_a_checkpoint_holds_only_what_is_trained(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    policy.model = Lora(rank=2).on(policy.model, seed=0)
    with pytest.raises(Stop):
        train(policy, world.pairs(32), tmp_path, report=Stopping(5))
    saved = torch.load(tmp_path / "checkpoint.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)


def test_fine_tuning_learns_and_continues(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    rows = [(p.id, p.token_ids, r.token_ids) for p, r in zip(world.prompts, world.human, strict=True)]
    settings = how(optimizer=partial(AdamW, lr=3e-3), steps=30, batch_size=16, checkpoint_every=10)

    def run(folder: Path, report: Report) -> tuple[list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        history = fine_tune(policy, rows, settings, seed=1, folder=folder, report=report)
        return weights(policy), history

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed, history = run(tmp_path / "a", Report())
    with pytest.raises(Stop):
        run(tmp_path / "b", Stopping(25))
    continued, _ = run(tmp_path / "b", Report())
    assert same(undisturbed, continued)
    assert history[-1]["loss/policy"] < 0.75 * history[0]["loss/policy"]


# --- what stops a training


def test_a_loss_that_is_not_finite_names_step_and_rows(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    noise = FixedNoise(1, 1, variance=math.inf)
    with pytest.raises(NonFiniteLossError, match=r"step 0: the loss is nan on rows train-\d+"):
        train(policy, world.pairs(4), tmp_path, noise=noise)


def test_no_rows_is_an_error_and_no_epochs_is_not(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing to train on"):
        train(make_policy(), [], tmp_path)
    policy = make_policy()
    assert train(policy, world.pairs(4), tmp_path, optimisation=how(epochs=0)) == []
    assert same(weights(policy), weights(make_policy()))


def test_split_puts_the_chosen_first() -> None:
    pairs = split(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert pairs.chosen_B.tolist() == [1.0, 2.0]
    assert pairs.rejected_B.tolist() == [3.0, 4.0]


def test_fine_tuning_weighs_micro_batches_by_their_tokens(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    rows = [(p.id, p.token_ids, r.token_ids) for p, r in zip(world.prompts, world.human, strict=True)][:7]
    assert len({len(r[2]) for r in rows}) > 2, "lengths must differ for this test to mean anything"
    found = []
    for micro in (0, 3):
        policy = make_policy()
        settings = how(micro_batch_size=micro, optimizer=partial(SGD, lr=0.05), epochs=2)
        fine_tune(policy, rows, settings, seed=1, folder=tmp_path / str(micro), report=Report())
        found.append(weights(policy))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_steps_without_rows_end_with_a_message(make_policy: MakePolicy, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing to train on"):
        fine_tune(make_policy(), [], how(steps=10), seed=0, folder=tmp_path, report=Report())


def test_a_gradient_that_is_not_finite_reaches_no_weight(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """A finite loss with a NaN gradient stops the training before the step, and names all rows of the group."""
    policy = make_policy()
    before = weights(policy)
    next(policy.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(
        NonFiniteLossError, match=r"step 0: the gradient norm of the policy is nan on rows (train-\d+, ){3}t"
    ):
        train(policy, world.pairs(4), tmp_path, optimisation=how(micro_batch_size=2))
    assert same(before, weights(policy))


def test_a_wrong_learning_rate_is_refused_when_settings_are_read() -> None:
    for wrong in (-1.0, "abc"):
        with pytest.raises(SettingsError, match="optimizer: "):
            how(optimizer=partial(RMSprop, lr=wrong))
