"""Training on rollouts by the clipped ratio: equations against brute force, special cases, and checkpoints."""

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import bandit
from torch import Tensor
from torch.nn.functional import log_softmax

from dnpo import catalogue
from dnpo.generate import Sampling
from dnpo.generate.hf import sample
from dnpo.methods.ppo import ClippedRatio
from dnpo.methods.ppo.equations import (
    advantages,
    divergence,
    explained_variance,
    is_clipped,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from dnpo.methods.ppo.training import Experience, Observer, RolloutTraining, collate
from dnpo.optimise.live import Clock
from dnpo.optimise.parts import Optimisation
from dnpo.optimise.steps import Batches, Slice, arrange
from dnpo.optimise.training import fit
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.records import Rollout
from dnpo.tables import read, write
from tests.commands import SMOKE, TINY, succeed, summary
from tests.commands import train as run
from tests.conftest import Report, World, torch_optimizer
from tests.test_optimise import Stop, Stopping, close, how, same, timeless, weights

MakePolicy = Callable[..., Policy]
PLAIN = ClippedRatio(clip=0.0, value_clip=0.0, discount=1.0, trace=1.0, whiten=False, beta=0.1)


def wide(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- equations --------------------------------------------------------------------------------------------------------


def test_the_reward_is_the_score_at_the_end_and_a_penalty_at_every_token() -> None:
    """β = ½: −½ (−1 + 2) = −½ and −½ (−2 + 1½) + 3 = 3¼; the second response has one token: −½ · 0 + 1."""
    logp_SL, reference_SL = wide([-1.0, -2.0], [-1.0, 0.0]), wide([-2.0, -1.5], [-1.0, 0.0])
    found = token_rewards(wide(3.0, 1.0), logp_SL, reference_SL, torch.tensor([2, 1]), beta=0.5)
    torch.testing.assert_close(found, wide([-0.5, 3.25], [1.0, 0.0]), rtol=0, atol=0)


def test_rewards_add_up_to_the_score_minus_the_log_ratio() -> None:
    logp_SL, reference_SL, score_S = noise(5, 7), noise(5, 7, seed=1), noise(5, seed=2)
    found = token_rewards(score_S, logp_SL, reference_SL, torch.full((5,), 7), beta=0.3)
    torch.testing.assert_close(found.sum(1), score_S - 0.3 * (logp_SL.sum(1) - reference_SL.sum(1)))


def test_advantages_have_the_worked_numbers() -> None:
    """γ = 1, λ = ½: δ = (−¼, ¼, ½), so A = (−¼ + ½ · ½, ¼ + ½ · ½, ½)."""
    found = advantages(wide([0.0, 0.0, 1.0]), wide([0.5, 0.25, 0.5]), discount=1.0, trace=0.5)
    torch.testing.assert_close(found, wide([0.0, 0.5, 0.5]), rtol=0, atol=0)


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.0, 1.0)])
def test_advantages_are_the_sum_of_later_errors(discount: float, trace: float) -> None:
    """By the definition, response by response: A_t = Σ_l (γλ)^l δ_{t+l}."""
    lengths = [6, 1, 4, 3]
    reward_SL, value_SL = noise(4, 6), noise(4, 6, seed=1)
    for s, n in enumerate(lengths):
        reward_SL[s, n:] = value_SL[s, n:] = 0
    found = advantages(reward_SL, value_SL, discount=discount, trace=trace)
    for s, n in enumerate(lengths):
        value = [*value_SL[s, :n].tolist(), 0.0]
        error = [float(reward_SL[s, t]) + discount * value[t + 1] - value[t] for t in range(n)]
        wanted = [sum((discount * trace) ** (u - t) * error[u] for u in range(t, n)) for t in range(n)]
        torch.testing.assert_close(found[s, :n], wide(*wanted))
        assert not found[s, n:].any()


def test_a_trace_of_1_gives_later_rewards_minus_the_value() -> None:
    reward_SL, value_SL = noise(3, 5), noise(3, 5, seed=1)
    later_SL = reward_SL.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages(reward_SL, value_SL, discount=1.0, trace=1.0), later_SL - value_SL)


def test_whitening_gives_mean_0_and_variance_1() -> None:
    found = whiten(wide(1.0, 3.0, 5.0))
    torch.testing.assert_close(found, wide(-math.sqrt(1.5), 0.0, math.sqrt(1.5)), rtol=1e-8, atol=0)
    assert not whiten(wide(2.0, 2.0)).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, 1.0),
        (1.5, -2.0, 3.0, 3.0, 0.0),
        (0.5, 2.0, -1.0, -1.0, 0.0),
        (0.5, -2.0, 1.6, 0.0, 1.0),
        (1.1, 2.0, -2.2, -2.2, 0.0),
        (1.0, -2.0, 2.0, 2.0, 0.0),
    ],
)
def test_ratios_are_clipped_beyond_the_limit(
    ratio: float, advantage: float, loss: float, slope: float, clipped: float
) -> None:
    """ε = 0.2; the derivative is in log π."""
    logp_N = wide(-1.0 + math.log(ratio)).requires_grad_()
    found = policy_loss(logp_N, wide(-1.0), wide(advantage), clip=0.2)
    (gradient,) = torch.autograd.grad(found.sum(), logp_N)
    assert (float(found.detach()), float(gradient)) == pytest.approx((loss, slope), abs=1e-12)
    assert float(is_clipped(logp_N.detach(), wide(-1.0), wide(advantage), clip=0.2)) == clipped


def test_an_infinite_clip_does_not_clip() -> None:
    logp_N, old_N, advantage_N = noise(50), noise(50, seed=1), noise(50, seed=2)
    found = policy_loss(logp_N, old_N, advantage_N, clip=math.inf)
    torch.testing.assert_close(found, -(logp_N - old_N).exp() * advantage_N, rtol=0, atol=0)
    torch.testing.assert_close(found, policy_loss(logp_N, old_N, advantage_N, clip=1e9), rtol=0, atol=0)
    assert not is_clipped(logp_N, old_N, advantage_N, clip=math.inf).any()


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [(1.0, 0.0, 2.0, 1.62), (0.1, 0.0, 2.0, 1.805), (1.0, 0.0, 0.5, 0.125), (1.0, 1.0, 0.0, 0.5)],
)
def test_values_are_clipped_if_the_loss_is_larger(value: float, old: float, target: float, loss: float) -> None:
    """ε = 0.2: ½ (0.2 − 2)² = 1.62 in place of ½ (1 − 2)², and ½ (1 − ½)² in place of ½ (0.2 − ½)²."""
    assert float(value_loss(wide(value), wide(old), wide(target), clip=0.2)) == pytest.approx(loss, abs=1e-12)
    assert float(value_loss(wide(value), wide(old), wide(target), clip=math.inf)) == 0.5 * (value - target) ** 2


def test_the_estimate_of_the_divergence_is_unbiased() -> None:
    """Summed over all entries with their probabilities, it is the KL itself."""
    old_V, new_V = log_softmax(noise(9), 0), log_softmax(noise(9, seed=1), 0)
    mean = (old_V.exp() * divergence(new_V, old_V)).sum()
    torch.testing.assert_close(mean, (old_V.exp() * (old_V - new_V)).sum())
    assert (divergence(new_V, old_V) >= 0).all()


def test_explained_variance() -> None:
    """Var R = 2/3; errors (0, 0, 1) have variance 2/9, so 1/3 of the variance remains."""
    target_N = wide(1.0, 2.0, 3.0)
    assert explained_variance(target_N, target_N) == 1
    assert explained_variance(wide(2.0, 2.0, 2.0), target_N) == 0
    assert explained_variance(wide(1.0, 2.0, 2.0), target_N) == pytest.approx(2 / 3)
    assert explained_variance(-target_N, target_N) == -3
    assert explained_variance(target_N, wide(1.0, 1.0, 1.0)) == 0


# --- rollouts, and what is computed where they enter ------------------------------------------------------------------


def respond(policy: Policy, world: World, count: int = 8, seed: int = 0) -> list[Rollout]:
    """Samples of at most 6 tokens, and scores in points by a sum of their tokens."""
    prompts = world.prompts[:count]
    found = sample(policy, prompts, Sampling(batch_size=16), "policy@0", 6, seed, Report())
    return [
        Rollout(
            **{n: getattr(r, n) for n in r.__slots__},
            prompt_ids=p.token_ids,
            score=10.0 * (sum(r.token_ids) % 11),
            reason="",
            rollout=seed,
            step=0,
        )
        for p, r in zip(prompts, found, strict=True)
    ]


def make_training(
    policy: Policy, settings: ClippedRatio, optimisation: Optimisation | None = None, reference: Policy | None = None
) -> tuple[Observer, RolloutTraining]:
    """By default the reference is the policy before training, if one is read."""
    frozen = reference or (policy.reference() if settings.reads_reference else None)
    observer = Observer(policy, frozen, settings, autocast=False)
    return observer, RolloutTraining(observer, optimisation or how(), 1, Report(), dict)


def logits(policy: Policy, rollout: Rollout) -> Tensor:
    """All log-probabilities at the tokens of a response by transformers' own forward pass, tokens × V."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.token_ids]])
    out = policy.causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    return log_softmax(out[len(rollout.prompt_ids) - 1 : -1], -1)


def picked(policy: Policy, rollout: Rollout) -> Tensor:
    return logits(policy, rollout).gather(1, torch.tensor(rollout.token_ids).unsqueeze(1)).squeeze(1)


def gradients(training: RolloutTraining, rows: Sequence[Experience], micro: int = 0) -> list[Tensor]:
    """The gradient of all weights of the policy in one step on these rows."""
    size, group = micro or len(rows), tuple(rows)
    training.policy.model.zero_grad(set_to_none=False)
    for first in range(0, len(rows), size):
        batch = collate(Slice(0, group[first : first + size], group))
        (training.terms(batch)[0] * batch.share).backward()
    return [p.grad.clone() for p in training.policy.model.parameters() if p.grad is not None]


def double(policy: Policy) -> Policy:
    policy.model.double()
    return policy


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    a, b = (torch.cat([t.flatten() for t in some]) for some in (one, other))
    return float(a @ b / (a.norm() * b.norm()))


def teach_values(training: Observer, seed: int = 5) -> None:
    """A value head with random weights."""
    training.value_head.double()
    with torch.no_grad():
        training.value_head.weight_H.copy_(0.1 * noise(len(training.value_head.weight_H), seed=seed))


def test_inputs_of_the_update_equal_their_definitions(make_policy: MakePolicy, world: World) -> None:
    """Log-probabilities by transformers' forward pass; the reference is another policy."""
    policy, other = double(make_policy()), double(make_policy(1))
    settings = ClippedRatio(beta=0.2, trace=0.9, discount=0.8, whiten=False, reward_scale=0.1)
    observe, _ = make_training(policy, settings, reference=other)
    teach_values(observe)
    rollouts = respond(policy, world)
    assert len({r.tokens for r in rollouts}) > 1, "responses of different lengths"
    for rollout, row in zip(rollouts, observe(rollouts), strict=True):
        with torch.no_grad():
            logp_N, reference_N = picked(policy, rollout), picked(other, rollout)
        torch.testing.assert_close(wide(*row.logps), logp_N)
        assert row.log_ratio == pytest.approx(float((logp_N - reference_N).sum()))
        reward_N = -0.2 * (logp_N - reference_N)
        reward_N[-1] += 0.1 * (rollout.score or 0)
        value_N = wide(*row.values)
        advantage_1N = advantages(reward_N[None], value_N[None], discount=0.8, trace=0.9)
        torch.testing.assert_close(wide(*row.advantages), advantage_1N[0])
        torch.testing.assert_close(wide(*row.returns), advantage_1N[0] + value_N)
        later = [
            sum(0.8 ** (u - t) * float(reward_N[u]) for u in range(t, len(reward_N))) for t in range(len(reward_N))
        ]
        torch.testing.assert_close(wide(*row.later), wide(*later))


def test_advantages_are_whitened_over_the_whole_rollout(make_policy: MakePolicy, world: World) -> None:
    policy = double(make_policy())
    observe, _ = make_training(policy, ClippedRatio(whiten=True))
    rows = observe(respond(policy, world))
    every = wide(*(number for row in rows for number in row.advantages))
    assert float(every.mean()) == pytest.approx(0, abs=1e-12)
    assert float(every.var(correction=0)) == pytest.approx(1, rel=1e-4)
    plain, _ = make_training(policy, ClippedRatio(whiten=False))
    assert [row.returns for row in rows] == [row.returns for row in plain(respond(policy, world))]


def test_responses_without_a_score_are_left_out(make_policy: MakePolicy, world: World) -> None:
    policy = make_policy()
    (observe, _), rollouts = make_training(policy, PLAIN), respond(policy, world)
    without = [replace(rollouts[0], score=None), *rollouts[1:]]
    assert observe(without) == observe(rollouts[1:])
    assert observe([replace(rollout, score=None) for rollout in rollouts]) == []


# --- limits -----------------------------------------------------------------------------------------------------------


def reinforce(
    policy: Policy, rollouts: Sequence[Rollout], rows: Sequence[Experience], reference: Policy
) -> list[Tensor]:
    """−Σ (later rewards − baseline) ∇ log π over all tokens, divided by their number; from full log-probabilities."""
    policy.model.zero_grad(set_to_none=False)
    for rollout, row in zip(rollouts, rows, strict=True):
        logp_N = picked(policy, rollout)
        with torch.no_grad():
            reward_N = -PLAIN.beta * (logp_N - picked(reference, rollout))
            reward_N[-1] += PLAIN.reward_scale * (rollout.score or 0)
            later_N = reward_N.flip(0).cumsum(0).flip(0)
        (-((later_N - wide(*row.values)) * logp_N).sum() / sum(r.tokens for r in rollouts)).backward()
    return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("micro", [0, 3])
def test_the_first_gradient_equals_reinforce_with_a_baseline(micro: int, make_policy: MakePolicy, world: World) -> None:
    policy, other = double(make_policy()), double(make_policy(1))
    rollouts = respond(policy, world)
    observe, training = make_training(policy, PLAIN, reference=other)
    teach_values(observe)
    rows = observe(rollouts)
    found, wanted = gradients(training, rows, micro), reinforce(policy, rollouts, rows, other)
    assert max(float(t.abs().max()) for t in wanted) > 1e-3
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    _, clipped = make_training(policy, replace(PLAIN, clip=0.2), reference=other)
    for one, two in zip(gradients(clipped, rows), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_with_whitening_the_gradient_is_not_a_multiple_of_it(make_policy: MakePolicy, world: World) -> None:
    policy, other = double(make_policy()), double(make_policy(1))
    rollouts = respond(policy, world)
    found = []
    for whitening in (False, True):
        observe, training = make_training(policy, replace(PLAIN, whiten=whitening), reference=other)
        found.append(gradients(training, observe(rollouts)))
    assert abs(cosine(*found)) < 0.99


def test_ratios_are_1_at_the_first_pass(make_policy: MakePolicy, world: World) -> None:
    """In float32; the batches of the rollout and of the step differ in shape."""
    policy = make_policy()
    (observe, training), rollouts = make_training(policy, ClippedRatio()), respond(policy, world, 16)
    rows = tuple(observe(rollouts))
    batch = collate(Slice(0, rows[3:9], rows))
    with torch.no_grad():
        metrics = training.terms(batch)[1]
        for rollout, row in zip(rollouts, rows, strict=True):
            torch.testing.assert_close(picked(policy, rollout).double(), wide(*row.logps), rtol=0, atol=2e-5)
    assert float(metrics["ratio/clipped"]) == 0
    assert float(metrics["ratio/kl"]) < 1e-9
    assert float(metrics["loss/policy"]) == pytest.approx(-float(batch.advantage_N.mean()), abs=1e-5)


def test_ratios_leave_1_once_the_policy_moves(make_policy: MakePolicy, world: World) -> None:
    policy = make_policy()
    (observe, training), rollouts = make_training(policy, ClippedRatio()), respond(policy, world, 16)
    rows = tuple(observe(rollouts))
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.05)
        metrics = training.terms(collate(Slice(0, rows, rows)))[1]
    assert float(metrics["ratio/clipped"]) > 0.05
    assert float(metrics["ratio/kl"]) > 1e-3


def test_only_the_head_learns_values_by_default(make_policy: MakePolicy, world: World) -> None:
    """The value loss changes the policy's gradient only if it has a weight, and in proportion to the weight."""
    policy = double(make_policy())
    rollouts = respond(policy, world)
    found = {}
    for name, changes in {
        "alone": {},
        "without": {"value_learning_rate": 0.0},
        "half": {"value_weight": 0.5},
        "whole": {"value_weight": 1.0},
    }.items():
        observe, training = make_training(policy, replace(PLAIN, **changes))
        teach_values(observe)
        found[name] = torch.cat([g.flatten() for g in gradients(training, observe(rollouts))])
    torch.testing.assert_close(found["alone"], found["without"], rtol=0, atol=0)
    more = found["whole"] - found["alone"]
    assert float(more.norm()) > 0.01 * float(found["alone"].norm())
    torch.testing.assert_close(found["half"] - found["alone"], 0.5 * more)


# --- a training -------------------------------------------------------------------------------------------------------


class Some:
    """A source of rollouts: the policy responds to 8 prompts, in two rollouts a pass, kept on the disk."""

    per_pass = 2

    def __init__(self, policy: Policy, world: World, folder: Path) -> None:
        self.policy, self.world, self.folder = policy, world, folder

    def ask(self, rollout: int) -> None:
        write(self.path(rollout), respond(self.policy, self.world, 8, seed=rollout), Rollout)

    def path(self, rollout: int) -> Path:
        return self.folder / f"responses-{rollout}.parquet"

    def check(self, rollouts: int) -> None:
        """At the start there are no files."""

    def take(self, rollout: int, first: int, step: int) -> list[Rollout]:
        return read(self.path(rollout), Rollout)

    def measure(self, rollout: int) -> dict[str, float]:
        return {"rollout/reward": float(rollout)}

    def describe(self, rollout: int) -> str:
        return "8 responses"

    def explain(self) -> str:
        return "nothing has a score"


def train(
    policy: Policy,
    world: World,
    folder: Path,
    settings: ClippedRatio,
    optimisation: Optimisation,
    *,
    report: Report | None = None,
    reference: Policy | None = None,
    every: int = 3,
) -> list[dict[str, float]]:
    folder.mkdir(exist_ok=True, parents=True)
    history, tokens = settings.train(
        policy,
        source=Some(policy, world, folder),
        clock=Clock(every=every),
        reference=reference or (policy.reference() if settings.reads_reference else None),
        optimisation=optimisation,
        seed=3,
        folder=folder,
        report=report or Report(),
    )
    assert tokens > 0
    return history


def whole(**settings: Any) -> Optimisation:
    """Policy steps of whole rollouts."""
    return how(batch_size=8, **settings)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("after", [2, 5])
def test_a_stopped_training_ends_as_an_undisturbed_one(
    weight: float, after: int, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Equal in all bits, also within a rollout: the value head, its optimizer, and the used part of the rollout."""
    settings, optimisation = ClippedRatio(value_weight=weight), whole(epochs=2, micro_batch_size=3, checkpoint_every=1)

    def run(folder: Path, report: Report) -> tuple[list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        history = train(policy, world, folder, settings, optimisation, report=report)
        return weights(policy), timeless(history)

    undisturbed = run(tmp_path / "a", Report())
    assert len(undisturbed[1]) == 12
    with pytest.raises(Stop):
        run(tmp_path / "b", Stopping(after))
    continued = run(tmp_path / "b", Report())
    assert same(undisturbed[0], continued[0])
    assert undisturbed[1] == continued[1]
    assert undisturbed[1][-1]["value/explained"] != 0, "the value head has learned"


def test_micro_batches_change_nothing_but_rounding(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    found = []
    for micro in (0, 1, 3):
        policy = make_policy()
        optimisation = whole(micro_batch_size=micro, optimizer=torch_optimizer("SGD", lr=0.05))
        history = train(policy, world, tmp_path / str(micro), ClippedRatio(), optimisation)
        found.append((weights(policy), timeless(history)))
    for other in found[1:]:
        close(found[0][0], other[0], 1e-4)
        for one, two in zip(found[0][1], other[1], strict=True):
            assert one == pytest.approx(two, abs=1e-3)


def test_ratios_are_1_in_the_first_step_on_a_rollout_and_in_no_other(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    history = train(make_policy(), world, tmp_path, ClippedRatio(), whole())
    for number, row in enumerate(history):
        assert (row["ratio/kl"] < 1e-8) is (number % 3 == 0), number
        assert number % 3 or row["ratio/clipped"] == 0


def test_values_come_to_explain_the_rewards(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """For fewer tokens than the head has weights, under a policy that hardly changes."""
    policy = make_policy()
    still = how(epochs=80, batch_size=4, optimizer=torch_optimizer("SGD", lr=1e-9))
    observe, _ = make_training(policy, replace(PLAIN, value_learning_rate=0.03))
    rows = observe(respond(policy, world, 4))
    assert sum(len(row.token_ids) for row in rows) < 32
    training = RolloutTraining(observe, still, 80, Report(), dict)
    history = fit(training, Batches(rows, arrange(still, 4, 0), 4, collate), tmp_path)
    rows = observe(respond(policy, world, 4))
    values, later = (wide(*(x for row in rows for x in getattr(row, name))) for name in ("values", "later"))
    assert explained_variance(values, later) > 0.9
    assert history[-1]["loss/value"] < 0.05 * history[0]["loss/value"]


def test_every_step_has_the_metrics_of_its_rollout(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """The source's metrics, the divergence from the reference, and the variance explained by values."""
    policy, other = make_policy(), make_policy(1)
    rows = make_training(make_policy(), ClippedRatio(), reference=other)[0](respond(policy, world))
    history = train(policy, world, tmp_path, ClippedRatio(), whole(micro_batch_size=3), reference=other)
    assert history[0]["rollout/kl"] == pytest.approx(sum(row.log_ratio for row in rows) / 8, rel=1e-4)
    assert [row["rollout/reward"] for row in history] == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert [row["value/explained"] for row in history[:3]] == [0.0] * 3
    assert len({row["value/explained"] for row in history[3:]}) == 1
    assert history[3]["value/explained"] != 0
    assert history[0]["lr/value"] == ClippedRatio().value_learning_rate
    catalogue.check(set().union(*history) - {"step"})


def test_without_a_reference_there_is_no_divergence_from_it(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    settings = replace(PLAIN, beta=0.0, value_learning_rate=0.0)
    assert not settings.reads_reference
    history = train(make_policy(), world, tmp_path, settings, whole())
    assert not {"rollout/kl", "loss/value", "value/explained", "grad_norm/value"} & set(history[0])


def test_with_an_adapter_the_base_weights_do_not_change(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    policy.model = Lora(rank=4).on(policy.model, 0)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    history = train(policy, world, tmp_path, ClippedRatio(), whole())
    assert history[0]["rollout/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(history[-1]["rollout/kl"]) > 1e-4
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters() if n in before)


# --- the optimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", bandit.WAYS)
def test_training_ends_at_the_closed_form_optimum(way: str) -> None:
    """The reference times exp(reward / β), normalised; with another β the optimum would be elsewhere."""
    settings, every = bandit.WAYS[way]
    world = bandit.Bandit.draw(0)
    best_PV, other_PV = world.best(settings), world.best(replace(settings, beta=2 * settings.beta))
    assert bandit.total_variation(best_PV, other_PV) > 0.25
    found = bandit.learn(settings, every, 80, 0, 5e-3)
    assert found[0] > 0.5
    assert found[-1] < 0.1


def test_the_distance_between_distributions() -> None:
    """The distances are ½ (½ + ½ + 0) and 0."""
    one_PV, other_PV = wide([1.0, 0.0, 0.0], [0.2, 0.3, 0.5]), wide([0.5, 0.5, 0.0], [0.2, 0.3, 0.5])
    assert bandit.total_variation(one_PV, other_PV) == 0.25


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("method=spin objective=ppo", r"rollout: ClippedRatio \(objective\) trains on responses .*take rollout=live"),
        ("judge=off", r"judge: NoJudge gives no scores"),
        ("dsl=score", r"dsl: .* labels pairs, but ClippedRatio \(objective\) makes none; take dsl=off"),
        ("npo=fixed npo.start=0", r"npo: FixedNoise .*does not read; take npo=off"),
        ("reference=none", r"reference=none: ClippedRatio \(objective\) reads the reference"),
        ("reference=ema ema=on", r"ema: ClippedRatio .*take ema=off"),
        ("rollout.ahead_by=1", r"rollout\.ahead_by=1: ClippedRatio"),
        ("rollout.temperature=0.7", r"rollout\.temperature=0\.7: .*take rollout\.temperature=1"),
        ("rollout.top_p=0.9", r"rollout\.top_p=0\.9: "),
        ("rollout.segment=3", r"rollout\.segment=3: "),
        ("curriculum=prune", r"curriculum: .*rollout=live"),
        ("objective.beta=-1", r"objective\.beta=-1: expected a number of at least 0"),
        ("objective.trace=1.5", r"objective\.trace=1\.5: expected a number from 0 to 1"),
        ("objective.epsilon=0.1", r"objective\.epsilon"),
    ],
    ids=lambda text: text.replace(" ", "_") if "\\" not in text else "",
)
def test_settings_without_meaning_for_ppo_are_refused_by_name(overrides: str, named: str, tmp_path: Path) -> None:
    done = run(tmp_path, *SMOKE, "method=ppo", *overrides.split())
    assert done.returncode == 1, done.stdout
    assert re.search(named, done.stderr), done.stderr
    assert not list(tmp_path.glob("store/*/*/manifest.json"))


@pytest.mark.long
@pytest.mark.parametrize(("method", "every"), [("ppo", 4), ("reinforce", 1)])
def test_a_run_keeps_its_training_responses(method: str, every: int, tiny: Path, tmp_path: Path) -> None:
    """48 prompts in 3 rollouts of 16; each response is in the store with its score, and token by token."""
    folder = shutil.copytree(tiny, tmp_path / "run", symlinks=True)
    succeed(folder, *SMOKE, *TINY, f"method={method}", "iterations=1")
    made = max(folder.glob("store/optimise/*/manifest.json"), key=lambda path: path.stat().st_mtime).parent
    rollouts, rows = read(made / "rollouts.parquet", Rollout), read(made / "experiences.parquet", Experience)
    assert len(rollouts) == len(rows) == 48
    assert {rollout.step for rollout in rollouts} == {0, every, 2 * every}
    assert [row.token_ids for row in rows] == [rollout.token_ids for rollout in rollouts]
    for row, rollout in zip(rows, rollouts, strict=True):
        assert sum(row.logps) == pytest.approx(rollout.logprob, abs=1e-3)
    steps = json.loads((made / "steps.json").read_text())
    assert len(steps) == 3 * every
    assert [step["ratio/kl"] < 1e-8 for step in steps] == [number % every == 0 for number in range(3 * every)]
    scores = [rollout.score for rollout in rollouts[:16]]
    assert steps[0]["rollout/reward"] == pytest.approx(sum(score or 0 for score in scores) / 16)
    assert not (made / "rollouts").exists()
    trained = json.loads((made / "manifest.json").read_text())["facts"]["tokens"]
    assert trained == every * sum(len(row.prompt_ids) + len(row.token_ids) for row in rows)


def test_responses_without_a_score_are_left_out_and_counted(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "run", symlinks=True)
    (folder / "holes.py").write_text(
        "from dataclasses import dataclass\n"
        "from dnpo.judges import make_verdict\n"
        "from dnpo.judges.exact.rules import Rules\n"
        "@dataclass(frozen=True)\n"
        "class Holes(Rules):\n"
        "    max_unscored: float = 0.9\n"
        "    def _judge(self, prompt, response):\n"
        "        known = len(response.text) % 2 == 0\n"
        "        return super()._judge(prompt, response) if known else make_verdict(response, None, 'odd')\n"
    )
    words = ("method=reinforce", "judge._target_=holes.Holes", "eval.judge=${typical.judge}")
    succeed(folder, *SMOKE, *TINY, *words, "iterations=1")
    found = summary(folder)
    made = folder / "store" / found["policies"][-1]
    rollouts, rows = read(made / "rollouts.parquet", Rollout), read(made / "experiences.parquet", Experience)
    unscored = sum(rollout.score is None for rollout in rollouts)
    assert 0 < unscored < 48
    assert len(rows) == 48 - unscored
    assert found["table"][-1]["judge/verdicts"] == 48
    assert found["table"][-1]["judge/unscored"] == unscored
