"""Training: step-0 gate, steps against brute force, micro-batches, memory, continuing after a stop, metrics."""

import functools
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from dnpo.errors import NonFiniteLossError, OutOfMemoryError, SettingsError, StepZeroError
from dnpo.optimise.batches import Batch
from dnpo.optimise.npo import FixedModule, NoiseModule, OffsetModule, Rejected, SilentModule, TrainableModule, _Draw
from dnpo.optimise.objective import PairLogps, logistic
from dnpo.optimise.parts import PairOptimisation
from dnpo.optimise.preference import FineTuning, PreferenceTraining, fine_tune, optimise
from dnpo.optimise.reference import KeptHidden, keep_hidden
from dnpo.optimise.training import CHECKPOINT, make_fused
from dnpo.policy import logprobs
from dnpo.policy.loading import load
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.records import Pair, ReferenceLogps
from dnpo.seeding import derive
from tests.conftest import Report, World

from .conftest import torch_optimizer

MakePolicy = Callable[..., Policy]
SEED = 3


def how(**settings: Any) -> PairOptimisation:
    """Training settings of the tests: four pairs a step."""
    given: dict[str, Any] = {
        "optimizer": torch_optimizer("RMSprop", lr=1e-3),
        "batch_size": 4,
        "checkpoint_every": 2,
        "clip": 0.0,
    }
    return PairOptimisation(**(given | settings))


def said_by(policy: Policy, pairs: Sequence[Pair]) -> list[ReferenceLogps]:
    """The policy's present log-probabilities of the pairs."""
    prompts = [p.prompt_ids for p in pairs]
    with policy.evaluating():
        chosen, rejected = (
            policy.score(prompts, ids) for ids in ([p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs])
        )
    return [ReferenceLogps(i, c, r) for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))]


def train(
    policy: Policy,
    pairs: Sequence[Pair],
    folder: Path,
    noise: NoiseModule | None = None,
    optimisation: PairOptimisation | None = None,
    report: Any = None,
    beta: float = 1.0,
    reference: Sequence[ReferenceLogps] | None = None,
    hidden: Any = None,
) -> list[dict[str, float]]:
    """Optimise with the settings of the tests, against the policy before training."""
    return optimise(
        policy,
        pairs,
        said_by(policy, pairs) if reference is None else reference,
        optimisation or how(),
        noise=noise or SilentModule(),
        objective=partial(logistic, beta=beta),
        beta=beta,
        seed=SEED,
        folder=folder,
        report=report or Report(),
        hidden=hidden,
    )


def trainable(policy: Policy, **settings: Any) -> TrainableModule:
    """Fresh noise for a policy."""
    entries, width = policy.head.weight_VH.shape
    return TrainableModule(width, entries, **settings)


def weights(*owners: Policy | NoiseModule) -> list[Tensor]:
    """All weights of a policy, of a noise, or of both."""
    modules = [owner.model if isinstance(owner, Policy) else owner for owner in owners]
    return [p.detach().clone() for module in modules for p in module.parameters()]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: Sequence[Tensor], other: Sequence[Tensor], by: float = 1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=by, rtol=10 * by)


def timeless(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Without metrics that depend on time."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in history]


def alike(one: Sequence[dict[str, float]], other: Sequence[dict[str, float]], by: float = 2e-5) -> None:
    """The same metrics of the same steps, up to rounding."""
    assert len(one) == len(other)
    for ours, theirs in zip(timeless(one), timeless(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], abs=by, rel=10 * by), (ours["step"], name)


def some_empty(world: World, count: int, *empty: int) -> list[Pair]:
    """Pairs, some with an empty rejected response."""
    return [replace(p, rejected_ids=[]) if i in empty else p for i, p in enumerate(world.pairs(count))]


def test_steps_have_nearly_equal_numbers_of_rows(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """One row too many for one step gives two steps of about half the size, not a full step and a step of one row."""
    history = train(make_policy(), world.pairs(9), tmp_path, optimisation=how(batch_size=8, epochs=2))
    assert [row["rows"] for row in history] == [4, 5, 4, 5]


# --- the step-0 gate


def test_before_the_first_update_margins_are_zero_and_the_loss_is_ln_2(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    first = train(make_policy(), world.pairs(8), tmp_path)[0]
    assert abs(first["margin/clean"]) < 2e-5
    assert first["loss/policy"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_gate_holds_for_lora_across_two_chained_iterations(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """The reference of iteration k is its starting policy: earlier adapters are merged, not switched off."""
    base = tmp_path / "base"
    make_policy().save(base)
    lora = Lora(rank=4)
    earlier: Path | None = None
    starts = []
    prompts, completions = [p.token_ids for p in world.prompts[:8]], [r.token_ids for r in world.human[:8]]
    for k in range(3):
        policy = load(str(base), earlier)
        starts.append(policy.score(prompts, completions))
        reference = said_by(policy, world.pairs(16))
        policy.model = lora.on(policy.model, seed=k)
        history = train(policy, world.pairs(16), tmp_path / f"training-{k}", reference=reference)
        assert abs(history[0]["margin/clean"]) < 2e-5
        assert history[0]["loss/policy"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(history[-1]["margin/clean"]) > 1e-3, "the adapter has to learn for this test to mean anything"
        policy.model.eval()
        learnt = policy.score(prompts, completions)
        folder = tmp_path / f"policy-{k}"
        policy.save(folder, earlier)
        assert [p.name for p in sorted(folder.iterdir())] == [f"adapter-{n:02d}" for n in range(k + 1)]
        again = load(str(base), folder)
        assert again.score(prompts, completions) == pytest.approx(learnt, abs=1e-3), (
            "what is loaded is what was trained"
        )
        earlier = folder
    assert starts[0] != pytest.approx(starts[1], abs=1e-2)
    assert starts[1] != pytest.approx(starts[2], abs=1e-2)


def test_the_gate_names_a_reference_with_other_weights(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    pairs, policy = world.pairs(4), make_policy(0)
    before = weights(policy)
    said = r"step 0: the policy is not the one that training starts from.*train-\d.*other weights"
    with pytest.raises(StepZeroError, match=said):
        train(policy, pairs, tmp_path, reference=said_by(make_policy(1), pairs))
    assert same(before, weights(policy))


def test_the_gate_names_dropout(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    layer = policy.causal_lm.model.layers[0]
    layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5))
    with pytest.raises(StepZeroError, match="dropout"):
        train(policy, world.pairs(4), tmp_path)


def test_the_gate_names_an_adapter_that_is_not_fresh(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy, pairs = make_policy(), world.pairs(4)
    reference = said_by(policy, pairs)
    policy.model = Lora(rank=4).on(policy.model, seed=0)
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    with pytest.raises(StepZeroError, match="adapter is not new"):
        train(policy, pairs, tmp_path, reference=reference)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("off_by", [1e-4, -1e-2, 1e-2])
def test_the_gate_checks_every_pair_of_the_first_step(
    off_by: float, side: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """A reference with one wrong response is refused, in any micro-batch; rounding errors are accepted."""
    policy, pairs = make_policy(), world.pairs(4)
    reference = said_by(policy, pairs)
    wrong = [replace(r, **{side: getattr(r, side) + off_by}) if i == 2 else r for i, r in enumerate(reference)]
    one_step = how(micro_batch_size=1, steps=1)
    if abs(off_by) < 1e-3:
        train(policy, pairs, tmp_path, optimisation=one_step, reference=wrong)
    else:
        with pytest.raises(StepZeroError, match=rf"on rows {pairs[2].id}, expected at most 0.001"):
            train(policy, pairs, tmp_path, optimisation=one_step, reference=wrong)


def test_the_gate_does_not_average(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Errors of opposite signs in one batch are two errors."""
    policy, pairs = make_policy(), world.pairs(4)
    reference = said_by(policy, pairs)
    for i, off_by in ((1, 0.01), (2, -0.01)):
        reference[i] = replace(reference[i], chosen=reference[i].chosen + off_by)
    with pytest.raises(StepZeroError, match=r"Log-ratios differ by up to 0\.01 nats on rows (train-\d+(, |, exp)){4}"):
        train(policy, pairs, tmp_path, reference=reference)


def test_the_gate_holds_under_autocast(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Products in bf16 differ more between batch shapes; another policy is still detected."""
    pairs = world.pairs(8)
    with torch.autocast("cpu", torch.bfloat16):
        reference, other = (said_by(make_policy(seed), pairs) for seed in (0, 1))
    first = train(make_policy(), pairs, tmp_path, optimisation=how(autocast=True, steps=1), reference=reference)[0]
    assert abs(first["margin/clean"]) < 0.1
    with pytest.raises(StepZeroError, match=r"expected at most 0\.5"):
        train(make_policy(), pairs, tmp_path, optimisation=how(autocast=True, steps=1), reference=other)


# --- one step, against brute force


def logp_of(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log p of one unpadded sequence, token by token."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    total = torch.zeros((), dtype=torch.float64)
    for t, token in enumerate(completion):
        total = total + logits[len(prompt) + t - 1].log_softmax(-1)[token]
    return total


def test_a_step_agrees_with_brute_force(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """SGD on pairs of unequal lengths, against log-probabilities and gradients of single unpadded sequences."""
    beta, lr, pairs = 0.7, 0.05, world.pairs(8)
    policy = make_policy()
    slow = plain(make_policy())
    logp = partial(logp_of, slow)
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

    settings = how(optimizer=torch_optimizer("SGD", lr=lr), batch_size=8, steps=2, warmup=0.0, decay=False)
    history = train(policy, pairs, tmp_path, optimisation=settings, beta=beta)
    assert [row["loss/policy"] for row in history] == pytest.approx(losses, abs=1e-5)
    assert losses[1] < losses[0]
    for ours, theirs in zip(policy.model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-3)


def plain(policy: Policy) -> Any:
    """The model in float64, with its original attention."""
    model = policy.causal_lm.double()
    model.set_attn_implementation("eager")
    return model


def test_steps_of_both_players_agree_with_brute_force(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Three steps of SGD and Adam, with every metric as a mean over the pairs, are compared with the two-player loss as
    written, on whole matrices in float64. The reference's states and head do not change."""
    beta, alpha, lr, rate = 0.3, 0.4, 0.05, 0.02
    pairs = some_empty(world, 6, 2)
    policy, slow, frozen = make_policy(), plain(make_policy()), plain(make_policy())
    noise = trainable(policy, alpha=alpha, learning_rate=rate, start_log_std=0.6)
    with torch.no_grad():
        for p in noise.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    weight_VH, bias_V = (p.detach().double().clone().requires_grad_() for p in noise.parameters())
    adam = Adam([weight_VH, bias_V], lr=rate)
    expected, noise_norms = [], []
    with torch.no_grad():
        clean = [[logp_of(frozen, p.prompt_ids, ids) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs]

    def noisy(i: int, step: int, term: int) -> tuple[Tensor, Tensor]:
        """log p̃_r(y⁻|x), and s² of its tokens."""
        prompt, ids = pairs[i].prompt_ids, pairs[i].rejected_ids
        with torch.no_grad():
            out = frozen(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True)
        begin, end = len(prompt) - 1, len(prompt) + len(ids) - 1
        hidden_NH, z_NV = out.hidden_states[-1][0, begin:end], out.logits[0, begin:end]
        u_NV = (2 * (hidden_NH @ weight_VH.T + bias_V)).exp()
        variance_NV = u_NV / (u_NV + 1)
        seeds = [derive(SEED, "noise", step, i)]
        rejected = Rejected(hidden_NH.float(), policy.head, torch.tensor(ids), [len(ids)], seeds)
        size = logprobs.TILE["cpu"]
        assert z_NV.shape[1] <= size
        epsilon_NV = _Draw(rejected, 1.0)(z_NV.float(), 0, term).double()
        logp_NV = (z_NV + variance_NV.sqrt() * epsilon_NV).log_softmax(-1)
        return logp_NV.gather(1, torch.tensor(ids, dtype=torch.long).unsqueeze(1)).sum(), variance_NV

    for step in range(3):
        logps = [[logp_of(slow, p.prompt_ids, ids) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs]
        rows: list[dict[str, Tensor]] = []
        variances = []
        for i in range(len(pairs)):
            (chosen, rejected), (chosen_r, rejected_r) = logps[i], clean[i]
            met, _ = noisy(i, step, 0)
            trained_on, variance_NV = noisy(i, step, 1)
            variances.append(variance_NV.flatten())
            margin = beta * ((chosen - chosen_r) - (rejected - rejected_r))
            noisy_margin = beta * ((chosen - chosen_r) - (rejected - met.detach()))
            against = beta * ((chosen - chosen_r) - (rejected - trained_on))
            against = against + beta * ((rejected - rejected.detach()) - (chosen - chosen.detach()))  # θ stopped
            rows.append(
                {
                    "loss/policy": -torch.log(torch.sigmoid(noisy_margin)),
                    "loss/noise": torch.log(torch.sigmoid(against)),
                    "margin/clean": margin,
                    "margin/noisy": noisy_margin,
                    "margin/shift": noisy_margin - margin,
                    "margin/saturation": torch.sigmoid(-noisy_margin),
                    "margin/saturation_clean": torch.sigmoid(-margin),
                    "rewards/chosen": beta * (chosen - chosen_r),
                    "rewards/rejected": beta * (rejected - rejected_r),
                    "logps/chosen": chosen,
                    "logps/rejected": rejected,
                    "npo/shift": rejected_r - met.detach(),
                }
            )
        row = {name: torch.stack([r[name] for r in rows]).mean() for name in rows[0]}
        s2 = torch.cat(variances)
        row |= {"npo/variance": s2.mean(), "loss/variance": alpha * s2.mean()}
        row["npo/at_bound"] = (s2 > 0.9).double().mean()
        adam.zero_grad()
        slow.zero_grad()
        (row["loss/policy"] + row["loss/noise"] + row["loss/variance"]).backward()
        assert weight_VH.grad is not None
        assert bias_V.grad is not None
        noise_norms.append(math.hypot(float(weight_VH.grad.norm()), float(bias_V.grad.norm())))
        policy_norm = math.sqrt(sum(float(p.grad.square().sum()) for p in slow.parameters()))
        expected.append({n: float(v.detach()) for n, v in row.items()} | {"grad_norm/policy": policy_norm})
        with torch.no_grad():
            for p in slow.parameters():
                p -= lr * p.grad
        adam.step()

    settings = how(
        optimizer=torch_optimizer("SGD", lr=lr), batch_size=6, micro_batch_size=4, steps=3, warmup=0.0, decay=False
    )
    history = train(policy, pairs, tmp_path, noise=noise, optimisation=settings, beta=beta)
    for ours, theirs, norm in zip(history, expected, noise_norms, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, abs=5e-5, rel=2e-4), (ours["step"], name)
        assert ours["grad_norm/noise"] == pytest.approx(norm, rel=1e-3)
        assert ours["lr/noise"] == rate
        assert 0.1 < ours["npo/at_bound"] < 0.9
    for ours, theirs in zip(policy.model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-3)
    for ours, theirs in zip(noise.parameters(), (weight_VH, bias_V), strict=True):
        assert float((ours.detach() - theirs.detach()).abs().mean()) < 1e-4 * rate * 3
    assert abs(history[2]["margin/clean"]) > 0.05


def test_accuracy_is_the_share_of_positive_margins(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Against the policy's log-probabilities of the same pairs: one step, then a second that only measures."""
    policy, pairs = make_policy(), world.pairs(8)
    reference = said_by(policy, pairs)
    settings = how(optimizer=torch_optimizer("SGD", lr=0.5), batch_size=8, steps=1, warmup=0.0, decay=False)
    train(policy, pairs, tmp_path / "a", optimisation=settings, reference=reference)
    after = said_by(policy, pairs)
    gaps = [(a.chosen - r.chosen) - (a.rejected - r.rejected) for a, r in zip(after, reference, strict=True)]
    two = how(
        optimizer=torch_optimizer("SGD", lr=0.5), batch_size=8, steps=2, warmup=0.0, decay=False, micro_batch_size=3
    )
    before, row = train(make_policy(), pairs, tmp_path / "b", optimisation=two, reference=reference)
    assert before["rewards/accuracy"] == 0.5, "before the first update all margins are 0, and their signs are rounding"
    assert row["rewards/accuracy"] == pytest.approx(sum(g > 0 for g in gaps) / 8)
    assert row["margin/clean"] == pytest.approx(sum(gaps) / 8, abs=1e-4)


# --- what changes rounding and nothing else


KINDS: dict[str, Callable[[Policy], NoiseModule]] = {
    "none": lambda policy: SilentModule(),
    "fixed": lambda policy: FixedModule(variance=0.5),
    # Some of its entries are near the bound, and its push on W is far from Adam's ε.
    "trainable": functools.partial(trainable, alpha=0.3, learning_rate=0.01, start_log_std=1.05),
}


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing_but_rounding(
    kind: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Seven pairs in groups of four: the last group is smaller, and 3 + 1 micro-batches weigh as the whole does.

    With noise too: each pair gets the same ε, and mean(s²) is over tokens, whose number differs between pairs.
    """
    found = []
    pairs = some_empty(world, 7, 4)
    assert len({len(p.rejected_ids) for p in pairs}) > 2, "lengths must differ for this test to mean anything"
    for micro in (0, 3, 1):
        policy = make_policy()
        noise = KINDS[kind](policy)
        settings = how(micro_batch_size=micro, optimizer=torch_optimizer("SGD", lr=0.05), epochs=2, clip=1.0)
        history = train(policy, pairs, tmp_path / str(micro), noise=noise, optimisation=settings)
        assert len(history) == 4
        found.append((weights(policy, noise), history))
    for some, history in found[1:]:
        close(some, found[0][0])
        alike(history, found[0][1])
    if kind == "trainable":
        assert 0.01 < found[0][1][-1]["npo/at_bound"] < 0.99, "the metric has to vary for this test to mean anything"


@pytest.mark.parametrize("kind", ["none", "trainable"])
@pytest.mark.parametrize("lora", [0, 4])
def test_a_shared_prompt_changes_nothing_but_rounding(
    lora: int, kind: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    found = []
    for share in (True, False):
        policy = make_policy()
        reference = said_by(policy, world.pairs(8))
        policy.model = Lora(rank=lora).on(policy.model, seed=0)
        noise = KINDS[kind](policy)
        settings = how(share_prompt=share, optimizer=torch_optimizer("SGD", lr=0.05), epochs=2, micro_batch_size=3)
        history = train(policy, world.pairs(8), tmp_path / f"{share}", noise, settings, reference=reference)
        found.append((weights(policy, noise), history))
    close(found[0][0], found[1][0])
    alike(found[0][1], found[1][1])


@pytest.mark.parametrize("share", [True, False])
def test_a_shared_prompt_is_computed_once(share: bool, make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Counts the tokens in the policy's body: each prompt once or twice, and every response."""
    pairs, policy, tokens = world.pairs(4), make_policy(), [0]
    reference = said_by(policy, pairs)

    def count(module: Any, args: Any, given: dict[str, Any]) -> None:
        tokens[0] += given["input_ids"].numel()

    policy.causal_lm.model.register_forward_pre_hook(count, with_kwargs=True)
    train(policy, pairs, tmp_path, optimisation=how(share_prompt=share), reference=reference)
    responses = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    assert tokens[0] == responses + (1 if share else 2) * sum(len(p.prompt_ids) for p in pairs)


@pytest.mark.parametrize("lora", [0, 4])
def test_checkpointing_activations_changes_nothing(
    lora: int, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """And checkpointing is really used: every layer runs twice for the policy, and once for the frozen reference."""
    found, calls = [], []
    for checkpointing in (False, True):
        policy = make_policy()
        reference = said_by(policy, world.pairs(8))
        policy.model = Lora(rank=lora).on(policy.model, seed=0)
        noise, ran = trainable(policy, learning_rate=0.01), [0]

        def count(*_: Any, ran: list[int] = ran) -> None:
            ran[0] += 1

        policy.causal_lm.model.layers[0].self_attn.register_forward_hook(count)
        settings = how(checkpointing=checkpointing, optimizer=torch_optimizer("SGD", lr=0.05))
        history = train(policy, world.pairs(8), tmp_path / f"{checkpointing}", noise, settings, reference=reference)
        assert not policy.causal_lm.is_gradient_checkpointing, "it is for the training alone"
        found.append((weights(policy, noise), history))
        calls.append(ran[0])
    close(found[0][0], found[1][0], 1e-6)
    alike(found[0][1], found[1][1], 1e-6)
    # The hook is copied along with a full reference, and with LoRA the reference is the same module.
    assert calls == [2 * len(found[0][1]), 3 * len(found[0][1])]


@pytest.mark.long
@pytest.mark.parametrize(("lora", "backend"), [(0, "aot_eager"), (4, "inductor")])
def test_compiling_changes_nothing_but_rounding(
    lora: int, backend: str, make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's default backend, whose C++ compiler takes long, is tried once; the other keeps the traced graph."""
    if backend == "inductor":
        if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
            pytest.skip("torch.compile needs a C++ compiler on the CPU, and there is none")
        monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")  # which compiles without optimising
        monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # and starts no further Python
    else:
        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would keep gigabytes of it
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        policy = make_policy(num_hidden_layers=1)  # each further layer takes as long again
        reference = said_by(policy, world.pairs(8))
        policy.model = Lora(rank=lora).on(policy.model, seed=0)
        noise = trainable(policy, alpha=0.3, learning_rate=0.01)
        settings = how(compile=compiled, optimizer=torch_optimizer("SGD", lr=0.05), epochs=2, micro_batch_size=3)
        history = train(policy, world.pairs(8), tmp_path / f"{compiled}", noise, settings, reference=reference)
        found.append((weights(policy, noise), history))
        if compiled:
            assert policy.causal_lm.base_model._compiled_call_impl is not None
            policy.save(tmp_path / "policy")
            if not lora:
                close(weights(load(str(tmp_path / "policy"), None)), weights(policy), 1e-7)
    close(found[0][0], found[1][0], 1e-4)
    alike(found[0][1], found[1][1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [0, 4])
def test_hidden_states_from_disk_are_those_made_online(
    lora: int, autocast: bool, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Also in later steps, when the policy has changed: both kept and recomputed values are the reference's."""
    pairs = some_empty(world, 10, 3)
    keep_hidden(make_policy(), pairs, autocast=autocast, required=True, folder=tmp_path, report=Report())
    kept = KeptHidden(tmp_path)
    assert kept([0]).dtype == (torch.bfloat16 if autocast else torch.float32)
    found = []
    for hidden in (None, kept):
        policy = make_policy()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            reference = said_by(policy, pairs)
        policy.model = Lora(rank=lora).on(policy.model, seed=0)
        noise = trainable(policy, alpha=0.3, learning_rate=0.01)
        settings = how(optimizer=torch_optimizer("SGD", lr=0.05), epochs=2, micro_batch_size=3, autocast=autocast)
        folder = tmp_path / str(hidden is None)
        history = train(policy, pairs, folder, noise, settings, reference=reference, hidden=hidden)
        found.append((weights(policy, noise), history))
    by = 2e-3 if autocast else 1e-6  # of bf16, batches of other shapes leave more
    close(found[0][0], found[1][0], by)
    alike(found[0][1], found[1][1], 20 * by)


def test_kept_states_need_no_second_body(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """No frozen copy of the whole model is made if they are kept, or if nothing reads them."""
    pairs = world.pairs(4)
    keep_hidden(make_policy(), pairs, autocast=False, required=True, folder=tmp_path, report=Report())
    for noise, hidden, copies in (("trainable", KeptHidden(tmp_path), 0), ("trainable", None, 1), ("none", None, 0)):
        policy, made = make_policy(), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Policy, "reference", functools.partialmethod(_counted, made, Policy.reference))
            train(policy, pairs, tmp_path / "training", KINDS[noise](policy), how(epochs=1), hidden=hidden)
        assert len(made) == copies


def _counted(policy: Policy, made: list[Policy], make: Callable[[Policy], Policy]) -> Policy:
    made.append(make(policy))
    return made[-1]


# --- the optimizer


def test_clipping_bounds_the_step_and_reports_the_norm_before(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    before, policy = weights(make_policy()), make_policy()
    settings = how(optimizer=torch_optimizer("SGD", lr=1.0), clip=0.01, steps=1, warmup=0.0)
    row = train(policy, world.pairs(4), tmp_path, optimisation=settings)[0]
    moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(before, weights(policy), strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-2)
    assert row["grad_norm/policy"] > 0.1


@pytest.mark.parametrize(("step", "factor"), [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (11, 0.5), (19, 1 / 18)])
def test_learning_rate_rises_linearly_then_falls_to_zero(step: int, factor: float) -> None:
    """20 steps with 10 % warm-up: two steps below the peak, then a line that would reach 0 at step 20."""
    assert how(warmup=0.1).factor(step, 20) == pytest.approx(factor)
    assert how(warmup=0.0, decay=False).factor(step, 20) == 1.0


def test_every_step_has_the_learning_rate_of_the_schedule(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """The policy's rate follows the schedule and the noise's is constant. A step reports the rate that it used."""
    policy, settings = make_policy(), how(optimizer=torch_optimizer("SGD", lr=0.01), warmup=0.4, epochs=3)
    noise = trainable(policy, learning_rate=0.03)
    rows = train(policy, world.pairs(8), tmp_path, noise=noise, optimisation=settings)
    assert len(rows) == 6
    assert [row["lr/policy"] for row in rows] == pytest.approx([0.01 * settings.factor(step, 6) for step in range(6)])
    assert {row["lr/noise"] for row in rows} == {0.03}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Adam", {"lr": 0.1}, True),
        ("AdamW", {"lr": 0.1, "weight_decay": 0.1}, True),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, True),
        ("RMSprop", {"lr": 0.1}, None),  # torch has none
        ("AdamW", {"lr": 0.1, "foreach": True}, None),
        ("AdamW", {"lr": 0.1, "fused": False}, False),
        ("SGD", {"lr": 0.1, "differentiable": True}, None),
        ("AdamW", {}, True),
    ],
    ids=str,
)
def test_the_fused_optimizer_is_used_silently_if_there_is_one(
    name: str, settings: dict[str, Any], expected: bool | None
) -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = make_fused(getattr(torch.optim, name), parameters, settings)
    assert optimizer.defaults.get("fused") is expected
    assert optimizer.param_groups[0]["params"][0] is parameters[0]
    assert optimizer.param_groups[0]["lr"] == settings.get("lr", 1e-3)
    assert {key: optimizer.defaults[key] for key in settings} == settings


def test_both_players_have_fused_optimizers(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """By the optimizers that reach Lightning; and their steps equal those of torch's plain forms."""
    made: list[list[Optimizer]] = []
    configure = PreferenceTraining.configure_optimizers

    def spy(self: PreferenceTraining) -> Any:
        optimizers, schedules = configure(self)
        made.append(optimizers)
        return optimizers, schedules

    found = []
    for settings in ({}, {"fused": False}):
        policy = make_policy()
        noise = trainable(policy, learning_rate=0.01)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PreferenceTraining, "configure_optimizers", spy)
            optimisation = how(optimizer=torch_optimizer("AdamW", lr=1e-3, **settings))
            train(policy, world.pairs(8), tmp_path / str(settings), noise=noise, optimisation=optimisation)
        found.append(weights(policy, noise))
    assert [[o.defaults["fused"] for o in some] for some in made] == [[True, True], [False, True]]
    close(*found, 1e-6)


# --- two players


def test_noise_is_trained_too_and_shrinks_the_margin(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    noise = trainable(policy, alpha=0.01, learning_rate=0.02)
    history = train(policy, world.pairs(32), tmp_path, noise=noise)
    assert history[-1]["npo/variance"] > history[0]["npo/variance"], "the noise term pushes s up"
    assert sum(row["margin/shift"] for row in history) / len(history) < -0.05
    assert all(
        row["margin/noisy"] == pytest.approx(row["margin/clean"] + row["margin/shift"], abs=1e-4) for row in history
    )
    assert all(row["npo/variance"] < 1.0 for row in history)
    assert abs(history[0]["margin/clean"]) < 2e-5, "noise is not part of the gate's margins"
    assert {"loss/noise", "loss/variance", "grad_norm/noise", "lr/noise", "npo/at_bound"} <= set(history[0])


def test_vanishing_noise_trains_as_no_noise(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    plain, noisy = make_policy(), make_policy()
    train(plain, world.pairs(8), tmp_path / "a")
    train(noisy, world.pairs(8), tmp_path / "b", noise=trainable(noisy, start_log_std=-20.0, learning_rate=1e-9))
    close(weights(plain), weights(noisy))


def test_an_offset_is_noise_without_chance(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    history = train(policy, world.pairs(8), tmp_path, noise=OffsetModule(shift=1.5), beta=0.5)
    assert [row["margin/shift"] for row in history] == pytest.approx([-0.75] * len(history), abs=1e-5)
    # The gate sees margin 0; the policy's margin is −β · 1.5.
    assert history[0]["loss/policy"] == pytest.approx(math.log1p(math.exp(0.75)), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_does_not_change_other_random_draws(
    kind: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    policy = make_policy()
    before = torch.get_rng_state()
    train(policy, world.pairs(8), tmp_path, noise=KINDS[kind](policy))
    assert torch.equal(before, torch.get_rng_state())


class Recording(FixedModule):
    """Records the seeds of each pair."""

    def __init__(self) -> None:
        super().__init__(variance=0.5)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, clean_B: Tensor, rejected: Rejected | None) -> Any:
        assert rejected is not None
        self.seen.append(tuple(rejected.seeds))
        return super().forward(clean_B, rejected)


def test_every_pair_and_step_has_its_own_noise_for_any_micro_batches(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """The noise of a pair differs between epochs, pairs and seeds."""
    seen = []
    for micro, seed in ((0, SEED), (1, SEED), (3, SEED), (0, SEED + 1)):
        policy, noise, pairs = make_policy(), Recording(), world.pairs(7)
        optimise(
            policy,
            pairs,
            said_by(policy, pairs),
            how(epochs=3, micro_batch_size=micro),
            noise=noise,
            objective=partial(logistic, beta=1.0),
            beta=1.0,
            seed=seed,
            folder=tmp_path / f"{micro}-{seed}",
            report=Report(),
        )
        seen.append([seed for seeds in noise.seen for seed in seeds])
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) == 3 * 7
    assert not set(seen[0]) & set(seen[3])


# --- stopping and continuing


class Stop(Exception):
    """Stands for a kill between two steps."""


class Stopping(Report):
    """Raises after a number of steps."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, amount: int = 1) -> None:
        super().advance(amount)
        if self.done == self.after:
            raise Stop


@pytest.mark.parametrize(
    ("after", "lora", "kind"),
    [
        *((after, 0, "trainable") for after in (3, 5, 9, 10)),
        (5, 4, "trainable"),
        (5, 0, "fixed"),
        (5, 4, "none"),
    ],
)
def test_a_stopped_training_ends_as_an_undisturbed_one(
    after: int, lora: int, kind: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Both optimizers, the schedule, the order of the pairs, the noise and the history continue bit for bit."""
    settings = how(epochs=2, micro_batch_size=3)

    def run(folder: Path, report: Report) -> tuple[list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        reference = said_by(policy, world.pairs(22))
        policy.model = Lora(rank=lora).on(policy.model, seed=0)
        noise = KINDS[kind](policy)
        history = train(policy, world.pairs(22), folder, noise, settings, report, reference=reference)
        return weights(policy, noise), timeless(history)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = run(tmp_path / "a", Report())
    with pytest.raises(Stop):
        run(tmp_path / "b", Stopping(after))
    assert (tmp_path / "b" / CHECKPOINT).is_file()
    report = Report()
    continued = run(tmp_path / "b", report)
    assert report.done == report.total == 12
    assert len(report.rows) == 12, "the steps before the stop are reported too"
    assert same(undisturbed[0], continued[0])
    assert undisturbed[1] == continued[1]


def test_a_stopped_training_continues_with_other_micro_batches(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """As after an out-of-memory error: no step is repeated or skipped, and the result is the same up to rounding."""

    def run(folder: Path, report: Report, **settings: Any) -> tuple[list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        noise = trainable(policy, alpha=0.3, learning_rate=0.01)
        optimisation = how(epochs=2, optimizer=torch_optimizer("SGD", lr=0.05), **settings)
        history = train(policy, world.pairs(22), folder, noise, optimisation, report)
        return weights(policy, noise), history

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    undisturbed = run(tmp_path / "a", Report(), micro_batch_size=4)
    with pytest.raises(Stop):
        run(tmp_path / "b", Stopping(7), micro_batch_size=4)
    report = Report()
    continued = run(tmp_path / "b", report, micro_batch_size=1, share_prompt=False, checkpointing=True)
    assert [row["step"] for row in continued[1]] == list(range(12))
    assert report.done == report.total == 12
    close(undisturbed[0], continued[0])
    alike(undisturbed[1], continued[1])
    assert timeless(undisturbed[1])[:6] == timeless(continued[1])[:6], "these were not computed again"
    assert timeless(undisturbed[1])[6:] != timeless(continued[1])[6:], "and these were"


def test_a_checkpoint_holds_only_trained_weights(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy = make_policy()
    policy.model = Lora(rank=2).on(policy.model, seed=0)
    with pytest.raises(Stop):
        train(policy, world.pairs(32), tmp_path, noise=trainable(policy), report=Stopping(5))
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)["state_dict"]
    assert {name for name in saved if "lora_" not in name} == {"noise.weight_VH", "noise.bias_V"}
    assert len(saved) > 2


def test_fine_tuning_learns_and_continues(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    rows = [(p.id, p.token_ids, r.token_ids) for p, r in zip(world.prompts, world.human, strict=True)]
    settings = how(optimizer=torch_optimizer("AdamW", lr=3e-3), steps=30, batch_size=16, checkpoint_every=10)

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
    noise = FixedModule(variance=math.inf)
    with pytest.raises(NonFiniteLossError, match=r"step 0: the loss is nan on rows train-\d+"):
        train(policy, world.pairs(4), tmp_path, noise=noise)


def test_fine_tuning_names_itself_and_its_own_learning_rate(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight[3] = torch.nan
    rows = [(p.id, p.prompt_ids, p.chosen_ids) for p in world.pairs(4)]
    with pytest.raises(NonFiniteLossError, match=r"^supervised fine-tuning, step 0: .* is nan .*sft\.optimizer\.lr"):
        fine_tune(policy, rows, how(batch_size=4), seed=0, folder=tmp_path, report=Report())


def test_having_no_rows_is_an_error_and_having_no_epochs_is_not(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="nothing to train on"):
        train(make_policy(), [], tmp_path)
    policy = make_policy()
    assert train(policy, world.pairs(4), tmp_path, optimisation=how(epochs=0)) == []
    assert same(weights(policy), weights(make_policy()))


def test_split_puts_the_chosen_first() -> None:
    pairs = PairLogps.split(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    assert pairs.chosen_B.tolist() == [1.0, 2.0]
    assert pairs.rejected_B.tolist() == [3.0, 4.0]
    alone = PairLogps.split(torch.tensor([1.0, 2.0]), 2)
    assert (alone.chosen_B.tolist(), alone.rejected_B.tolist()) == ([1.0, 2.0], [0.0, 0.0])


def test_fine_tuning_weighs_micro_batches_by_their_tokens(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    rows = [(p.id, p.token_ids, r.token_ids) for p, r in zip(world.prompts, world.human, strict=True)][:7]
    assert len({len(r[2]) for r in rows}) > 2, "lengths must differ for this test to mean anything"
    found = []
    for micro in (0, 3):
        policy = make_policy()
        settings = how(micro_batch_size=micro, optimizer=torch_optimizer("SGD", lr=0.05), epochs=2)
        history = fine_tune(policy, rows, settings, seed=1, folder=tmp_path / str(micro), report=Report())
        found.append((weights(policy), history))
    close(found[0][0], found[1][0])
    alike(found[0][1], found[1][1])


def test_steps_without_rows_end_with_a_message(make_policy: MakePolicy, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing to train on"):
        fine_tune(make_policy(), [], how(steps=10), seed=0, folder=tmp_path, report=Report())


def test_a_gradient_that_is_not_finite_reaches_no_weight(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """A finite loss with a NaN gradient stops the training before the step and names all rows of the group."""
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
        with pytest.raises(SettingsError, match=r"trainer\.optimizer\.lr="):
            how(optimizer=torch_optimizer("RMSprop", lr=wrong)).check("trainer")


# --- memory


class Small:
    """Stands for a memory in which a micro-batch with a certain row, or any row, does not fit if it has too many rows.

    Args:
        rows: so many fit.
        of: the row that makes it tight; any, if it is None.
        where: whether the forward or the backward pass needs too much.
    """

    MESSAGE = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: 4 EiB"

    def __init__(self, rows: int, of: str | None = None, where: str = "forward") -> None:
        self.rows, self.of, self.where = rows, of, where
        self.failed: list[int] = []

    def put_over(self, kind: type[Any], patch: pytest.MonkeyPatch) -> None:
        """Make trainings of this kind run in it."""
        terms, small = kind.terms, self

        def limited(module: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = terms(module, batch)
            if len(batch.ids) > small.rows and (small.of is None or small.of in batch.ids):
                if small.where == "forward":
                    small.fail(len(batch.ids))
                loss = _Failing.apply(loss, partial(small.fail, len(batch.ids)))  # type: ignore[no-untyped-call]
            return loss, metrics

        patch.setattr(kind, "terms", limited)

    def fail(self, rows: int) -> None:
        self.failed.append(rows)
        raise RuntimeError(self.MESSAGE)


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, fail: Callable[[], None]) -> Tensor:
        ctx.fail = fail
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.fail()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("fits", "found"), [(7, 4), (4, 4), (3, 2), (1, 1)])
def test_out_of_memory_says_what_fits(
    fits: int, found: int, where: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """The advised micro-batch size is the largest of 4, 2 and 1 that fits; with it the command continues to the end."""
    pairs = world.pairs(32)
    settings = {"batch_size": 8, "optimizer": torch_optimizer("SGD", lr=0.05), "checkpoint_every": 1}

    def run(folder: Path, micro: int, report: Report | None = None) -> tuple[list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        noise = trainable(policy, alpha=0.3, learning_rate=0.01)
        history = train(policy, pairs, folder, noise, how(**settings, micro_batch_size=micro), report)
        return weights(policy, noise), history

    for name in "ab":
        (tmp_path / name).mkdir()
    undisturbed = run(tmp_path / "a", 0)
    with pytest.raises(Stop):
        run(tmp_path / "b", 0, Stopping(3))
    small = Small(fits, where=where)
    with pytest.MonkeyPatch.context() as patch:
        small.put_over(PreferenceTraining, patch)
        with pytest.raises(OutOfMemoryError) as error:
            run(tmp_path / "b", 0)
        said = str(error.value)
        assert said.startswith("step 2: out of memory with 8 rows at once ([enforce fail at alloc_cpu")
        assert f"trainer.micro_batch_size={found} fits, as tried on the rows of this step" in said
        assert "8 rows still make one step" in said
        assert said.endswith("The last checkpoint is kept")
        assert small.failed == [size for size in (8, 4, 2) if size > found]
        report = Report()
        continued = run(tmp_path / "b", found, report)
    assert report.done == report.total == 4
    close(undisturbed[0], continued[0])
    alike(undisturbed[1], continued[1])


def test_what_fits_is_tried_on_the_rows_of_the_step_that_failed(
    make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """All of its rows are tried, whichever micro-batch has the long one. Those of other steps would fit in more."""
    pairs, policy = world.pairs(16), make_policy()
    reference = said_by(policy, pairs)
    for i, long in enumerate(p.id for p in pairs):
        with pytest.MonkeyPatch.context() as patch:
            Small(2, of=long).put_over(PreferenceTraining, patch)
            with pytest.raises(OutOfMemoryError, match=r"trainer\.micro_batch_size=2 fits"):
                train(make_policy(), pairs, tmp_path / str(i), optimisation=how(batch_size=8), reference=reference)


@pytest.mark.parametrize(
    ("checkpointing", "advice"), [(False, "trainer.checkpointing=true"), (True, "model.lora.rank")]
)
def test_out_of_memory_with_single_rows_says_what_else_may_help(
    checkpointing: bool, advice: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Small(0).put_over(PreferenceTraining, patch)
        with pytest.raises(OutOfMemoryError, match="not even one row at once fits") as error:
            train(make_policy(), world.pairs(4), tmp_path, optimisation=how(checkpointing=checkpointing))
    assert advice in str(error.value)
    assert ("trainer.checkpointing=true" in str(error.value)) is not checkpointing


def test_out_of_memory_in_fine_tuning(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    rows = [(p.id, p.token_ids, r.token_ids) for p, r in zip(world.prompts, world.human, strict=True)][:12]
    with pytest.MonkeyPatch.context() as patch:
        Small(3).put_over(FineTuning, patch)
        with pytest.raises(OutOfMemoryError, match=r"step 0: out of memory.* sft\.micro_batch_size=3 fits"):
            fine_tune(make_policy(), rows, how(batch_size=6), seed=0, folder=tmp_path, report=Report())


def test_other_errors_are_not_taken_for_lack_of_memory(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Small, "MESSAGE", "mat1 and mat2 shapes cannot be multiplied")
        Small(0).put_over(PreferenceTraining, patch)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            train(make_policy(), world.pairs(4), tmp_path)


# A training in a process whose address space is limited, as a container's memory is. argv: a folder, the micro-batch
# size and the limit in bytes; 0 sets one after two steps, 90 MiB above what is then in use, and prints it.
def limited(*arguments: object) -> str:
    """Its output in a new Python process: in a forked one the free memory would depend on the parent."""
    code = f"from pathlib import Path, PosixPath; from tests.limited import train_limited; train_limited{arguments!r}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space and /proc are Linux's")
def test_real_lack_of_memory_names_what_really_fits(tmp_path: Path) -> None:
    """The limit is lowered after two of four steps. A new process with the advised setting reaches the end."""

    short = limited(tmp_path, 8, 0)
    assert "step 2: out of memory with 8 rows at once" in short
    assert "DefaultCPUAllocator: can't allocate memory" in short
    assert "checkpoint True" in short
    fits, limit = re.search(r"micro_batch_size=(\d+) fits", short), re.search(r"limit (\d+)", short)
    assert fits
    assert limit
    following = limited(tmp_path, int(fits.group(1)), int(limit.group(1)))
    assert "steps [0, 1, 2, 3]" in following


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lack_of_memory_on_a_gpu_is_tried_there(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Lightning moves everything to the CPU when a training fails; but memory is tried on the training device."""
    tried: list[torch.device] = []
    policy = make_policy()
    policy.model.to("cuda")
    noise = trainable(policy).to("cuda")
    terms = PreferenceTraining.terms

    def limited(module: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tried.append(batch.packed.ids_T.device)
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return terms(module, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreferenceTraining, "terms", limited)
        with pytest.raises(OutOfMemoryError, match="micro_batch_size=2 fits"):
            train(policy, world.pairs(8), tmp_path, noise=noise, optimisation=how(batch_size=8))
    assert {device.type for device in tried} == {"cuda"}
