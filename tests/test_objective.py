"""The equations: numbers by hand, gradients, and SPIN's theorems on a small exact policy."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Generator, Tensor

from dnpo.optimise.objective import (
    Facts,
    NoisyReference,
    PairLogps,
    log_ratio_gap,
    logistic,
    negative_log_likelihood,
    saturation,
    two_player,
)

# Two pairs whose numbers every test below shares.
#   gap_1 = (−10 − −12) − (−20 − −15) = 2 + 5 = 7        gap_2 = (−8 − −5) − (−3 − −9) = −3 − 6 = −9
POLICY = ((-10.0, -8.0), (-20.0, -3.0))
REFERENCE = ((-12.0, -5.0), (-15.0, -9.0))
BETA = 0.1


def pairs(numbers: tuple[tuple[float, ...], tuple[float, ...]], grad: bool = False) -> PairLogps:
    """Chosen and rejected log-probabilities in float64; leaves if they need gradients."""
    chosen, rejected = (torch.tensor(n, dtype=torch.float64, requires_grad=grad) for n in numbers)
    return PairLogps(chosen, rejected)


def noisy(policy: tuple[float, ...], noise: tuple[float, ...], variance: float, grad: bool = False) -> NoisyReference:
    """The output of a noise, with plain numbers; all three are leaves with gradient if ``grad``."""
    return NoisyReference(
        *(torch.tensor(x, dtype=torch.float64, requires_grad=grad) for x in (policy, noise, variance))
    )


def facts(
    strength: Sequence[float],
    weight: Sequence[float] | None = None,
    shift: Sequence[float] | None = None,
    tokens: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Facts:
    """Facts in float64: by default weights of 1, no shifts and lengths of 10."""
    size = len(strength)
    columns = (strength, weight or [1.0] * size, shift or [0.0] * size, *(tokens or ([10.0] * size, [10.0] * size)))
    return Facts(*(torch.tensor(column, dtype=torch.float64) for column in columns))


def hard(size: int) -> Facts:
    """Facts of ``count`` pairs with hard labels."""
    return facts([1.0] * size)


def assert_equal(found: Tensor, expected: object, atol: float = 1e-9) -> None:
    """Equal up to rounding, in shape too."""
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


def draws(count: int, size: int, seed: int) -> list[Tensor]:
    """``count`` float64 vectors on the scale of response log-probabilities, from a separate generator."""
    generator = Generator().manual_seed(seed)
    return [5 * torch.randn(size, generator=generator, dtype=torch.float64) - 20 for _ in range(count)]


# --- worked numbers ---------------------------------------------------------------------------------------------------


def test_gap_by_hand() -> None:
    """Checks the signs of the four log-probabilities."""
    assert_equal(log_ratio_gap(pairs(POLICY), pairs(REFERENCE)), [7.0, -9.0])


@pytest.mark.parametrize(
    ("which", "index", "sign"), [("policy", 0, 1), ("policy", 1, -1), ("reference", 0, -1), ("reference", 1, 1)]
)
def test_gap_changes_by_one_nat_with_each_logp(which: str, index: int, sign: int) -> None:
    """A wrong sign could cancel in the worked numbers, but not here."""
    numbers = {"policy": [list(n) for n in POLICY], "reference": [list(n) for n in REFERENCE]}
    numbers[which][index][0] += 1
    policy, reference = (pairs((tuple(n[0]), tuple(n[1]))) for n in numbers.values())
    assert_equal(log_ratio_gap(policy, reference), [7.0 + sign, -9.0])


def test_logistic_by_hand() -> None:
    """β · gap = 0.7 and −0.9: ln(1 + e^−0.7) = ln 1.4965853 = 0.4031860, ln(1 + e^0.9) = ln 3.4596031 = 1.2411539."""
    found = logistic(pairs(POLICY), pairs(REFERENCE), beta=BETA)
    assert_equal(found, [0.4031860489, 1.2411538747])


def test_beta_scales_the_gap() -> None:
    """β = 0.5 makes 7 nats a margin of 3.5, and ln(1 + e^−3.5) = ln 1.0301974 = 0.0297504."""
    assert_equal(logistic(pairs(POLICY), pairs(REFERENCE), beta=0.5)[:1], [0.0297504183])


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_policy_equal_to_reference_costs_ln_2(beta: float) -> None:
    """Step 0 of every iteration, for every temperature: margin 0 and loss ln 2 in all digits."""
    assert_equal(logistic(pairs(POLICY), pairs(POLICY), beta=beta), [math.log(2)] * 2, atol=0)


def test_logistic_stays_finite_at_extreme_margins() -> None:
    """log σ written as log of a sigmoid is −inf at a margin of −1000; its gradient must be −β there, not NaN."""
    policy = PairLogps(torch.tensor([-1000.0, 1000.0], requires_grad=True), torch.zeros(2))
    loss_B = logistic(policy, PairLogps(torch.zeros(2), torch.zeros(2)), beta=1.0)
    assert loss_B.tolist() == [1000.0, 0.0]
    (grad,) = torch.autograd.grad(loss_B.sum(), policy.chosen_B)
    assert grad.tolist() == [-1.0, 0.0]


def test_two_player_by_hand() -> None:
    """Each of the three terms and their sum.

    Policy term: log p̃ = (−17, −10) makes the gaps 2 − (−20 + 17) = 5 and −3 − (−3 + 10) = −10, the margins 0.5 and −1:
        (ln(1 + e^−0.5) + ln(1 + e)) / 2 = (0.4740769842 + 1.3132616875) / 2 = 0.89366933585
    Noise term: log p̃ = (−16, −13) makes the gaps 2 + 4 = 6 and −3 − 10 = −13, the margins 0.6 and −1.3:
        −(ln(1 + e^−0.6) + ln(1 + e^1.3)) / 2 = −(0.4374879505 + 1.5410084538) / 2 = −0.98924820215
    Variance term: 0.2 · 0.3 = 0.06.
    """
    noise = noisy((-17.0, -10.0), (-16.0, -13.0), 0.3)
    terms = two_player(
        partial(logistic, beta=BETA), pairs(POLICY), pairs(REFERENCE), noise, hard(2), alpha=0.2, beta=BETA
    )
    assert_equal(terms.policy, 0.89366933585)
    assert_equal(terms.noise, -0.98924820215)
    assert_equal(terms.variance, 0.06)
    assert_equal(terms.total, 0.89366933585 - 0.98924820215 + 0.06)


def test_saturation_by_hand() -> None:
    """σ(0) = 1/2 and σ(−0.7) = 1 / (1 + e^0.7) = 0.3318122; a margin of 50 is saturated, one of −50 is not at all."""
    assert_equal(saturation(torch.tensor([0.0, 0.7, 50.0, -50.0], dtype=torch.float64)), [0.5, 0.3318122278, 0.0, 1.0])


def test_saturation_is_the_size_of_the_gradient() -> None:
    """The reported value, the mean |dℓ/dm| of the loss, is compared with its definition."""
    policy, reference = pairs(POLICY, grad=True), pairs(REFERENCE)
    logistic(policy, reference, beta=BETA).mean().backward()
    found = saturation(BETA * log_ratio_gap(policy.detach(), reference)).mean()
    assert policy.chosen_B.grad is not None
    torch.testing.assert_close(found, policy.chosen_B.grad.abs().sum() / BETA)


def test_negative_log_likelihood_by_hand() -> None:
    """A mean over tokens, positive: tokens of probability 1/2, 1/4 and 1/8 cost (1 + 2 + 3)/3 ln 2."""
    assert_equal(negative_log_likelihood(torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64).log()), 2 * math.log(2))


# --- gradients --------------------------------------------------------------------------------------------------------


def test_only_the_policy_term_moves_the_policy() -> None:
    """d total/dθ = d policy term/dθ: −β σ(−m̃)/B for the chosen, + for the rejected; the noise term adds 0."""
    policy = pairs(POLICY, grad=True)
    noise = noisy((-17.0, -10.0), (-16.0, -13.0), 0.3, grad=True)
    two_player(
        partial(logistic, beta=BETA), policy, pairs(REFERENCE), noise, hard(2), alpha=0.2, beta=BETA
    ).total.backward()
    # Margins 0.5 and −1 (see the worked numbers): σ(−0.5) = 0.3775406688, σ(1) = 0.7310585786.
    assert policy.chosen_B.grad is not None
    assert policy.rejected_B.grad is not None
    assert_equal(policy.chosen_B.grad, [-BETA * 0.3775406688 / 2, -BETA * 0.7310585786 / 2])
    assert_equal(policy.rejected_B.grad, [BETA * 0.3775406688 / 2, BETA * 0.7310585786 / 2])


def test_only_its_own_two_terms_move_the_noise() -> None:
    """d total/dφ: none through ``policy_B`` even if it carries a gradient by mistake, the right ones elsewhere.

    −ℓ(m̃) has the gradient σ(−m̃) dm̃, and dm̃ = +β d log p̃. Margins 0.6 and −1.3: σ(−0.6) = 0.3543436938,
    σ(1.3) = 0.7858349830. Positive, so the noise lowers log p̃ to narrow the margin.
    """
    noise = noisy((-17.0, -10.0), (-16.0, -13.0), 0.3, grad=True)
    two_player(
        partial(logistic, beta=BETA), pairs(POLICY), pairs(REFERENCE), noise, hard(2), alpha=0.2, beta=BETA
    ).total.backward()
    assert noise.policy_B.grad is None
    assert noise.noise_B.grad is not None
    assert noise.variance.grad is not None
    assert_equal(noise.noise_B.grad, [BETA * 0.3543436938 / 2, BETA * 0.7858349830 / 2])
    assert_equal(noise.variance.grad, 0.2)


def test_noise_of_zero_leaves_the_plain_loss() -> None:
    """In this limit NPO is SPIN: the loss and the gradient are equal bit for bit, not just close."""
    chosen, rejected, reference_chosen, reference_rejected = draws(4, size=64, seed=0)
    reference = PairLogps(reference_chosen, reference_rejected)
    nothing = NoisyReference(reference_rejected, reference_rejected, torch.zeros((), dtype=torch.float64))
    grads = []
    losses = []
    for two in (True, False):
        policy = PairLogps(chosen.clone().requires_grad_(), rejected.clone().requires_grad_())
        if two:
            terms = two_player(partial(logistic, beta=BETA), policy, reference, nothing, hard(64), alpha=0.1, beta=BETA)
            loss, total = terms.policy, terms.total
        else:
            loss = total = logistic(policy, reference, beta=BETA).mean()
        grads.append(torch.autograd.grad(total, list(policy)))
        losses.append(loss.detach())
    assert torch.equal(*losses)
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_logistic_against_finite_differences(beta: float) -> None:
    """The gradient in all four log-probabilities, at margins on both sides of 0."""
    numbers = [n.requires_grad_() for n in draws(4, size=6, seed=1)]

    def loss(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return logistic(PairLogps(a, b), PairLogps(c, d), beta=beta)

    assert torch.autograd.gradcheck(loss, numbers)


def test_terms_against_finite_differences() -> None:
    """Each term in the quantities that it may change; the tests above check that the other gradients are blocked."""
    policy_chosen, policy_rejected, *rest = draws(6, size=6, seed=2)
    reference, policy_B, noise_B = PairLogps(rest[0], rest[1]), rest[2], rest[3]
    variance = torch.tensor(0.3, dtype=torch.float64)
    objective = partial(logistic, beta=BETA)

    def policy_term(chosen: Tensor, rejected: Tensor) -> Tensor:
        noise = NoisyReference(policy_B, noise_B, variance)
        return two_player(
            objective, PairLogps(chosen, rejected), reference, noise, hard(6), alpha=0.1, beta=BETA
        ).policy

    def noise_terms(noise_B: Tensor, variance: Tensor) -> Tensor:
        noise = NoisyReference(policy_B, noise_B, variance)
        policy = PairLogps(policy_chosen, policy_rejected)
        terms = two_player(objective, policy, reference, noise, hard(6), alpha=0.1, beta=BETA)
        return terms.noise + terms.variance

    assert torch.autograd.gradcheck(
        policy_term, (policy_chosen.clone().requires_grad_(), policy_rejected.clone().requires_grad_())
    )
    assert torch.autograd.gradcheck(noise_terms, (noise_B.clone().requires_grad_(), variance.clone().requires_grad_()))


# --- SPIN's theorems, exactly, on a softmax policy over six responses to one prompt -----------------------------------

DATA = torch.tensor([0.30, 0.25, 0.20, 0.12, 0.08, 0.05], dtype=torch.float64)
BEFORE = torch.tensor([0.10, 0.35, 0.05, 0.20, 0.18, 0.12], dtype=torch.float64)


def population_loss(logits: Tensor, before: Tensor, data: Tensor, beta: float) -> Tensor:
    """E ℓ(margin) over y ~ p_data and y′ ~ p_θk, as an exact double sum over all pairs of responses."""
    size = len(data)
    logp, logr = logits.log_softmax(0), before.log()
    chosen = torch.arange(size).repeat_interleave(size)
    rejected = torch.arange(size).repeat(size)
    loss = logistic(PairLogps(logp[chosen], logp[rejected]), PairLogps(logr[chosen], logr[rejected]), beta=beta)
    return (data[chosen] * before[rejected] * loss).sum()


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The distribution at which LBFGS ends."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0)


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_theorem_5_2_stationary_at_the_data(beta: float) -> None:
    """SPIN stops when the policy equals the data: only there the population loss has gradient 0.

    At θ = θ_k every margin is 0, so the gradient in the logits of a softmax is −β/2 (p_data − p_θk).
    """
    at_data = DATA.log().requires_grad_()
    (grad,) = torch.autograd.grad(population_loss(at_data, DATA, DATA, beta), at_data)
    assert float(grad.abs().max()) < 1e-15
    elsewhere = BEFORE.log().requires_grad_()
    (grad,) = torch.autograd.grad(population_loss(elsewhere, BEFORE, DATA, beta), elsewhere)
    torch.testing.assert_close(grad, -beta / 2 * (DATA - BEFORE))
    assert float(grad.abs().max()) > 0.04


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_theorem_5_4_where_an_iteration_ends(beta: float) -> None:
    """The global minimum is p_θk (p_data / p_θk)^{1/β}, normalised: β < 1 moves beyond the data, β > 1 less far."""
    expected = BEFORE * (DATA / BEFORE) ** (1 / beta)
    expected /= expected.sum()
    found = minimum(lambda logits: population_loss(logits, BEFORE, DATA, beta), BEFORE.log())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    if beta == 1.0:
        torch.testing.assert_close(found, DATA, rtol=0, atol=1e-6)
    else:
        assert float((found - DATA).abs().max()) > 0.02


def test_iterations_at_beta_above_one_approach_the_data() -> None:
    """Theorem 5.4, iterated: log p_data − log p_θk shrinks by the factor 1 − 1/β per iteration."""
    now = BEFORE
    before = (DATA.log() - now.log()).var()
    for _ in range(3):
        now = minimum(lambda logits, now=now: population_loss(logits, now, DATA, 2.0), now.log())
    after = (DATA.log() - now.log()).var()
    torch.testing.assert_close(after / before, torch.tensor(0.5**6, dtype=torch.float64), rtol=1e-3, atol=0)
