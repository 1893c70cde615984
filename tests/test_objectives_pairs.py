"""The losses on pairs other than the plain logistic one: numbers by hand, definitions, gradients, limits.

The pairs are those of ``test_objective.py``: gaps of 7 and −9 nats, margins of 0.7 and −0.9 at β = 0.1. Per token, with
``TOKENS``, they have log-probabilities of −2 and −2 (chosen), −2 and −1 (rejected); those of the reference are −2.4 and
−1.25, −1.5 and −3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dnpo.optimise.objective import (
    Facts,
    NoisyReference,
    PairLogps,
    drift,
    hard,
    log_odds,
    log_ratio_gap,
    logistic,
    odds_ratio,
    per_token,
    percentile,
    shifted,
    smooth,
    softly,
    squared,
    surprise,
    two_player,
    weighted_mean,
    without_reference,
)
from dnpo.optimise.parts import (
    Likelihood,
    Logistic,
    Objective,
    OddsRatio,
    PerToken,
    Refined,
    Squared,
    Statistics,
    check_objective,
)
from tests.test_objective import BEFORE, BETA, DATA, POLICY, REFERENCE, assert_equal, draws, facts, minimum, pairs

TOKENS = ((5.0, 4.0), (10.0, 3.0))
SURE = facts([1.0, 1.0], tokens=TOKENS)
SOFT = facts([0.8, 0.8], tokens=TOKENS)

PAIR_LOSSES: dict[str, Callable[[PairLogps, PairLogps, Facts], Tensor]] = {
    "logistic": Logistic(beta=BETA),
    "smoothed": Logistic(beta=BETA, smoothing=0.1),
    "squared": Squared(beta=BETA),
    "squared, per token": Squared(beta=BETA, mean=True),
    "odds ratio": OddsRatio(weight=0.3),
    "per token": PerToken(beta=2.0, margin=0.5),
}


def random_pairs(size: int = 6, seed: int = 0) -> tuple[PairLogps, PairLogps, Facts]:
    """Policy, reference and facts in float64: soft labels, lengths from 3 to 40 tokens."""
    chosen, rejected, *reference = draws(4, size, seed)
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(size, generator=generator, dtype=torch.float64)
    tokens = [torch.randint(3, 41, (size,), generator=generator).double() for _ in range(2)]
    known = Facts(strength, torch.ones_like(strength), torch.zeros_like(strength), *tokens)
    return PairLogps(chosen, rejected), PairLogps(*reference), known


def swapped(logps: PairLogps) -> PairLogps:
    """The responses of each pair in the other order."""
    return PairLogps(logps.rejected_B, logps.chosen_B)


def swapped_facts(known: Facts, **changes: Tensor) -> Facts:
    """The same for facts."""
    return known._replace(chosen_tokens_B=known.rejected_tokens_B, rejected_tokens_B=known.chosen_tokens_B, **changes)


# --- worked numbers ---------------------------------------------------------------------------------------------------


def test_soft_labels_by_hand() -> None:
    """p ℓ(m) + (1 − p) ℓ(−m) = ℓ(m) + (1 − p) m: ℓ(0.7) + 0.2 · 0.7 = 0.4031860489 + 0.14, and 1.2411538747 − 0.18."""
    assert_equal(logistic(pairs(POLICY), pairs(REFERENCE), SOFT, beta=BETA), [0.5431860489, 1.0611538747])


def test_smoothing_by_hand() -> None:
    """A share of 0.1 turns p = 1 into 0.9 and p = 0.8 into 0.9 · 0.8 + 0.1 · 0.2 = 0.74."""
    assert_equal(smooth(torch.tensor([1.0, 0.8], dtype=torch.float64), 0.1), [0.9, 0.74])
    found = logistic(pairs(POLICY), pairs(REFERENCE), SURE, beta=BETA, smoothing=0.1)
    assert_equal(found, [0.4031860489 + 0.1 * 0.7, 1.2411538747 - 0.1 * 0.9])


def test_shifts_by_hand() -> None:
    """σ(0.7) = 0.6681877722 and σ(−0.9) = 0.2890504974.

    Less 0.2: −ln 0.4681877722 = 0.7588859. Less 0.25: 0.0390504974, under 0.05; so
    −ln 0.05 + (0.05 − 0.0390504974) / 0.05 = 2.9957322736 + 0.2189900520.
    """
    known = facts([1.0, 1.0], shift=[0.2, 0.25])
    found = logistic(pairs(POLICY), pairs(REFERENCE), known, beta=BETA, xi_min=0.05)
    assert_equal(found, [-math.log(0.6681877722 - 0.2), 2.9957322736 + 0.2189900520], atol=2e-9)
    assert found[0] == pytest.approx(0.7588859, abs=1e-7)


def test_squared_by_hand() -> None:
    """Targets of 5 nats at p = 1 and of 0.6 / 0.2 = 3 at p = 0.8: (7 − 5)², (−9 − 5)²; (7 − 3)², (−9 − 3)²."""
    assert_equal(squared(pairs(POLICY), pairs(REFERENCE), SURE, beta=BETA), [4.0, 196.0])
    assert_equal(squared(pairs(POLICY), pairs(REFERENCE), SOFT, beta=BETA), [16.0, 144.0])


def test_squared_per_token_by_hand() -> None:
    """Gaps (−2 + 2.4) − (−2 + 1.5) = 0.9 and (−2 + 1.25) − (−1 + 3) = −2.75; less 5, squared."""
    found = squared(pairs(POLICY), pairs(REFERENCE), SURE, beta=BETA, mean=True)
    assert_equal(found, [16.81, 60.0625])


def test_odds_ratio_by_hand() -> None:
    """The log odds of e^−2 are −2 − ln(1 − e^−2) = −1.8545865422; those of e^−1 are −0.5413248546, which is
    1.3132616875 more. Equal odds cost ln 2; the others cost ln(1 + e^1.3132616875) = ln(2 + e) = 1.5514447139. −log
    p̄ = 2 is added."""
    assert_equal(log_odds(torch.tensor([-2.0, -1.0], dtype=torch.float64)), [-1.8545865422, -0.5413248546])
    assert_equal(odds_ratio(pairs(POLICY), SURE, weight=0.1), [2 + 0.1 * math.log(2), 2 + 0.1 * 1.5514447139])


def test_without_reference_by_hand() -> None:
    """2 · (−2 + 2) − 1 = −1 costs ln(1 + e) = 1.3132616875, 2 · (−2 + 1) − 1 = −3 costs ln(1 + e³) = 3.0485873516."""
    found = without_reference(pairs(POLICY), SURE, beta=2.0, margin=1.0)
    assert_equal(found, [1.3132616875, 3.0485873516])


def test_surprise_by_hand() -> None:
    """Only the chosen responses count: 2 and 2 per token, and sums of 10 and 8."""
    assert_equal(surprise(pairs(POLICY), SURE, mean=True), [2.0, 2.0])
    assert_equal(surprise(pairs(POLICY), SURE, mean=False), [10.0, 8.0])


def test_drift_by_hand() -> None:
    """Drifts of (1, 2) and (0, −4) with variances of 1 and 4: (1 + 4/4) / 2 = 1, (0 + 16/4) / 2 = 2."""
    means = torch.tensor([[1.0, 2.0], [5.0, 1.0]]), torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    assert_equal(drift(*means, torch.tensor([1.0, 4.0])), [1.0, 2.0])


def test_percentile_by_hand() -> None:
    """The 0.1 quantile of 0 to 10 is 1; that of two numbers is a tenth of the way from the lower to the higher."""
    assert percentile(list(range(10, -1, -1)), 0.1) == 1.0
    assert percentile([3.0, 1.0], 0.1) == pytest.approx(1.2)
    assert (percentile([0.3], 0.1), percentile([1.0, 2.0], 0.0), percentile([1.0, 2.0], 1.0)) == (0.3, 1.0, 2.0)


def test_weighted_mean_by_hand() -> None:
    """(1 · 3 + 3 · 7) / 4 = 6; a micro-batch without weight adds nothing."""
    value, weight = torch.tensor([3.0, 7.0]), torch.tensor([1.0, 3.0])
    assert_equal(weighted_mean(value, weight), 6.0)
    assert_equal(weighted_mean(value, 0 * weight), 0.0)


# --- definitions, number by number in Python's own floats -------------------------------------------------------------


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_definition(name: str, c: float, r: float, c0: float, r0: float, p: float, n: float, m: float) -> float:
    """A loss as its paper writes it, for one pair of n and m tokens under labels of strength p."""

    def loss(c: float, r: float, c0: float, r0: float, n: float, m: float) -> float:
        if name in ("logistic", "smoothed"):
            return -math.log(sigma(BETA * (c - c0 - r + r0)))
        if name == "odds ratio":
            odds = math.exp(c / n) / (1 - math.exp(c / n)), math.exp(r / m) / (1 - math.exp(r / m))
            return -c / n - 0.3 * math.log(sigma(math.log(odds[0] / odds[1])))
        assert name == "per token"
        return -math.log(sigma(2.0 * c / n - 2.0 * r / m - 0.5))

    if name.startswith("squared"):
        if "token" in name:
            c, c0, r, r0 = c / n, c0 / n, r / m, r0 / m
        return (c - c0 - (r - r0) - (2 * p - 1) / (2 * BETA)) ** 2
    if name == "smoothed":
        p = 0.9 * p + 0.1 * (1 - p)
    return p * loss(c, r, c0, r0, n, m) + (1 - p) * loss(r, c, r0, c0, m, n)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_definitions(name: str) -> None:
    policy, reference, known = random_pairs(40, seed=7)
    found = PAIR_LOSSES[name](policy, reference, known)
    columns = (*policy, *reference, known.strength_B, known.chosen_tokens_B, known.rejected_tokens_B)
    expected = [by_definition(name, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_shifts_by_definition() -> None:
    """−log(σ(m) − s) above ξ_min, the tangent there below it; loss and slope are continuous at ξ_min."""
    margin = torch.linspace(-6, 6, 101, dtype=torch.float64)
    for shift in (0.05, 0.3, 0.9):
        found = shifted(margin, torch.full_like(margin, shift), 0.05).tolist()
        for m, loss in zip(margin.tolist(), found, strict=True):
            u = sigma(m) - shift
            expected = -math.log(u) if u > 0.05 else -math.log(0.05) - (u - 0.05) / 0.05
            assert loss == pytest.approx(expected, rel=1e-12, abs=1e-12)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_losses_against_finite_differences(name: str) -> None:
    policy, reference, known = random_pairs(seed=3)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return PAIR_LOSSES[name](PairLogps(chosen, rejected), reference, known)

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in policy])


def gradient(objective: Objective, policy: PairLogps, reference: PairLogps, known: Facts) -> list[Tensor]:
    """d loss / d log p of chosen and of rejected responses; 0 if one is not read."""
    leaves = [t.clone().requires_grad_() for t in policy]
    loss_B = objective(PairLogps(*leaves), reference, known)
    found = torch.autograd.grad(loss_B.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, found, strict=True)]


def test_gradient_of_soft_labels() -> None:
    """β (σ(m) − p) for the chosen, the opposite for the rejected."""
    policy, reference, known = random_pairs()
    chosen, rejected = gradient(Logistic(beta=BETA), policy, reference, known)
    expected = BETA * (torch.sigmoid(BETA * log_ratio_gap(policy, reference)) - known.strength_B)
    torch.testing.assert_close(chosen, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rejected, -expected, rtol=1e-12, atol=1e-14)


def test_gradient_of_shifts() -> None:
    """−β σ(m) σ(−m) / max(σ(m) − s, ξ_min)."""
    policy, reference, known = random_pairs()
    known = known._replace(strength_B=torch.ones(6, dtype=torch.float64), shift_B=known.strength_B)
    chosen, _ = gradient(Logistic(beta=BETA), policy, reference, known)
    sure = torch.sigmoid(BETA * log_ratio_gap(policy, reference))
    expected = -BETA * sure * (1 - sure) / (sure - known.shift_B).clamp(min=0.05)
    torch.testing.assert_close(chosen, expected, rtol=1e-12, atol=1e-14)


def test_gradient_of_the_odds_ratio() -> None:
    """−(1 + λ σ(−g) / (1 − p̄⁺)) / n for the chosen, λ σ(−g) / (1 − p̄⁻) / m for the rejected, g the log odds ratio."""
    policy, reference, known = random_pairs()
    known = known._replace(strength_B=torch.ones(6, dtype=torch.float64))
    chosen, rejected = gradient(OddsRatio(weight=0.3), policy, reference, known)
    logps = per_token(policy, known)
    pull = 0.3 * torch.sigmoid(log_odds(logps.rejected_B) - log_odds(logps.chosen_B))
    torch.testing.assert_close(chosen, -(1 + pull / (1 - logps.chosen_B.exp())) / known.chosen_tokens_B)
    torch.testing.assert_close(rejected, pull / (1 - logps.rejected_B.exp()) / known.rejected_tokens_B)


def test_gradient_per_token_and_of_likelihood() -> None:
    """−β σ(γ − g) / n, and −1/n."""
    policy, reference, known = random_pairs()
    known = known._replace(strength_B=torch.ones(6, dtype=torch.float64))
    logps = per_token(policy, known)
    chosen, rejected = gradient(PerToken(beta=2.0, margin=0.5), policy, reference, known)
    pull = 2.0 * torch.sigmoid(0.5 - 2.0 * (logps.chosen_B - logps.rejected_B))
    torch.testing.assert_close(chosen, -pull / known.chosen_tokens_B)
    torch.testing.assert_close(rejected, pull / known.rejected_tokens_B)
    chosen, rejected = gradient(Likelihood(), policy, reference, known)
    torch.testing.assert_close(chosen, -1 / known.chosen_tokens_B)
    assert rejected.abs().max() == 0


@pytest.mark.parametrize(
    ("objective", "pulls"),
    [
        (Logistic(beta=BETA), [0.3, 0.1775, 0.0689, -0.0808, -0.1820]),
        (Squared(beta=BETA), [100.0, 0.0, -100.0, -300.0, -700.0]),
    ],
    ids=["soft logistic", "squared"],
)
def test_a_large_margin_is_pulled_back(objective: Objective, pulls: list[float]) -> None:
    """−dL/dm at margins 0, 0.5, 1, 2, 4 for p = 0.8 and p = 1. The noise term must not be the negative of these."""
    gap = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64) / BETA
    zero = torch.zeros_like(gap)
    known = hard(gap)._replace(strength_B=torch.full_like(gap, 0.8 if isinstance(objective, Logistic) else 1.0))
    chosen, _ = gradient(objective, PairLogps(gap, zero), PairLogps(zero, zero), known)
    assert_equal(-chosen / BETA, pulls, atol=1e-4)


# --- limits and identities --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_labels_equal_dpo_bit_for_bit(dtype: torch.dtype) -> None:
    """p = 1, ε = 0 and no shift give DPO's softplus in all digits, in value and gradient, at every margin."""
    chosen, rejected, *reference = (t.to(dtype) for t in draws(4, 4096, seed=5))
    chosen = chosen * torch.logspace(-3, 3, 4096, dtype=dtype)
    found = []
    for soft in (True, False):
        policy = PairLogps(chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
        known = hard(chosen)
        if soft:
            loss_B = logistic(policy, PairLogps(*reference), known, beta=BETA)
            loss = weighted_mean(loss_B, known.weight_B)
        else:
            loss_B = torch.nn.functional.softplus(-BETA * log_ratio_gap(policy, PairLogps(*reference)))
            loss = loss_B.mean()
        found.append([loss_B, loss, *torch.autograd.grad(loss, list(policy))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["logistic", "odds ratio", "per token"])
def test_the_soft_rule(name: str) -> None:
    """p L(y⁺, y⁻) + (1 − p) L(y⁻, y⁺), with the loss of hard labels."""
    policy, reference, known = random_pairs()
    sure = known._replace(strength_B=torch.ones(6, dtype=torch.float64))
    one = PAIR_LOSSES[name](policy, reference, sure)
    other = PAIR_LOSSES[name](swapped(policy), swapped(reference), swapped_facts(sure))
    found = PAIR_LOSSES[name](policy, reference, known)
    torch.testing.assert_close(found, softly(one, other, known.strength_B), rtol=1e-12, atol=1e-12)


def test_the_soft_rule_of_the_squared_loss() -> None:
    """Its target form has the same gradient; it is lower by the constant (1 − (2p − 1)²) / (4β²)."""
    policy, reference, known = random_pairs()
    sure = known._replace(strength_B=torch.ones(6, dtype=torch.float64))
    one = squared(policy, reference, sure, beta=BETA)
    other = squared(swapped(policy), swapped(reference), swapped_facts(sure), beta=BETA)
    constant = (1 - (2 * known.strength_B - 1) ** 2) / (4 * BETA**2)
    torch.testing.assert_close(
        squared(policy, reference, known, beta=BETA) + constant, softly(one, other, known.strength_B)
    )


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "squared, per token"])
def test_swapped_labels_with_the_opposite_strength_cost_the_same(name: str) -> None:
    policy, reference, known = random_pairs()
    other = swapped_facts(known, strength_B=1 - known.strength_B)
    torch.testing.assert_close(
        PAIR_LOSSES[name](policy, reference, known), PAIR_LOSSES[name](swapped(policy), swapped(reference), other)
    )


def test_the_minimum_of_soft_labels() -> None:
    """The loss is least at σ(m) = p: at m = 0 for p = ½; p = 0 is the loss of the opposite label."""
    margin = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    zero = torch.zeros_like(margin)
    for p in (0.5, 0.8, 0.2):
        known = hard(margin)._replace(strength_B=torch.full_like(margin, p))
        loss = logistic(PairLogps(margin, zero), PairLogps(zero, zero), known, beta=1.0)
        assert float(margin[loss.argmin()]) == pytest.approx(math.log(p / (1 - p)), abs=0.006)
    known = hard(margin)._replace(strength_B=zero)
    loss = logistic(PairLogps(margin, zero), PairLogps(zero, zero), known, beta=1.0)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(margin))


def test_soft_labels_are_finite_where_logarithms_of_probabilities_are_not() -> None:
    """log(1 − σ(40)) is −inf in float32 and float64; at p = ½ the loss is 20."""
    for dtype in (torch.float32, torch.float64):
        margin = torch.tensor([40.0, -40.0], dtype=dtype)
        assert torch.log(1 - torch.sigmoid(margin))[0] == -math.inf
        zero = torch.zeros_like(margin)
        known = hard(margin)._replace(strength_B=torch.full_like(margin, 0.5))
        found = logistic(PairLogps(margin, zero), PairLogps(zero, zero), known, beta=1.0)
        torch.testing.assert_close(found, torch.full_like(margin, 20.0))


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "objective", [Logistic(beta=0.3), Logistic(beta=0.3, smoothing=0.2), Refined(beta=0.3, alpha=0.4)]
)
def test_step_zero_costs_ln_2_for_all_labels(objective: Objective, strength: float) -> None:
    known = facts([strength] * 2)._replace(suspect_B=torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert_equal(objective(pairs(POLICY), pairs(POLICY), known), [math.log(2)] * 2, atol=1e-15)


@pytest.mark.parametrize("mean", [False, True])
def test_step_zero_of_the_squared_loss(mean: bool) -> None:
    """1 / (4β²) = 25 at β = 0.1."""
    assert_equal(squared(pairs(POLICY), pairs(POLICY), SURE, beta=0.1, mean=mean), [25.0, 25.0])


def test_sums_and_means_of_the_squared_loss_disagree() -> None:
    """A gap at the target for sums is far from the target for means: 0 against 18.2 on one pair."""
    policy = PairLogps(torch.tensor([0.0]), torch.tensor([-5.0]))
    reference = PairLogps(torch.tensor([0.0]), torch.tensor([0.0]))
    known = facts([1.0], tokens=([7.0], [6.8]))
    assert float(squared(policy, reference, known, beta=0.1)) == 0.0
    assert float(squared(policy, reference, known, beta=0.1, mean=True)) == pytest.approx(
        18.1877163, abs=1e-5
    )  # (5/6.8 − 5)²


@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-6, -1e-3, -200.0])
def test_the_odds_ratio_is_finite_at_certainty(logp: float) -> None:
    """log(1 − exp(−1e-9)) has NaN gradients in float32, and so has TRL's form."""
    policy = PairLogps(torch.tensor([logp], requires_grad=True), torch.tensor([logp / 2], requires_grad=True))
    known = hard(policy.chosen_B.detach())
    loss = odds_ratio(policy, known, weight=1.0)
    grads = torch.autograd.grad(loss.sum(), list(policy))
    assert all(bool(torch.isfinite(t).all()) for t in (loss, *grads))


def test_weight_0_of_the_odds_ratio_is_fine_tuning() -> None:
    policy, reference, known = random_pairs()
    known = known._replace(strength_B=torch.ones(6, dtype=torch.float64))
    assert torch.equal(OddsRatio(weight=0.0)(policy, reference, known), Likelihood()(policy, reference, known))


def test_without_a_shift_there_is_no_lower_limit() -> None:
    """ξ_min applies only to shifted pairs: others have DPO's loss at any margin."""
    margin = torch.tensor([-30.0, -30.0], dtype=torch.float64)
    zero = torch.zeros_like(margin)
    known = hard(margin)._replace(shift_B=torch.tensor([0.0, 1e-300], dtype=torch.float64))
    found = logistic(PairLogps(margin, zero), PairLogps(zero, zero), known, beta=1.0, xi_min=0.05)
    assert_equal(found, [30.0, -math.log(0.05) + 1.0])


def test_refined_limits() -> None:
    """α = 0 and no suspects give the logistic loss in all digits; α = 1 flips a suspect label."""
    policy, reference, known = random_pairs()
    plain = Logistic(beta=BETA)(policy, reference, known)
    some = known._replace(suspect_B=torch.tensor([0.0, 1.0] * 3, dtype=torch.float64))
    assert torch.equal(Refined(beta=BETA, alpha=0.0)(policy, reference, known), plain)
    assert torch.equal(Refined(beta=BETA, alpha=0.0)(policy, reference, some), plain)
    assert torch.equal(Refined(beta=BETA)(policy, reference, known), plain)
    turned = Refined(beta=BETA, alpha=1.0)(policy, reference, some)
    opposite = Logistic(beta=BETA)(policy, reference, known._replace(strength_B=1 - known.strength_B))
    assert_equal(turned, [float((plain, opposite)[i % 2][i]) for i in range(6)], atol=1e-12)


def test_refined_by_definition() -> None:
    """−[(1 − αz) log p + αz log(1 − p)] (SPA, equation 10)."""
    policy, reference, known = random_pairs()
    z = torch.tensor([0.0, 1.0] * 3, dtype=torch.float64)
    known = known._replace(strength_B=torch.ones_like(z), suspect_B=z)
    p = torch.sigmoid(BETA * log_ratio_gap(policy, reference))
    expected = -((1 - 0.1 * z) * p.log() + 0.1 * z * (1 - p).log())
    torch.testing.assert_close(Refined(beta=BETA, alpha=0.1)(policy, reference, known), expected)


def test_drift_is_zero_at_the_reference() -> None:
    """Value and gradient; elsewhere the gradient is 2 Δμ / (H var)."""
    mean = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variance = torch.tensor([0.1, 1.0, 2.0, 5.0], dtype=torch.float64)
    here = mean.clone().requires_grad_()
    (grad,) = torch.autograd.grad(drift(here, mean, variance).sum(), here)
    assert float(drift(here, mean, variance).detach().abs().max()) == float(grad.abs().max()) == 0.0
    there = (mean + 0.5).requires_grad_()
    (grad,) = torch.autograd.grad(drift(there, mean, variance).sum(), there)
    torch.testing.assert_close(grad, (2 * 0.5 / (4 * variance)).expand(3, 4))


def test_a_channel_that_never_varies_does_not_divide_by_0() -> None:
    means = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert torch.isfinite(drift(*means, torch.tensor([0.0, 1.0]))).all()
    assert_equal(drift(*means, torch.tensor([0.0, 1.0])), [0.5])


def test_statistics_are_added_to_another_objective() -> None:
    policy, reference, known = random_pairs()
    known = known._replace(drift_B=torch.arange(6.0, dtype=torch.float64))
    for base in (Logistic(beta=BETA), Squared(beta=0.2), Likelihood()):
        both = Statistics(base=base, weight=10.0)
        assert_equal(
            both(policy, reference, known) - base(policy, reference, known), [10.0 * i for i in range(6)], 1e-9
        )
        assert both.beta == base.beta
        assert both.reads_rejected == getattr(base, "reads_rejected", True)
        assert torch.equal(replace(both, weight=0.0)(policy, reference, known), base(policy, reference, known))


# --- weights, and noise under other objectives ------------------------------------------------------------------------


def test_weights_are_over_the_whole_step() -> None:
    """Micro-batches count by their share of the weights: the loss is Σ w ℓ / Σ w of the step for every division."""
    policy, reference, known = random_pairs(7)
    known = known._replace(weight_B=torch.tensor([1.0, 0.25, 3.0, 0.5, 1.0, 2.0, 0.1], dtype=torch.float64))
    loss_B = Logistic(beta=BETA)(policy, reference, known)
    whole = (known.weight_B * loss_B).sum() / known.weight_B.sum()
    for cut in ([7], [3, 4], [1] * 7, [2, 4, 1]):
        total = torch.zeros((), dtype=torch.float64)
        for loss_b, weight_b in zip(loss_B.split(cut), known.weight_B.split(cut), strict=True):
            total += weighted_mean(loss_b, weight_b) * weight_b.sum() / known.weight_B.sum()
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 7, 49, 64, 1000])
def test_equal_weights_leave_the_bits_of_the_plain_mean(count: int) -> None:
    (value,) = draws(1, count, seed=count)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(weighted_mean(value.to(dtype), torch.ones(count, dtype=dtype)), value.to(dtype).mean())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_noise_term_is_logistic_under_every_objective(name: str) -> None:
    """Hard, logistic and weighted: noise lowers the margin under every objective with a reference."""
    policy, reference, known = random_pairs()
    known = known._replace(weight_B=torch.tensor([1.0, 0.5, 2.0, 1.0, 0.1, 3.0], dtype=torch.float64))
    met, noise = draws(2, 6, seed=9)
    noise.requires_grad_()
    terms = two_player(
        PAIR_LOSSES[name],
        policy,
        reference,
        NoisyReference(met, noise, torch.zeros(())),
        known,
        alpha=0.1,
        beta=BETA,
    )
    margin = BETA * log_ratio_gap(policy, PairLogps(reference.chosen_B, noise))
    share = known.weight_B / known.weight_B.sum()
    torch.testing.assert_close(terms.noise, -(share * torch.nn.functional.softplus(-margin)).sum())
    against = PairLogps(reference.chosen_B, met)
    torch.testing.assert_close(terms.policy, (share * PAIR_LOSSES[name](policy, against, known)).sum())
    (grad,) = torch.autograd.grad(terms.noise, noise)
    assert bool((grad > 0).all())


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_where_an_iteration_ends_on_mixed_negatives(beta: float, share: float) -> None:
    """p_k (p_data / q)^{1/β}, normalised, where q is the mixture that wrote the rejected responses."""
    earlier = torch.tensor([0.05, 0.15, 0.15, 0.30, 0.25, 0.10], dtype=torch.float64)
    wrote = share * BEFORE + (1 - share) * earlier
    size = len(DATA)
    chosen, rejected = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)

    def loss(logits: Tensor) -> Tensor:
        logp, logr = logits.log_softmax(0), BEFORE.log()
        loss_B = logistic(PairLogps(logp[chosen], logp[rejected]), PairLogps(logr[chosen], logr[rejected]), beta=beta)
        return (DATA[chosen] * wrote[rejected] * loss_B).sum()

    expected = BEFORE * (DATA / wrote) ** (1 / beta)
    torch.testing.assert_close(minimum(loss, BEFORE.log()), expected / expected.sum(), rtol=0, atol=1e-6)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "reads"),
    [
        (Logistic(beta=0.1), (True, True, False)),
        (Squared(beta=0.1), (True, True, False)),
        (OddsRatio(), (False, True, False)),
        (PerToken(), (False, True, False)),
        (Likelihood(), (False, False, False)),
        (Refined(beta=0.1), (True, True, True)),
        (Refined(beta=0.1, alpha=0.0), (True, True, False)),
        (Refined(beta=0.1, extrapolation=0.0), (True, True, False)),
        (Statistics(base=Likelihood()), (True, False, True)),
        (Statistics(base=Logistic(beta=0.1)), (True, True, True)),
    ],
    ids=str,
)
def test_inputs_that_an_objective_declares(objective: Any, reads: Sequence[bool]) -> None:
    """And the loss does not depend on inputs that it does not declare."""
    check_objective(objective)
    flags = [getattr(objective, "reads_reference", True), getattr(objective, "reads_rejected", True)]
    assert [*flags, getattr(objective, "needs_states", False)] == list(reads)
    policy, reference, known = random_pairs()
    known = known._replace(drift_B=torch.zeros(6), suspect_B=torch.zeros(6))
    changed = [PairLogps(*(t - 3 for t in logps)) for logps in (reference, policy)]
    loss = objective(policy, reference, known)
    if not reads[0]:
        assert torch.equal(objective(policy, changed[0], known), loss)
    if not reads[1]:
        assert torch.equal(objective(policy._replace(rejected_B=changed[1].rejected_B), reference, known), loss)
