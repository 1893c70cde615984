"""The noise: its equations against a brute force, who gets which gradient, and what it does to log p̃ in the mean."""

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import linear

from dnpo.logprobs import logp_of_targets, sum_by_sequence
from dnpo.npo import FixedNoise, Noise, NoNoise, Offset, Rejected, TrainableNoise
from dnpo.objective import NoisyReference, PairLogps, Terms, logistic, two_player

Array = npt.NDArray[np.float64]

HIDDEN, VOCABULARY = 5, 11
OBJECTIVE = partial(logistic, beta=0.1)


def seeded(seed: int) -> Generator:
    """A generator of its own for every draw."""
    return Generator().manual_seed(seed)


class Problem:
    """A reference's hidden states and logits at the completion tokens of B rejected responses, and the rest of a loss.

    The lengths are unequal and one response has no token.
    """

    def __init__(self, lengths: tuple[int, ...] = (3, 1, 0, 4), seed: int = 0) -> None:
        generator = seeded(seed)
        count, tokens = len(lengths), sum(lengths)
        self.hidden_NH = torch.randn(tokens, HIDDEN, generator=generator)
        self.logits_NV = 2 * torch.randn(tokens, VOCABULARY, generator=generator)
        self.target_N = torch.randint(VOCABULARY, (tokens,), generator=generator)
        self.sequence_N = torch.arange(count).repeat_interleave(torch.tensor(lengths))
        self.clean_B = sum_by_sequence(logp_of_targets(self.logits_NV, self.target_N), self.sequence_N, count)
        numbers = torch.randn(3, count, generator=generator)
        self.policy = PairLogps(numbers[0] - 10, self.clean_B + numbers[1])
        self.reference = PairLogps(numbers[2] - 10, self.clean_B)

    def through(self, noise: Noise, seed: int) -> tuple[NoisyReference, Tensor]:
        """What training calls, with a generator seeded for this call."""
        found: tuple[NoisyReference, Tensor] = noise(self.rejected, seeded(seed))
        return found

    @property
    def rejected(self) -> Rejected:
        """The reference's side of the problem."""
        return Rejected(self.hidden_NH, self.logits_NV, self.target_N, self.sequence_N, self.clean_B)

    def terms(self, noise: Noise, seed: int, policy: PairLogps | None = None) -> Terms:
        """The three terms of the loss."""
        return two_player(OBJECTIVE, policy or self.policy, self.reference, self.through(noise, seed)[0], noise.alpha)


@pytest.fixture(scope="module")
def problem() -> Problem:
    """One problem for the module; no test changes it."""
    return Problem()


def uneven(**settings: float) -> TrainableNoise:
    """Trainable noise whose W and b are as after some training: different for every token and entry."""
    noise = TrainableNoise(HIDDEN, VOCABULARY, **settings)
    generator = seeded(7)
    with torch.no_grad():
        noise.weight_VH.copy_(0.3 * torch.randn(VOCABULARY, HIDDEN, generator=generator))
        noise.bias_V.add_(0.5 * torch.randn(VOCABULARY, generator=generator))
    return noise


def brute_variance(hidden: Array, weight: Array, bias: Array, bound: float) -> Array:
    """s² = u·m/(u + m), u = exp(2(W h + b)), entry by entry."""
    found = np.zeros((len(hidden), len(bias)))
    for n in range(len(hidden)):
        for v in range(len(bias)):
            u = math.exp(2 * (sum(weight[v, i] * hidden[n, i] for i in range(hidden.shape[1])) + bias[v]))
            found[n, v] = u * bound / (u + bound)
    return found


def brute_logps(problem: Problem, variance: Array, draw: Array) -> Array:
    """Σ_t log softmax(z_t + s_t ⊙ ε_t)[y_t] of each response, token by token in float64."""
    logits = problem.logits_NV.double().numpy()
    found = np.zeros(len(problem.clean_B))
    for n, (token, sequence) in enumerate(zip(problem.target_N.tolist(), problem.sequence_N.tolist(), strict=True)):
        z = [logits[n, v] + math.sqrt(variance[n, v]) * draw[n, v] for v in range(VOCABULARY)]
        found[sequence] += z[token] - math.log(sum(math.exp(x) for x in z))
    return found


def draws(problem: Problem, seed: int) -> tuple[Array, Array]:
    """ε and ε′: what a generator with this seed gives first, for the policy term, and second, for the noise term."""
    generator = seeded(seed)
    one, two = (torch.randn(problem.logits_NV.shape, generator=generator).double().numpy() for _ in range(2))
    return one, two


def weights_of(noise: TrainableNoise) -> tuple[Array, Array]:
    """W and b in float64."""
    return noise.weight_VH.detach().double().numpy(), noise.bias_V.detach().double().numpy()


# --- s² ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.25, 1.0, 4.0])
def test_variance_at_the_start(problem: Problem, bound: float) -> None:
    """W = 0 and b = −1, so s² = u·m/(u + m) with u = e⁻² everywhere: 0.1192 at m = 1, whatever the hidden states."""
    noise = TrainableNoise(HIDDEN, VOCABULARY, max_variance=bound)
    assert not noise.weight_VH.any()
    assert noise.weight_VH.shape == (VOCABULARY, HIDDEN)
    assert torch.equal(noise.bias_V, torch.full((VOCABULARY,), -1.0))
    u = math.exp(-2)
    expected = torch.full((len(problem.hidden_NH), VOCABULARY), u * bound / (u + bound))
    torch.testing.assert_close(noise.variance(problem.hidden_NH), expected, rtol=1e-6, atol=0)
    if bound == 1:
        assert float(noise.variance(problem.hidden_NH)[0, 0].detach()) == pytest.approx(0.1192, abs=1e-4)


@pytest.mark.parametrize("bound", [0.25, 1.0, 1e12])
def test_variance_against_brute_force(problem: Problem, bound: float) -> None:
    """log s is a standard deviation's logarithm (2 in the exponent), W multiplies h, b is added, m bounds."""
    noise = uneven(max_variance=bound)
    expected = brute_variance(problem.hidden_NH.double().numpy(), *weights_of(noise), bound)
    np.testing.assert_allclose(noise.variance(problem.hidden_NH).detach().numpy(), expected, rtol=1e-5)
    assert expected.max() > 1.5 * expected.min()


def test_variance_of_bf16_hidden_states_is_float32(problem: Problem) -> None:
    """The reference may be a bf16 model; the noise's own arithmetic is not."""
    found = uneven().variance(problem.hidden_NH.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, uneven().variance(problem.hidden_NH.bfloat16().float()))


# --- log p̃ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.25, 1.0])
def test_trainable_noise_against_brute_force(problem: Problem, bound: float) -> None:
    """Both log p̃, mean(s²) and s², with the same ε and ε′ redrawn: a fresh one for every position and entry."""
    noise = uneven(max_variance=bound)
    noisy, reported = problem.through(noise, seed=3)
    variance = brute_variance(problem.hidden_NH.double().numpy(), *weights_of(noise), bound)
    first, second = draws(problem, seed=3)
    np.testing.assert_allclose(noisy.policy_B.numpy(), brute_logps(problem, variance, first), atol=2e-5)
    np.testing.assert_allclose(noisy.noise_B.detach().numpy(), brute_logps(problem, variance, second), atol=2e-5)
    assert float(noisy.variance.detach()) == pytest.approx(float(variance.mean()), rel=1e-5)
    np.testing.assert_allclose(reported.numpy(), variance, rtol=1e-5)
    assert not reported.requires_grad


def test_fixed_noise_against_brute_force(problem: Problem) -> None:
    """0.5 is the variance, not the standard deviation, and the same everywhere."""
    noisy, reported = problem.through(FixedNoise(HIDDEN, VOCABULARY), seed=3)
    first, second = draws(problem, seed=3)
    half = np.full(problem.logits_NV.shape, 0.5)
    np.testing.assert_allclose(noisy.policy_B.numpy(), brute_logps(problem, half, first), atol=2e-5)
    np.testing.assert_allclose(noisy.noise_B.numpy(), brute_logps(problem, half, second), atol=2e-5)
    assert float(noisy.variance) == float(reported) == 0.5


@pytest.mark.parametrize("kind", [TrainableNoise, FixedNoise])
def test_the_two_terms_meet_different_noise(problem: Problem, kind: type[Noise]) -> None:
    """ε and ε′ are independent: with one shared draw the noise would be trained on what the policy just met."""
    noisy, _ = problem.through(kind(HIDDEN, VOCABULARY), seed=0)
    some = torch.tensor([0, 1, 3])
    assert bool((noisy.policy_B != noisy.noise_B)[some].all())
    many = Problem(lengths=(1,) * 4000, seed=1)
    noisy, _ = many.through(kind(HIDDEN, VOCABULARY), seed=0)
    shifts = torch.stack([noisy.policy_B, noisy.noise_B.detach()]) - many.clean_B
    assert abs(float(torch.corrcoef(shifts)[0, 1])) < 0.07  # 4.4 standard errors


def test_a_response_without_tokens_stays_at_zero(problem: Problem) -> None:
    """Response 2 of the problem is empty: there is nothing to perturb."""
    noisy, _ = problem.through(uneven(), seed=0)
    assert float(noisy.policy_B[2]) == float(noisy.noise_B[2].detach()) == 0


@pytest.mark.parametrize("kind", [TrainableNoise, FixedNoise])
def test_same_seed_same_noise(problem: Problem, kind: type[Noise]) -> None:
    """A run repeats exactly, and another seed is another run."""
    noise = kind(HIDDEN, VOCABULARY)
    one, again, other = (problem.through(noise, seed)[0] for seed in (0, 0, 1))
    some = torch.tensor([0, 1, 3])
    for name in ("policy_B", "noise_B"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert bool((getattr(one, name) != getattr(other, name))[some].all())


def test_one_generator_goes_on(problem: Problem) -> None:
    """Every call draws anew: the second call of a run does not repeat the first."""
    noise, generator = FixedNoise(HIDDEN, VOCABULARY), seeded(0)
    one, two = (noise(problem.rejected, generator)[0] for _ in range(2))
    values = [x[0].item() for x in (one.policy_B, one.noise_B, two.policy_B, two.noise_B)]
    assert len(set(values)) == 4


@pytest.mark.parametrize(
    "noise",
    [
        TrainableNoise(HIDDEN, VOCABULARY),
        FixedNoise(HIDDEN, VOCABULARY),
        NoNoise(HIDDEN, VOCABULARY),
        Offset(HIDDEN, VOCABULARY, shift=1.0),
    ],
    ids=lambda noise: type(noise).__name__,
)
def test_the_global_generator_is_left_alone(problem: Problem, noise: Noise) -> None:
    """Switching noise on must not change what dropout or anything else draws."""
    before = torch.get_rng_state()
    problem.through(noise, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_only_the_noise_gets_gradients(problem: Problem) -> None:
    """``noise_B`` and ``variance`` carry them to W and b; ``policy_B`` carries none; the reference gets none."""
    body = nn.Linear(HIDDEN, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY)
    with torch.no_grad():
        hidden_NH = body(problem.hidden_NH)
        logits_NV = head(hidden_NH)
    noise = uneven()
    noisy, _ = noise(Rejected(hidden_NH, logits_NV, problem.target_N, problem.sequence_N, problem.clean_B), seeded(0))
    assert not noisy.policy_B.requires_grad
    assert noisy.noise_B.requires_grad
    assert noisy.variance.requires_grad
    for value in (noisy.noise_B.sum(), noisy.variance):
        grads = torch.autograd.grad(value, [noise.weight_VH, noise.bias_V], retain_graph=True)
        assert all(bool((grad != 0).all()) for grad in grads)
    two_player(OBJECTIVE, problem.policy, problem.reference, noisy, noise.alpha).total.backward()
    assert all(p.grad is None for p in (*body.parameters(), *head.parameters()))
    assert hidden_NH.grad is None
    assert logits_NV.grad is None


def test_the_noise_follows_its_terms_by_finite_differences(problem: Problem) -> None:
    """dL/dφ of the total is that of −mean ℓ(margiñ; ε′) + α mean(s²), worked in float64 without autograd."""
    noise = uneven(alpha=0.3)
    noise.zero_grad()
    problem.terms(noise, seed=5).total.backward()
    assert noise.weight_VH.grad is not None
    assert noise.bias_V.grad is not None
    weight, bias = weights_of(noise)
    _, second = draws(problem, seed=5)
    hidden = problem.hidden_NH.double().numpy()
    chosen, rejected = (x.double().numpy() for x in problem.policy)
    reference = problem.reference.chosen_B.double().numpy()

    def loss(weight: Array, bias: Array) -> float:
        variance = brute_variance(hidden, weight, bias, bound=1.0)
        margin = 0.1 * ((chosen - reference) - (rejected - brute_logps(problem, variance, second)))
        return float(-np.log1p(np.exp(-margin)).mean() + 0.3 * variance.mean())

    step = 1e-5
    for v, i in [(0, 0), (3, 4), (VOCABULARY - 1, 2)]:
        moved = np.zeros_like(weight)
        moved[v, i] = step
        slope = (loss(weight + moved, bias) - loss(weight - moved, bias)) / (2 * step)
        assert float(noise.weight_VH.grad[v, i]) == pytest.approx(slope, rel=1e-3, abs=1e-7)
    for v in range(VOCABULARY):
        moved = np.zeros_like(bias)
        moved[v] = step
        slope = (loss(weight, bias + moved) - loss(weight, bias - moved)) / (2 * step)
        assert float(noise.bias_V.grad[v]) == pytest.approx(slope, rel=1e-3, abs=1e-7)


def test_the_policy_meets_the_first_draw(problem: Problem) -> None:
    """dL/dθ of the total is that of the objective against log p̃ with ε, as if it were a constant."""
    leaves = [PairLogps(*(x.clone().requires_grad_() for x in problem.policy)) for _ in range(2)]
    noise = uneven()
    problem.terms(noise, seed=5, policy=leaves[0]).total.backward()
    met = PairLogps(problem.reference.chosen_B, problem.through(noise, seed=5)[0].policy_B)
    OBJECTIVE(leaves[1], met).mean().backward()
    for ours, theirs in zip(*leaves, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert bool((ours.grad != 0).all())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


# --- limits and means -------------------------------------------------------------------------------------------------


def test_vanishing_noise_is_spin(problem: Problem) -> None:
    """s = e⁻²⁰: log p̃ is log p up to rounding, and the policy term is SPIN's loss."""
    noise = TrainableNoise(HIDDEN, VOCABULARY, start_log_std=-20.0)
    noisy, _ = problem.through(noise, seed=0)
    torch.testing.assert_close(noisy.policy_B, problem.clean_B, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(noisy.noise_B.detach(), problem.clean_B, rtol=1e-6, atol=1e-6)
    spin = OBJECTIVE(problem.policy, problem.reference).mean()
    torch.testing.assert_close(problem.terms(noise, seed=0).policy, spin, rtol=1e-6, atol=1e-6)


# Logits of one token: in no order, nearly certain of the target, nearly certain of another.
LOGITS = {
    "generic": [0.3, -1.2, 0.8, 2.1, -0.4, 0.0, 1.1],
    "sure": [6.0, 0.0, 0.5, -1.0, 0.2, -0.3, 0.1],
    "surprised": [-2.0, 4.0, 0.5, -1.0, 0.2, -0.3, 0.1],
}


def repeated(noise: Noise, logits: list[float], count: int, seed: int) -> Tensor:
    """log p̃ of the token 0 with so many independent draws."""
    logits_NV = torch.tensor(logits).repeat(count, 1)
    each = torch.arange(count)
    clean = logp_of_targets(logits_NV, torch.zeros_like(each))
    noisy: NoisyReference
    noisy, _ = noise(Rejected(torch.zeros(count, 1), logits_NV, torch.zeros_like(each), each, clean), seeded(seed))
    return noisy.policy_B.double()


@pytest.mark.parametrize("name", LOGITS)
def test_more_noise_less_confidence(name: str) -> None:
    """E log p̃(y) falls as s grows, for any logits and any y (log Σ exp is convex): why the noise narrows the margin.

    Every fall is five times the standard error of the means' difference at least.
    """
    means, errors = [], []
    for seed, log_std in enumerate([-20.0, -0.6, 0.0, 0.5, 0.9]):
        noise = TrainableNoise(1, len(LOGITS[name]), start_log_std=log_std, max_variance=1e6)
        logp = repeated(noise, LOGITS[name], 60_000, seed)
        means.append(float(logp.mean()))
        errors.append(float(logp.std()) / math.sqrt(len(logp)))
    for i in range(len(means) - 1):
        assert means[i] - means[i + 1] > 5 * math.hypot(errors[i], errors[i + 1])


@pytest.mark.parametrize("name", LOGITS)
def test_second_order_shift_at_small_noise(name: str) -> None:
    """E[log p − log p̃] = ½ Σ_v s_v² p_v (1 − p_v) to second order, with another s for every entry.

    The linear part of each draw, Σ_v s_v ε_v ([v = y] − p_v), has mean 0; without it little Monte Carlo error is left.
    """
    count, size = 100_000, len(LOGITS[name])
    noise = TrainableNoise(1, size, start_log_std=math.log(0.05))
    with torch.no_grad():
        noise.bias_V.add_(torch.linspace(-0.5, 0.5, size))
    std_V = noise.variance(torch.zeros(1, 1))[0].sqrt().detach().double()
    logits_V = torch.tensor(LOGITS[name], dtype=torch.float64)
    p_V = logits_V.softmax(0)
    onehot_V = torch.zeros_like(p_V)
    onehot_V[0] = 1
    draw_MV = torch.randn(count, size, generator=seeded(11)).double()
    linear_M = (std_V * draw_MV) @ (onehot_V - p_V)
    shift_M = logits_V.log_softmax(0)[0] - (repeated(noise, LOGITS[name], count, 11) - linear_M)
    expected = float((std_V**2 * p_V * (1 - p_V)).sum() / 2)
    error = float(shift_M.std()) / math.sqrt(count)
    assert error < 0.01 * expected
    assert float(shift_M.mean()) == pytest.approx(expected, abs=4 * error + 0.01 * expected)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger() -> Problem:
    """Enough pairs for the mean push on s to show over single draws."""
    return Problem(lengths=(6,) * 32, seed=2)


def train(noise: Noise, problem: Problem, steps: int, lr: float, *terms: str) -> None:
    """Adam on some of the terms, with noise drawn anew each step."""
    optimizer = torch.optim.Adam(noise.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        found = problem.terms(noise, seed=step)
        sum((getattr(found, term) for term in terms), torch.zeros(())).backward()
        optimizer.step()


def test_the_noise_term_pushes_up_and_alpha_down(larger: Problem) -> None:
    """The two players inside the noise: without α it would grow for ever, without −ℓ it would vanish."""
    up, down = (TrainableNoise(HIDDEN, VOCABULARY) for _ in range(2))
    train(up, larger, 40, 0.02, "noise")
    train(down, larger, 40, 0.02, "variance")
    start = 0.1192
    assert float(up.bias_V.detach().mean()) > -0.8
    assert float(up.variance(larger.hidden_NH).detach().mean()) > 1.3 * start
    assert bool((down.bias_V < -1.2).all())
    assert float(down.variance(larger.hidden_NH).detach().mean()) < 0.7 * start


def test_alpha_weighs_the_variance(larger: Problem) -> None:
    """A large α outweighs the push up: the same training ends below its start instead of above."""
    ends = []
    for alpha in (0.0, 10.0):
        noise = TrainableNoise(HIDDEN, VOCABULARY, alpha=alpha)
        train(noise, larger, 40, 0.02, "noise", "variance")
        ends.append(float(noise.variance(larger.hidden_NH).detach().mean()))
    assert ends[0] > 1.3 * 0.1192
    assert ends[1] < 0.7 * 0.1192


def test_the_bound_is_smooth() -> None:
    """s² stays below m and the way back stays open: at b = 2, where u = 54.6 m, and far beyond it.

    A hard clamp, which the text of the paper suggests, passes exactly no gradient there: the noise would stay for ever.
    """
    hidden_NH = torch.zeros(1, HIDDEN)
    for log_std in (2.0, 4.0, 6.0):
        noise = TrainableNoise(HIDDEN, VOCABULARY, start_log_std=log_std)
        variance = noise.variance(hidden_NH)
        assert bool((variance < 1).all())
        (grad_V,) = torch.autograd.grad(variance.sum(), noise.bias_V)
        # d(u m / (u + m))/db = 2 u m² / (u + m)²
        u = math.exp(2 * log_std)
        torch.testing.assert_close(grad_V, torch.full_like(grad_V, 2 * u / (u + 1) ** 2), rtol=2e-2, atol=0)

    noise = TrainableNoise(HIDDEN, VOCABULARY, start_log_std=2.0)
    clamped = (2 * linear(hidden_NH, noise.weight_VH, noise.bias_V)).exp().clamp(max=1.0)
    (grad_V,) = torch.autograd.grad(clamped.sum(), noise.bias_V)
    assert not grad_V.any()


@pytest.mark.parametrize("bound", [0.25, 1.0])
def test_the_bound_holds_for_any_weights(problem: Problem, bound: float) -> None:
    """However large log s has become: no more than m, and finite."""
    noise = TrainableNoise(HIDDEN, VOCABULARY, max_variance=bound, start_log_std=500.0)
    assert bool((noise.variance(problem.hidden_NH) <= bound).all())
    noisy, _ = problem.through(noise, seed=0)
    assert all(bool(x.isfinite().all()) for x in noisy)


def test_variance_runs_away_without_a_bound(larger: Problem) -> None:
    """Why there is a bound: noise-only training at α = 0 takes mean(s²) over 100 without one, and not to 1 with it."""
    ends = {}
    for bound in (1e12, 1.0):
        noise = TrainableNoise(HIDDEN, VOCABULARY, alpha=0.0, max_variance=bound)
        train(noise, larger, 40, 0.05, "noise", "variance")
        ends[bound] = noise.variance(larger.hidden_NH).detach()
    assert float(ends[1e12].mean()) > 100
    assert bool((ends[1.0] < 1.0).all())
    assert float(ends[1.0].mean()) > 0.5, "with the bound the same training gets close to it, not nowhere"


# --- kinds without parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "active"),
    [
        (NoNoise(HIDDEN, VOCABULARY), False),
        (FixedNoise(HIDDEN, VOCABULARY), True),
        (Offset(HIDDEN, VOCABULARY, shift=1.5), True),
    ],
    ids=["none", "fixed", "offset"],
)
def test_nothing_to_train(problem: Problem, noise: Noise, active: bool) -> None:
    """No parameters, no gradient, no weight on the variance: the policy is the only player."""
    assert not list(noise.parameters())
    assert noise.alpha == 0
    assert noise.active is active
    noisy, variance = problem.through(noise, seed=0)
    assert not any(x.requires_grad for x in (*noisy, variance))
    assert float(problem.terms(noise, seed=0).variance) == 0


def test_no_noise_is_clean(problem: Problem) -> None:
    """SPIN walks the same lines as DNPO and must lose no digit on the way; the generator is not touched either."""
    generator = seeded(0)
    noisy, variance = NoNoise(HIDDEN, VOCABULARY)(problem.rejected, generator)
    assert torch.equal(noisy.policy_B, problem.clean_B)
    assert torch.equal(noisy.noise_B, problem.clean_B)
    assert float(variance) == float(noisy.variance) == 0
    assert torch.equal(generator.get_state(), seeded(0).get_state())
    spin = OBJECTIVE(problem.policy, problem.reference).mean()
    assert torch.equal(problem.terms(NoNoise(HIDDEN, VOCABULARY), seed=0).policy, spin)


def test_fixed_noise_takes_another_variance(problem: Problem) -> None:
    """Whoever reads N(0, 0.5) as a standard deviation sets 0.25; 0 is no noise at all."""
    noisy, _ = problem.through(FixedNoise(HIDDEN, VOCABULARY, variance=0.25), seed=3)
    quarter = np.full(problem.logits_NV.shape, 0.25)
    expected = brute_logps(problem, quarter, draws(problem, seed=3)[0])
    np.testing.assert_allclose(noisy.policy_B.numpy(), expected, atol=2e-5)
    noisy, _ = problem.through(FixedNoise(HIDDEN, VOCABULARY, variance=0.0), seed=3)
    torch.testing.assert_close(noisy.policy_B, problem.clean_B)


def test_fixed_noise_has_the_variance_it_says() -> None:
    """Over two words log p̃/(1 − p̃) is z₁ − z₂ + s(ε₁ − ε₂), whose variance is 2 s² = 1 at s² = 0.5."""
    logp = repeated(FixedNoise(1, 2), [0.4, -0.3], 40_000, seed=0)
    log_odds = logp - torch.log1p(-logp.exp())
    assert float(log_odds.mean()) == pytest.approx(0.7, abs=0.02)  # 4 standard errors
    assert float(log_odds.var()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("shift", [1.5, -0.5, 0.0])
def test_offset_is_exact(problem: Problem, shift: float) -> None:
    """log p̃ is log p less the shift, and the margin that the policy meets shrinks by β · shift."""
    noise = Offset(HIDDEN, VOCABULARY, shift=shift)
    noisy, variance = problem.through(noise, seed=0)
    assert torch.equal(noisy.policy_B, problem.clean_B - shift)
    assert torch.equal(noisy.noise_B, problem.clean_B - shift)
    assert float(variance) == float(noisy.variance) == 0
    gap = (problem.policy.chosen_B - problem.reference.chosen_B) - (problem.policy.rejected_B - problem.clean_B)
    expected = torch.nn.functional.softplus(-0.1 * (gap - shift)).mean()
    torch.testing.assert_close(problem.terms(noise, seed=0).policy, expected)
