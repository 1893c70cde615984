"""Training under every objective: inputs, metrics, limits, stops, and weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dnpo.errors import SettingsError
from dnpo.optimise.npo import SilentModule, TrainableModule
from dnpo.optimise.objective import drift
from dnpo.optimise.parts import (
    Likelihood,
    Logistic,
    OddsRatio,
    PairOptimisation,
    PerToken,
    Refined,
    Squared,
    Statistics,
)
from dnpo.optimise.preference import PreferenceTraining, fine_tune, optimise
from dnpo.optimise.reference import KeptHidden, keep_hidden
from dnpo.optimise.watch import Suspects, mean_by_sequence
from dnpo.policy import logprobs
from dnpo.policy.lora import Lora
from dnpo.policy.model import Policy
from dnpo.policy.packing import pack
from dnpo.records import Pair
from tests.conftest import Report, World, torch_optimizer
from tests.test_optimise import Stop, Stopping, close, how, said_by, same, timeless, weights

MakePolicy = Callable[..., Policy]
SEED = 3

OBJECTIVES: dict[str, Any] = {
    "logistic": Logistic(beta=1.0),
    "smoothed": Logistic(beta=1.0, smoothing=0.2),
    "squared": Squared(beta=0.1),
    "squared, per token": Squared(beta=1.0, mean=True),
    "odds ratio": OddsRatio(weight=1.0),
    "per token": PerToken(beta=2.0, margin=1.0),
    "likelihood": Likelihood(),
    "refined": Refined(beta=1.0, window=8),
    "statistics": Statistics(base=Logistic(beta=1.0), weight=1.0),
    "statistics of refined": Statistics(base=Refined(beta=1.0, window=8), weight=1.0),
    "statistics of likelihood": Statistics(base=Likelihood(), weight=1.0),
}


def train(
    policy: Policy,
    pairs: Sequence[Pair],
    folder: Path,
    objective: Any,
    settings: PairOptimisation | None = None,
    *,
    noise: Any = None,
    report: Any = None,
    reference: Any = None,
    **others: Any,
) -> list[dict[str, float]]:
    """Optimise against the policy before training as the reference, if one is read."""
    if reference is None and getattr(objective, "reads_reference", True):
        reference = said_by(policy, pairs)
    folder.mkdir(exist_ok=True, parents=True)
    return optimise(
        policy,
        pairs,
        reference,
        settings or how(),
        noise=noise or SilentModule(),
        objective=objective,
        beta=float(objective.beta),
        seed=SEED,
        folder=folder,
        report=report or Report(),
        **others,
    )


def sgd(**settings: Any) -> PairOptimisation:
    """Plain gradients, so that rounding errors do not grow."""
    return how(optimizer=torch_optimizer("SGD", lr=0.05), **settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_lowers_its_loss(name: str, make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    policy, objective = make_policy(), OBJECTIVES[name]
    settings = how(epochs=12, batch_size=8, optimizer=torch_optimizer("Adam", lr=3e-3))
    history = train(policy, world.pairs(8), tmp_path, objective, settings)
    assert len(history) == 12
    assert history[-1]["loss/policy"] < 0.9 * history[0]["loss/policy"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stopped_training_ends_as_an_undisturbed_one(
    name: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Including the windows of confidences and the values that were computed before the training."""
    settings = how(epochs=2, micro_batch_size=3)

    def run(folder: Path, report: Report) -> tuple[list[Tensor], list[dict[str, float]]]:
        policy = make_policy()
        history = train(policy, world.pairs(18), folder, OBJECTIVES[name], settings, report=report)
        return weights(policy), timeless(history)

    undisturbed = run(tmp_path / "a", Report())
    with pytest.raises(Stop):
        run(tmp_path / "b", Stopping(7))
    continued = run(tmp_path / "b", Report())
    assert same(undisturbed[0], continued[0])
    assert undisturbed[1] == continued[1]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_change_nothing_but_rounding(
    name: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Pairs of different weights and strengths."""
    pairs = world.pairs(10)
    pairs = [replace(p, weight=(1.0, 0.25, 3.0)[i % 3], strength=(1.0, 0.8)[i % 2]) for i, p in enumerate(pairs)]
    found = []
    for micro in (0, 1, 3):
        policy = make_policy()
        settings = sgd(epochs=2, batch_size=5, micro_batch_size=micro, clip=1.0)
        history = train(policy, pairs, tmp_path / str(micro), OBJECTIVES[name], settings)
        found.append((weights(policy), timeless(history)))
    for other in found[1:]:
        close(found[0][0], other[0], 1e-5)
        for one, two in zip(found[0][1], other[1], strict=True):
            assert one == pytest.approx(two, abs=1e-3)


# --- weights


def test_a_pair_of_weight_2_equals_the_pair_twice(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    pairs = world.pairs(3)
    found = []
    for number, rows in enumerate(([replace(pairs[0], weight=2.0), *pairs[1:]], [pairs[0], *pairs])):
        policy = make_policy()
        history = train(policy, rows, tmp_path / str(number), Logistic(beta=1.0), sgd(batch_size=4))
        found.append((weights(policy), history[0]["loss/policy"]))
    close(found[0][0], found[1][0], 1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_pairs_without_weight_are_left_out(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    pairs = world.pairs(6)
    rows = [replace(pair, weight=0.0) if i % 2 else pair for i, pair in enumerate(pairs)]
    one, other = make_policy(), make_policy()
    history = train(one, rows, tmp_path / "a", Logistic(beta=1.0), sgd(epochs=2, batch_size=2))
    assert history[0]["rows"] + history[1]["rows"] == 3
    train(other, pairs[::2], tmp_path / "b", Logistic(beta=1.0), sgd(epochs=2, batch_size=2))
    assert same(weights(one), weights(other))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (-1.0, r"^pair train-\d+: weight -1.0; expected"),
        (float("nan"), "weight nan"),
        (0.0, "^all pairs have the weight 0"),
    ],
)
def test_impossible_weights_are_refused(
    weight: float, message: str, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    pairs = [replace(pair, weight=weight) for pair in world.pairs(3)]
    with pytest.raises(SettingsError, match=message):
        train(make_policy(), pairs, tmp_path, Logistic(beta=1.0))


# --- objectives that read less


def test_likelihood_is_fine_tuning(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """One pair per step: the same update as fine-tuning on its chosen response, with impossible rejected ones."""
    pairs = [replace(pair, rejected="", rejected_ids=[]) for pair in world.pairs(5)]
    one, other = make_policy(), make_policy()
    history = train(one, pairs, tmp_path / "a", Likelihood(), sgd(batch_size=1))
    rows = [(pair.id, pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    (tmp_path / "b").mkdir()
    expected = fine_tune(other, rows, sgd(batch_size=1), seed=SEED, folder=tmp_path / "b", report=Report())
    close(weights(one), weights(other), 1e-6)
    assert [row["loss/policy"] for row in history] == pytest.approx([row["loss/policy"] for row in expected], rel=1e-5)


def test_only_responses_that_are_read_go_through_the_model(
    make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    plain = Policy.hidden

    def counted(self: Policy, batch: Any, **options: Any) -> Tensor:
        tokens.append(len(batch.ids_T))
        return plain(self, batch, **options)

    monkeypatch.setattr(Policy, "hidden", counted)
    (pair,) = world.pairs(1)
    sizes = {}
    for name in ("logistic", "odds ratio", "likelihood"):
        policy = make_policy()
        reference = said_by(policy, [pair]) if name == "logistic" else None
        tokens.clear()
        train(policy, [pair], tmp_path / name, OBJECTIVES[name], sgd(batch_size=1), reference=reference)
        sizes[name] = list(tokens)
    both = len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
    assert sizes["logistic"] == sizes["odds ratio"] == [both]
    assert sizes["likelihood"] == [both - len(pair.rejected_ids)]


# --- refined labels


@pytest.mark.parametrize(
    "objective",
    [
        Refined(beta=1.0, alpha=0.0),
        Refined(beta=1.0, warmup=1.0),
        Refined(beta=1.0, warmup=1.0, extrapolation=0.0),
        Refined(beta=1.0, percentile=0.0, window=1000, extrapolation=0.0, warmup=1.0),
        Statistics(base=Logistic(beta=1.0), weight=0.0),
    ],
    ids=["alpha 0", "warm-up throughout", "no extrapolation", "percentile 0", "weight 0"],
)
def test_limiting_cases_equal_the_logistic_loss(
    objective: Any, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Bit for bit, in weights and losses."""
    found = []
    for number, each in enumerate((objective, Logistic(beta=1.0))):
        policy = make_policy()
        history = train(policy, world.pairs(10), tmp_path / str(number), each, how(epochs=2))
        found.append((weights(policy), [row["loss/policy"] for row in history]))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_suspects_are_smoothed_by_the_papers_equations(
    make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is recomputed by hand: whole logits of both models, a separate window, and SPA's equations 9 to 12."""
    seen: list[list[float]] = []
    plain = Suspects.measure

    def recorded(self: Suspects, facts: Any, what: Any) -> Any:
        found, metrics = plain(self, facts, what)
        assert found.suspect_B is not None
        seen.append(found.suspect_B.tolist())
        confidences.append(metrics["suspects/confidence"].tolist())
        mixed = 1.5 * whole(policy, what.packed) - 0.5 * whole(before, what.packed)
        own = [logps(x, what.packed) for x in (mixed, whole(before, what.packed))]
        gaps = [(a - b) - (c - d) for a, b, c, d in zip(own[0][:2], own[1][:2], own[0][2:], own[1][2:], strict=True)]
        expected.append(torch.sigmoid(torch.tensor(gaps)).tolist())
        return found, metrics

    def whole(model: Policy, packed: Any) -> Tensor:
        with torch.no_grad():
            return model.head.logits(model.hidden(packed))

    def logps(logits_NV: Tensor, packed: Any) -> list[float]:
        logp_N = logits_NV.log_softmax(-1).gather(1, packed.target_N[:, None]).squeeze(1)
        return [float(part.sum()) for part in logp_N.split(list(packed.completions))]

    confidences: list[list[float]] = []
    expected: list[list[float]] = []
    policy, before = make_policy(), make_policy()
    monkeypatch.setattr(Suspects, "measure", recorded)
    objective = Refined(beta=1.0, alpha=0.3, extrapolation=0.5, percentile=40, window=5, warmup=0.25)
    history = train(policy, world.pairs(10), tmp_path, objective, sgd(epochs=4, batch_size=2))
    window: list[float] = []
    for step, (row, ours, theirs) in enumerate(zip(seen, confidences, expected, strict=True)):
        assert ours == pytest.approx(theirs, abs=1e-4)
        threshold = float(torch.tensor(window, dtype=torch.float64).quantile(0.4)) if window and step >= 5 else -1.0
        assert row == [float(value < threshold) for value in ours], step
        window = (window + ours)[-5:]
        assert history[step]["suspects/share"] == pytest.approx(sum(row) / 2)
    assert 0 < sum(map(sum, seen)) < 30


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("noisy", [False, True])
def test_states_from_disk_are_those_made_online(
    lora: int, noisy: bool, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """The states of both responses; the noise reads those of the rejected one."""
    pairs = world.pairs(10)
    keep_hidden(make_policy(), pairs, autocast=False, required=True, folder=tmp_path, report=Report(), both=True)
    found = []
    for hidden in (None, KeptHidden(tmp_path)):
        policy = make_policy()
        reference = said_by(policy, pairs)
        policy.model = Lora(rank=lora).on(policy.model, seed=0)
        entries, width = policy.head.weight_VH.shape
        noise = TrainableModule(width, entries, alpha=0.3, learning_rate=0.01) if noisy else SilentModule()
        folder = tmp_path / str(hidden is None)
        settings = sgd(epochs=3, micro_batch_size=3)
        objective = Refined(beta=1.0, alpha=0.4, percentile=50, window=8, warmup=0.1)
        history = train(policy, pairs, folder, objective, settings, noise=noise, reference=reference, hidden=hidden)
        found.append((weights(policy, noise), timeless(history)))
    close(found[0][0], found[1][0], 1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert any(row["suspects/share"] > 0 for row in found[0][1])


def test_kept_states_of_both_responses(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """In the order of a batch's tokens: all chosen ones, then all rejected ones; also after a kill."""
    policy, pairs = make_policy(), world.pairs(7)
    pairs[2] = replace(pairs[2], rejected_ids=[])
    facts = keep_hidden(policy, pairs, autocast=False, required=True, folder=tmp_path, report=Report(), both=True)
    assert facts["tokens"] == sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    kept = KeptHidden(tmp_path)
    assert kept.both
    for numbers in ([3, 0, 2], [6], list(range(7))):
        some = [pairs[i] for i in numbers]
        packed = pack([p.prompt_ids for p in some] * 2, [p.chosen_ids for p in some] + [p.rejected_ids for p in some])
        with torch.no_grad():
            expected = policy.hidden(packed)
        torch.testing.assert_close(kept.of_both(numbers), expected, atol=1e-5, rtol=1e-5)
        rejected = sum(len(p.rejected_ids) for p in some)
        torch.testing.assert_close(kept(numbers), expected[len(expected) - rejected :], atol=1e-5, rtol=1e-5)


def test_noise_does_not_depend_on_refined_labels(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Without suspects, the same noise on the same states as under the logistic loss, up to rounding."""
    found = []
    for number, objective in enumerate((Logistic(beta=1.0), Refined(beta=1.0, warmup=1.0))):
        policy = make_policy()
        entries, width = policy.head.weight_VH.shape
        noise = TrainableModule(width, entries, alpha=0.3, learning_rate=0.01)
        train(policy, world.pairs(8), tmp_path / str(number), objective, sgd(epochs=2), noise=noise)
        found.append(weights(policy, noise))
    close(found[0], found[1], 1e-6)


def test_extrapolation_adds_no_tensor_of_all_logits(
    make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs.TILE, "cpu", 16)
    monkeypatch.setitem(logprobs.KEPT, "cpu", 0)
    policy = make_policy()
    widest, width = 0, policy.causal_lm.config.hidden_size
    plain = logprobs.product

    def measured(one: Tensor, other: Tensor, **options: Any) -> Tensor:
        nonlocal widest
        result = plain(one, other, **options)
        widest = max(widest, result.shape[1] if one.shape[1] == width else 0)  # of products with the head
        return result

    monkeypatch.setattr(logprobs, "product", measured)
    train(policy, world.pairs(4), tmp_path, Refined(beta=1.0), sgd())
    assert widest == 16


# --- drift


def test_drift_of_a_step_by_brute_force(
    make_policy: MakePolicy, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty of every step from whole sequences, one by one, against a frozen copy; 0 at step 0."""
    pairs, policy, before = world.pairs(6), make_policy(), make_policy()
    with torch.no_grad():
        states = [before.hidden(pack([p.prompt_ids], [p.chosen_ids])) for p in pairs]
    variance_H = torch.cat(states).double().var(0, unbiased=False).float()
    expected: list[float] = []
    plain = PreferenceTraining.terms

    def priced(self: PreferenceTraining, batch: Any) -> Any:
        with torch.no_grad():
            means = [
                (policy.hidden(pack([pairs[i].prompt_ids], [pairs[i].chosen_ids])).mean(0), states[i].mean(0))
                for i in batch.numbers
            ]
        expected.append(sum(float(drift(a[None], b[None], variance_H)) for a, b in means) / len(means))
        return plain(self, batch)

    monkeypatch.setattr(PreferenceTraining, "terms", priced)
    objective = Statistics(base=Logistic(beta=1.0), weight=0.5)
    history = train(policy, pairs, tmp_path, objective, sgd(epochs=2, batch_size=2))
    assert [row["drift/states"] for row in history] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert history[0]["drift/states"] == pytest.approx(0.0, abs=1e-9)
    assert history[-1]["drift/states"] > 1e-5


def test_a_high_price_holds_the_policy_back(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    moved = []
    for weight in (0.0, 10.0, 1000.0):
        objective = Statistics(base=Logistic(beta=1.0), weight=weight)
        settings = how(epochs=10, optimizer=torch_optimizer("Adam", lr=1e-3))
        history = train(make_policy(), world.pairs(8), tmp_path / str(weight), objective, settings)
        moved.append(history[-1]["drift/states"])
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_moments_are_computed_from_the_given_reference(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """With another reference than the starting policy, the penalty is not 0 at step 0."""
    pairs, other = world.pairs(4), make_policy(1)
    first = []
    for name, frozen in (("start", None), ("other", other)):
        policy = make_policy()
        others = {"reference": said_by(frozen or policy, pairs), "frozen": frozen}
        others["expected"] = dict(enumerate(said_by(policy, pairs)))
        objective = Statistics(base=Logistic(beta=1.0), weight=1.0)
        first.append(train(policy, pairs, tmp_path / name, objective, **others)[0]["drift/states"])
    assert first[0] == pytest.approx(0.0, abs=1e-9)
    assert first[1] > 0.1


def test_drift_of_adapters(make_policy: MakePolicy, world: World, tmp_path: Path) -> None:
    """Fresh adapters change nothing, so the moments are the reference's; training then changes them."""
    policy = make_policy()
    reference = said_by(policy, world.pairs(6))
    policy.model = Lora(rank=4).on(policy.model, seed=0)
    objective = Statistics(base=Logistic(beta=1.0), weight=0.1)
    history = train(policy, world.pairs(6), tmp_path, objective, how(epochs=3), reference=reference)
    assert history[0]["drift/states"] == pytest.approx(0.0, abs=1e-9)
    assert history[-1]["drift/states"] > 0


def test_means_of_hidden_states_have_the_right_gradient(make_policy: MakePolicy, world: World) -> None:
    """Through the body, against a loop over responses."""
    policy, pairs = make_policy(), world.pairs(3)
    packed = pack([p.prompt_ids for p in pairs], [p.chosen_ids for p in pairs])
    grads = []
    for whole in (True, False):
        if whole:
            means = mean_by_sequence(policy.hidden(packed), packed.completions_S)
        else:
            means = torch.stack([policy.hidden(pack([p.prompt_ids], [p.chosen_ids])).mean(0) for p in pairs])
        parameters = [p for p in policy.causal_lm.base_model.parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(means.square().sum(), parameters))
    close(grads[0], grads[1], 1e-4)
