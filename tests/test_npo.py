"""The noise: its equations against brute force, its gradients, its cost, and its mean effect."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import kstest
from torch import Generator, Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dnpo.optimise import npo
from dnpo.optimise.npo import FixedModule, NoiseModule, OffsetModule, Rejected, SilentModule, TrainableModule, _Draw
from dnpo.optimise.objective import Facts, NoisyReference, PairLogps, Terms, logistic, two_player
from dnpo.optimise.parts import FixedNoise, MatchedOffset, Noise, NoNoise, Offset, TrainableNoise
from dnpo.policy import logprobs
from dnpo.policy.logprobs import Head

Array = npt.NDArray[np.float64]

HIDDEN, VOCABULARY = 5, 11
BETA = 0.1
OBJECTIVE = partial(logistic, beta=BETA)
SOME = torch.tensor([0, 1, 3])  # the responses of a problem that have tokens


def seeded(seed: int) -> Generator:
    """A separate generator for every draw."""
    return Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles, the last one smaller, and responses of more than one block of noise."""
    monkeypatch.setitem(logprobs.TILE, "cpu", 4)
    monkeypatch.setitem(npo.BLOCK, "cpu", 2)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile and long blocks, for tests with many draws."""
    monkeypatch.setitem(logprobs.TILE, "cpu", 1024)
    monkeypatch.setitem(npo.BLOCK, "cpu", 32)


class Problem:
    """A reference's hidden states and head at the completion tokens of B rejected responses, and the rest of a loss.

    The lengths are unequal and one response has no token.
    """

    def __init__(
        self,
        lengths: tuple[int, ...] = (3, 1, 0, 4),
        seed: int = 0,
        hidden: int = HIDDEN,
        vocabulary: int = VOCABULARY,
        dtype: torch.dtype = torch.float32,
        head: dict[str, Any] | None = None,
    ) -> None:
        generator = seeded(seed)
        self.lengths, count, tokens = lengths, len(lengths), sum(lengths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden_NH = normal(tokens, hidden)
        given = {"bias_V": normal(vocabulary)} | (head or {})
        self.head = Head(2 / math.sqrt(hidden) * normal(vocabulary, hidden), **given)
        self.target_N = torch.randint(vocabulary, (tokens,), generator=generator)
        self.clean_B = self.sums(self.logits_NV.log_softmax(-1).gather(1, self.target_N.unsqueeze(1)).squeeze(1))
        numbers = normal(3, count)
        self.policy = PairLogps(numbers[0] - 10, self.clean_B + numbers[1])
        self.reference = PairLogps(numbers[2] - 10, self.clean_B)

    @property
    def logits_NV(self) -> Tensor:
        """cap · tanh(scale · (h Wᵀ + b) / cap), as written."""
        head = self.head
        logits = head.scale * (self.hidden_NH @ head.weight_VH.T + (0 if head.bias_V is None else head.bias_V))
        return logits if math.isinf(head.cap) else head.cap * torch.tanh(logits / head.cap)

    def sums(self, value_N: Tensor) -> Tensor:
        """Sums of token values by response."""
        return torch.stack([part.sum() for part in torch.split(value_N, self.lengths)])

    def rejected(self, seed: int) -> Rejected:
        """The reference's side of the problem, with seeds for its responses."""
        seeds = [1000 * seed + i for i in range(len(self.lengths))]
        return Rejected(self.hidden_NH, self.head, self.target_N, self.lengths, seeds)

    def through(self, noise: NoiseModule, seed: int) -> tuple[NoisyReference, Tensor]:
        """The call of training."""
        found: tuple[NoisyReference, Tensor] = noise(self.clean_B, self.rejected(seed))
        return found

    @property
    def facts(self) -> Facts:
        """Hard labels of weight 1."""
        hard_B = torch.ones(len(self.lengths), dtype=self.clean_B.dtype)
        return Facts(hard_B, hard_B, torch.zeros_like(hard_B), hard_B, hard_B)

    def terms(self, noise: NoiseModule, seed: int, policy: PairLogps | None = None) -> Terms:
        """The three terms of the loss."""
        noisy = self.through(noise, seed)[0]
        return two_player(OBJECTIVE, policy or self.policy, self.reference, noisy, self.facts, noise.alpha, beta=BETA)

    def draws(self, seed: int) -> tuple[Tensor, Tensor]:
        """ε and ε′ ~ N(0, 1) as the module draws them, for all entries."""
        one, other = (drawn(self.rejected(seed), self.hidden_NH, len(self.head.weight_VH), term) for term in (0, 1))
        return one, other


def drawn(rejected: Rejected, like: Tensor, vocabulary: int, term: int, std: float = 1.0) -> Tensor:
    """The noise of one term, put together from tiles."""
    draw, size = _Draw(rejected, std), logprobs.TILE["cpu"]
    found = [
        draw(like.new_empty(len(like), min(first + size, vocabulary) - first), first, term)
        for first in range(0, vocabulary, size)
    ]
    return torch.cat(found, 1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    """One problem for all tests of the module; no test changes it."""
    return Problem()


def uneven(dtype: torch.dtype = torch.float32, **settings: float) -> TrainableModule:
    """Trainable noise with W and b as after some training: different for every token and entry."""
    noise = TrainableModule(HIDDEN, VOCABULARY, **settings).to(dtype)
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


def brute_logps(problem: Problem, variance: Array, draw: Tensor) -> Array:
    """Σ_t log softmax(z_t + s_t ⊙ ε_t)[y_t] of each response, token by token in float64."""
    logits, epsilon = problem.logits_NV.double().numpy(), draw.double().numpy()
    found = np.zeros(len(problem.lengths))
    sequences = np.repeat(np.arange(len(problem.lengths)), problem.lengths)
    for n, (token, sequence) in enumerate(zip(problem.target_N.tolist(), sequences, strict=True)):
        z = [logits[n, v] + math.sqrt(variance[n, v]) * epsilon[n, v] for v in range(logits.shape[1])]
        found[sequence] += z[token] - math.log(sum(math.exp(x) for x in z))
    return found


def weights_of(noise: TrainableModule) -> tuple[Array, Array]:
    """W and b in float64."""
    return noise.weight_VH.detach().double().numpy(), noise.bias_V.detach().double().numpy()


# --- s² ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.25, 1.0, 4.0])
def test_variance_at_the_start(problem: Problem, bound: float) -> None:
    """W = 0 and b = −1, so s² = u·m/(u + m) with u = e⁻² everywhere: 0.1192 at m = 1, whatever the hidden states."""
    noise = TrainableModule(HIDDEN, VOCABULARY, max_variance=bound)
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
    """log s is the log of a standard deviation (hence 2 in the exponent), W multiplies h, b is added, m is the
    bound."""
    noise = uneven(max_variance=bound)
    expected = brute_variance(problem.hidden_NH.double().numpy(), *weights_of(noise), bound)
    np.testing.assert_allclose(noise.variance(problem.hidden_NH).detach().numpy(), expected, rtol=1e-5)
    assert expected.max() > 1.5 * expected.min()


def test_variance_of_bf16_hidden_states_is_float32(problem: Problem) -> None:
    """The reference may be a bf16 model; the noise is computed in float32."""
    found = uneven().variance(problem.hidden_NH.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, uneven().variance(problem.hidden_NH.bfloat16().float()))


# --- log p̃ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.25, 1.0, 4.0])
def test_trainable_noise_against_brute_force(problem: Problem, bound: float) -> None:
    """Both log p̃ and mean(s²), entry by entry with the same ε and ε′, which differ for every position and entry."""
    noise = uneven(max_variance=bound)
    noisy, _ = problem.through(noise, seed=3)
    variance = brute_variance(problem.hidden_NH.double().numpy(), *weights_of(noise), bound)
    first, second = problem.draws(seed=3)
    np.testing.assert_allclose(noisy.policy_B.numpy(), brute_logps(problem, variance, first), atol=2e-5)
    np.testing.assert_allclose(noisy.noise_B.detach().numpy(), brute_logps(problem, variance, second), atol=2e-5)
    assert float(noisy.variance.detach()) == pytest.approx(float(variance.mean()), rel=1e-5)


def test_fixed_noise_against_brute_force(problem: Problem) -> None:
    """0.5 is the variance, not the standard deviation, and the same everywhere."""
    noisy, at_bound = problem.through(FixedModule(variance=0.5), seed=3)
    first, second = problem.draws(seed=3)
    half = np.full(problem.logits_NV.shape, 0.5)
    np.testing.assert_allclose(noisy.policy_B.numpy(), brute_logps(problem, half, first), atol=2e-5)
    np.testing.assert_allclose(noisy.noise_B.numpy(), brute_logps(problem, half, second), atol=2e-5)
    assert float(noisy.variance) == 0.5
    assert float(at_bound) == 0


@pytest.mark.parametrize("log_std", [-1.0, 1.0, 2.0])
def test_at_bound_counts_entries_over_nine_tenths_of_the_bound(problem: Problem, log_std: float) -> None:
    """Compared with the brute force's count of entries: here none, some and most of them."""
    noise = uneven(max_variance=2.0, start_log_std=log_std)
    _, at_bound = problem.through(noise, seed=0)
    variance = brute_variance(problem.hidden_NH.double().numpy(), *weights_of(noise), 2.0)
    share = float((variance > 0.9 * 2.0).mean())
    assert float(at_bound) == pytest.approx(share, abs=1e-9)
    assert not at_bound.requires_grad
    assert {-1.0: share == 0, 1.0: 0.1 < share < 0.5, 2.0: 0.5 < share < 0.95}[log_std], share


def test_a_response_without_tokens_stays_at_zero(problem: Problem) -> None:
    """Response 2 of the problem is empty: there is nothing to perturb."""
    for noise in (uneven(), FixedModule(variance=0.5)):
        noisy, _ = problem.through(noise, seed=0)
        assert float(noisy.policy_B[2]) == float(noisy.noise_B[2].detach()) == 0


def test_a_batch_without_any_token() -> None:
    """A micro-batch whose rejected responses are all empty has the value 0 and no NaN in any gradient."""
    problem, noise = Problem(lengths=(0, 0)), uneven()
    noisy, at_bound = problem.through(noise, seed=0)
    assert noisy.policy_B.tolist() == noisy.noise_B.tolist() == [0, 0]
    assert float(noisy.variance.detach()) == float(at_bound) == 0
    (noisy.noise_B.sum() + noisy.variance).backward()
    for p in noise.parameters():
        assert p.grad is not None
        assert not p.grad.any()


# --- the one function behind it, against naive autograd in float64 ----------------------------------------------------


class Naive(NamedTuple):
    """Trainable noise on whole N × V matrices with autograd."""

    policy_B: Tensor
    noise_B: Tensor
    variance: Tensor


def naive(problem: Problem, weight_VH: Tensor, bias_V: Tensor, bound: float, seed: int) -> Naive:
    """log s = W h + b; s² = u·m/(u + m); log softmax(z + s ⊙ ε)[y], summed by response; mean(s²)."""
    u_NV = (2 * (problem.hidden_NH @ weight_VH.T + bias_V)).exp()
    variance_NV = u_NV * bound / (u_NV + bound)
    logps = []
    for epsilon_NV in problem.draws(seed):
        noisy_NV = problem.logits_NV + variance_NV.sqrt() * epsilon_NV
        logps.append(problem.sums(noisy_NV.log_softmax(-1).gather(1, problem.target_N.unsqueeze(1)).squeeze(1)))
    return Naive(*logps, variance_NV.mean())


def agree(
    problem: Problem, noise: TrainableModule, seed: int, rtol: float = 1e-12, atol: float = 1e-12
) -> list[Tensor]:
    """Compare values and, for random upstream gradients, the gradients of W and b; return the module's gradients."""
    noisy, _ = problem.through(noise, seed)
    slow = naive(problem, noise.weight_VH, noise.bias_V, noise.max_variance, seed)
    for ours, theirs in zip(noisy, slow, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=rtol, atol=atol)
    push_B = torch.randn(len(problem.lengths), generator=seeded(5), dtype=torch.float64)
    found = []
    for alpha in (0.0, 0.7):
        for through in (noisy, slow):
            loss = (through.noise_B * push_B).sum() + alpha * through.variance
            found.append(torch.autograd.grad(loss, [noise.weight_VH, noise.bias_V], retain_graph=True))
        for ours, theirs in zip(found[-2], found[-1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
            assert bool(ours.isfinite().all())
    return [*found[0], *found[2]]


HEADS: dict[str, dict[str, Any]] = {
    "plain": {"bias_V": None},
    "bias": {},
    "scale": {"scale": 0.4},
    "cap": {"cap": 1.5},
    "all": {"scale": 1.7, "cap": 2.5},
}
# Bytes of KEPT: nothing, the first tile's two tensors of 8 tokens × 4 entries in float64 (a byte short, and not), all.
ROOM = {"none": 0, "one short": 2 * 8 * 4 * 8 - 1, "one": 2 * 8 * 4 * 8, "all": 2**20}


@pytest.mark.parametrize("room", ROOM.values(), ids=ROOM)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_values_and_gradients_equal_naive_autograd(
    head: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several tiles, some kept and some recomputed, with the head of every model family."""
    monkeypatch.setitem(npo.KEPT, "cpu", room)
    agree(Problem(dtype=torch.float64, head=head), uneven(torch.float64), seed=1)


@pytest.mark.parametrize("size", [1, 3, 11, 64])
@pytest.mark.parametrize("lengths", [(1,), (0, 7), (2, 2, 2), (5, 0, 0, 1, 9)], ids=str)
def test_tiles_and_lengths_make_no_difference(
    lengths: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of one entry, of a size that does not divide the vocabulary, of the whole vocabulary, and larger."""
    monkeypatch.setitem(logprobs.TILE, "cpu", size)
    monkeypatch.setitem(npo.KEPT, "cpu", 300)
    agree(Problem(lengths=lengths, seed=4, dtype=torch.float64), uneven(torch.float64), seed=2)


@pytest.mark.parametrize("room", [0, 2**20])
@pytest.mark.parametrize("bound", [0.25, 1.0, 4.0])
def test_every_bound_agrees_with_naive_autograd(bound: float, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """m enters the exponent, the draw's standard deviation, the mean and its gradient."""
    monkeypatch.setitem(npo.KEPT, "cpu", room)
    noise = uneven(torch.float64, max_variance=bound, start_log_std=0.3)
    agree(Problem(dtype=torch.float64), noise, seed=1)


@pytest.mark.parametrize("room", [0, 2**20])
@pytest.mark.parametrize("log_std", [-40.0, -20.0, 20.0, 40.0])
def test_extreme_weights_stay_finite_and_can_come_back(
    log_std: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """u between e⁻⁸⁰ and e⁸⁰: no NaN in float64 nor float32, and never a gradient of exactly 0 in b."""
    monkeypatch.setitem(npo.KEPT, "cpu", room)
    # Beyond e³⁷ s² equals m in float64; then autograd's gradient of u·m/(u + m) is 0, but the module's is exact.
    found = agree(Problem(dtype=torch.float64), uneven(torch.float64, start_log_std=log_std), seed=1)
    assert all(bool((grad != 0).all()) for grad in found)
    problem, noise = Problem(), uneven(alpha=1.0, start_log_std=log_std)
    noisy, _ = problem.through(noise, seed=1)
    assert all(bool(x.isfinite().all()) for x in noisy)
    (grad_V,) = torch.autograd.grad(noisy.variance, [noise.bias_V], retain_graph=True)
    assert bool((grad_V > 0).all()), "α pushes s down from wherever it is"
    (grad_V,) = torch.autograd.grad(noisy.noise_B.sum(), [noise.bias_V])
    assert bool((grad_V != 0).all())
    assert bool(grad_V.isfinite().all())


def test_block_sizes_of_products_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's log-probabilities are computed in blocks of tokens; noise does not depend on the block size."""
    found = []
    for rows in (8192, 3):
        monkeypatch.setattr(logprobs, "ROWS", rows)
        noise = uneven()
        noisy, _ = Problem().through(noise, seed=0)
        noisy.noise_B.sum().backward()
        found.append([noisy.policy_B, noisy.noise_B.detach(), noise.weight_VH.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_products_per_entry_and_token(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products for each kept tile and five for each recomputed tile, of 2 H operations per entry."""
    tokens, hidden, size = 16, 24, 8
    monkeypatch.setitem(logprobs.TILE, "cpu", size)
    monkeypatch.setitem(npo.KEPT, "cpu", kept * 2 * tokens * size * 4)
    problem = Problem(lengths=(tokens,), hidden=hidden, vocabulary=3 * size)
    noise = TrainableModule(hidden, 3 * size)
    with FlopCounterMode(display=False) as forward:
        noisy, _ = problem.through(noise, seed=0)
    with FlopCounterMode(display=False) as backward:
        (noisy.noise_B.sum() + noisy.variance).backward()
    one = 2 * hidden * size * tokens  # one product of a tile
    assert forward.get_total_flops() == 3 * 2 * one
    assert backward.get_total_flops() == kept * one + (3 - kept) * 3 * one


class Memory(TorchDispatchMode):
    """The largest tensor, and the greatest number of bytes held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.held = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(x)}
        for x in torch.utils._pytree.tree_leaves(found):
            if _is_tensor(x) and x.untyped_storage()._cdata not in given:
                storage = x.untyped_storage()
                size = storage.nbytes()
                self.largest, self.held = max(self.largest, size), self.held + size
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self.free, size)
        return found

    def free(self, size: int) -> None:
        """A tensor was freed."""
        self.held -= size


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def memory(problem: Problem, noise: TrainableModule) -> Memory:
    """Of a forward and a backward pass."""
    with Memory() as found:
        noisy, _ = problem.through(noise, seed=0)
        (noisy.noise_B.sum() + noisy.variance).backward()
    return found


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no tile is kept: tiles and vectors over tokens or entries, but no tensor of N × V."""
    tokens, hidden, size = 256, 4, 64
    monkeypatch.setitem(logprobs.TILE, "cpu", size)
    monkeypatch.setitem(npo.BLOCK, "cpu", 32)
    tile, most = tokens * size * 4, []
    for vocabulary in (16 * size, 64 * size):
        problem, noise = Problem((tokens,), hidden=hidden, vocabulary=vocabulary), TrainableModule(hidden, vocabulary)
        weights = 3 * (hidden + 1) * vocabulary * 4  # the gradients of W and b, and W and b as the products take them
        monkeypatch.setitem(npo.KEPT, "cpu", 0)
        found = memory(problem, noise)
        assert found.largest <= max(tile, weights / 3)
        assert found.most <= 8 * tile + weights
        most.append(found.most - weights)
        monkeypatch.setitem(npo.KEPT, "cpu", 2**30)
        assert memory(problem, noise).most >= 2 * tokens * vocabulary * 4, "what is counted here is what there is"
    assert most[1] <= 1.1 * most[0]


def test_no_more_is_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward, only the tiles that fit in ``KEPT`` are stored, as two tensors each."""
    tokens, size, tiles = 256, 64, 16
    monkeypatch.setitem(logprobs.TILE, "cpu", size)
    problem, noise = Problem((tokens,), vocabulary=tiles * size), TrainableModule(HIDDEN, tiles * size)
    tile, held = 2 * tokens * size * 4, []
    for kept in (0, 3, 100):
        monkeypatch.setitem(npo.KEPT, "cpu", kept * tile)
        with Memory() as found:
            noisy, _ = problem.through(noise, seed=0)
        held.append(found.held)
        del noisy
    assert held[1] - held[0] == pytest.approx(3 * tile, rel=0.05)
    assert held[2] - held[0] == pytest.approx(tiles * tile, rel=0.05)


# --- ε ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [TrainableNoise(), FixedNoise()], ids=["trainable", "fixed"])
@pytest.mark.usefixtures("whole")
def test_the_two_terms_use_different_noise(problem: Problem, part: Noise) -> None:
    """ε and ε′ are independent: with one shared draw the noise would be trained on the policy's own draw."""
    noisy, _ = problem.through(part.module(HIDDEN, VOCABULARY), seed=0)
    assert bool((noisy.policy_B != noisy.noise_B)[SOME].all())
    many = Problem(lengths=(1,) * 4000, seed=1)
    noisy, _ = many.through(part.module(HIDDEN, VOCABULARY), seed=0)
    shifts = torch.stack([noisy.policy_B, noisy.noise_B.detach()]) - many.clean_B
    assert abs(float(torch.corrcoef(shifts)[0, 1])) < 0.07  # 4.4 standard errors


@pytest.mark.parametrize("part", [TrainableNoise(), FixedNoise()], ids=["trainable", "fixed"])
def test_same_seed_same_noise(problem: Problem, part: Noise) -> None:
    """Equal seeds give equal noise, and other seeds give other noise."""
    noise = part.module(HIDDEN, VOCABULARY)
    one, again, other = (problem.through(noise, seed)[0] for seed in (0, 0, 1))
    for name in ("policy_B", "noise_B"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert bool((getattr(one, name) != getattr(other, name))[SOME].all())


@pytest.mark.parametrize("room", ROOM.values(), ids=ROOM)
def test_gradients_repeat_bit_for_bit(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept tiles change them only by rounding, since the same ε is drawn again for the other tiles."""
    found = []
    for bytes_ in (room, room, 2**20):
        monkeypatch.setitem(npo.KEPT, "cpu", bytes_)
        noise = uneven(torch.float64)
        noisy, _ = Problem(dtype=torch.float64).through(noise, seed=2)
        noisy.noise_B.sum().backward()
        assert noise.weight_VH.grad is not None
        found.append((noisy.policy_B, noisy.noise_B.detach(), noise.weight_VH.grad))
    for one, again, kept in zip(*found, strict=True):
        assert torch.equal(one, again)
        torch.testing.assert_close(one, kept, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[0][0], found[2][0])


LENGTHS = (70, 1, 0, 33, 64)  # of tokens, with blocks of 32


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and blocks as in a real run, on a smaller scale."""
    monkeypatch.setitem(logprobs.TILE, "cpu", 40)
    monkeypatch.setitem(npo.BLOCK, "cpu", 32)


def epsilon(lengths: Sequence[int], seeds: Sequence[int], term: int, vocabulary: int = 100, std: float = 1.0) -> Tensor:
    """The noise of responses with these lengths and seeds."""
    states = torch.zeros(sum(lengths), 1)
    rejected = Rejected(states, Head(torch.zeros(vocabulary, 1)), torch.zeros(len(states)).long(), lengths, seeds)
    return drawn(rejected, states, vocabulary, term, std)


@pytest.mark.usefixtures("blocks")
def test_noise_belongs_to_a_response_and_not_to_its_batch() -> None:
    """A response gets the same ε alone, in another order, or with others, so micro-batches do not matter."""
    seeds = [11, 12, 13, 14, 15]
    together = torch.split(epsilon(LENGTHS, seeds, 0), LENGTHS)
    backwards = torch.split(epsilon(LENGTHS[::-1], seeds[::-1], 0), LENGTHS[::-1])[::-1]
    for i, (length, seed) in enumerate(zip(LENGTHS, seeds, strict=True)):
        assert torch.equal(together[i], epsilon([length], [seed], 0))
        assert torch.equal(together[i], backwards[i])


@pytest.mark.usefixtures("blocks")
def test_every_number_of_the_noise_is_drawn_separately() -> None:
    """No number repeats: not in another token, block, tile, response, step (another seed) or term."""
    numbers = torch.cat([epsilon(LENGTHS, seeds, term) for seeds in (range(5), range(5, 10)) for term in (0, 1)])
    # Among n float32 numbers some are equal by chance: about n²/2 · 2⁻²⁴ · 0.3.
    assert len(numbers.unique()) > 0.97 * numbers.numel()
    rows = numbers[:, :40].double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    likeness = (rows @ rows.T).fill_diagonal_(0).abs()
    assert float(likeness.max()) < 0.85, "some row comes again"


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("std", [1.0, 0.5, 2.0])
def test_noise_is_normal_with_the_given_standard_deviation(std: float) -> None:
    """Moments, and the whole distribution by Kolmogorov and Smirnov, over a hundred thousand numbers."""
    numbers = epsilon(LENGTHS * 6, range(30), 1, std=std).double().flatten().numpy() / std
    root = math.sqrt(len(numbers))
    assert len(numbers) > 1e5
    assert abs(numbers.mean()) < 4 / root
    assert abs(numbers.std() - 1) < 4 / root / math.sqrt(2)
    assert abs((numbers**3).mean()) < 4 * math.sqrt(15) / root
    assert abs((numbers**4).mean() - 3) < 4 * math.sqrt(96) / root
    assert kstest(numbers, "norm").pvalue > 1e-3


@pytest.mark.usefixtures("blocks")
def test_draws_of_different_terms_seeds_blocks_and_tiles_are_uncorrelated() -> None:
    """Correlations between numbers at the same place: within four standard errors of 0."""
    one, other = (epsilon((64,) * 20, range(20), term).double() for term in (0, 1))
    seeded_otherwise = epsilon((64,) * 20, range(100, 120), 0).double()
    pairs = {
        "terms": (one, other),
        "seeds": (one, seeded_otherwise),
        "responses": (one[:640], one[640:]),
        "tiles": (one[:, :40], one[:, 40:80]),
        "blocks": (one.view(20, 2, 32, 100)[:, 0], one.view(20, 2, 32, 100)[:, 1]),
        "tokens": (one[:-1], one[1:]),
    }
    for name, (a, b) in pairs.items():
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(a.numel()), name


@pytest.mark.parametrize(
    "noise",
    [
        TrainableModule(HIDDEN, VOCABULARY),
        FixedModule(variance=0.5),
        SilentModule(),
        OffsetModule(shift=1.0),
    ],
    ids=lambda noise: type(noise).__name__,
)
def test_the_global_generator_is_left_alone(problem: Problem, noise: NoiseModule) -> None:
    """Noise must not change other random draws, such as dropout's."""
    before = torch.get_rng_state()
    noisy, _ = problem.through(noise, seed=0)
    if noisy.noise_B.requires_grad:
        noisy.noise_B.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


# --- half precision ---------------------------------------------------------------------------------------------------


def halved(problem: Problem) -> Problem:
    """The same reference in bf16."""
    other = Problem()
    other.hidden_NH = problem.hidden_NH.bfloat16()
    other.head = replace(
        problem.head,
        weight_VH=problem.head.weight_VH.bfloat16(),
        bias_V=None if problem.head.bias_V is None else problem.head.bias_V.bfloat16(),
    )
    return other


def gradients(problem: Problem, noise: TrainableModule) -> tuple[NoisyReference, list[Tensor]]:
    """The outputs, and the gradients of the noise term and of α · mean(s²)."""
    noisy, _ = problem.through(noise, seed=1)
    noise.zero_grad()
    (noisy.noise_B.sum() + 10 * noisy.variance).backward()
    assert noise.weight_VH.grad is not None
    assert noise.bias_V.grad is not None
    return noisy, [noise.weight_VH.grad, noise.bias_V.grad]


@pytest.mark.parametrize("room", [0, 2**20])
@pytest.mark.parametrize("way", ["bf16 weights", "autocast"])
def test_half_precision_stays_close(problem: Problem, way: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bf16, sums, softmax and the noise's own weights and gradients in float32; the same ε throughout."""
    monkeypatch.setitem(npo.KEPT, "cpu", room)
    noise = uneven()
    exact, exact_grads = gradients(problem, noise)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        half, half_grads = gradients(halved(problem) if way == "bf16 weights" else problem, noise)
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0.02, atol=0.1)
        assert not torch.equal(ours.detach(), theirs.detach()), "nothing was done in bf16"
    for ours, theirs in zip(half_grads, exact_grads, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm()) < 0.02 * float(theirs.norm())


@pytest.mark.parametrize("way", ["bf16 weights", "autocast"])
def test_sums_are_float32_under_half_precision(way: str) -> None:
    """mean(s²) is a sum over very many entries: from the same bf16 products it is as exact as a float32 sum."""
    problem = Problem((40, 50), seed=3, vocabulary=200)
    if way == "bf16 weights":
        problem.hidden_NH = problem.hidden_NH.bfloat16()
        problem.head = replace(problem.head, weight_VH=problem.head.weight_VH.bfloat16())
    noise = TrainableModule(HIDDEN, 200, start_log_std=0.3)
    with torch.no_grad():
        noise.weight_VH.copy_(0.3 * torch.randn(200, HIDDEN, generator=seeded(1)))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        noisy, _ = problem.through(noise, seed=0)
    product_NV = (problem.hidden_NH.bfloat16() * 2) @ noise.weight_VH.detach().bfloat16().T  # rounded to bf16
    u_NV = (product_NV.double() + 2 * noise.bias_V.detach().double()).exp()
    expected = float((u_NV / (u_NV + 1)).mean())
    assert float(noisy.variance.detach()) == pytest.approx(expected, rel=2e-5)


# --- gradients --------------------------------------------------------------------------------------------------------


def test_only_the_noise_gets_gradients(problem: Problem) -> None:
    """``noise_B`` and ``variance`` have gradients in W and b, and ``policy_B`` has none; the reference gets none."""
    body = nn.Linear(HIDDEN, HIDDEN)
    head = nn.Linear(HIDDEN, VOCABULARY)
    with torch.no_grad():
        hidden_NH = body(problem.hidden_NH)
    noise = uneven()
    rejected = problem.rejected(0)._replace(hidden_NH=hidden_NH, head=Head(head.weight, head.bias))
    noisy, _ = noise(problem.clean_B, rejected)
    assert not noisy.policy_B.requires_grad
    assert noisy.noise_B.requires_grad
    assert noisy.variance.requires_grad
    for value in (noisy.noise_B.sum(), noisy.variance):
        grads = torch.autograd.grad(value, [noise.weight_VH, noise.bias_V], retain_graph=True)
        assert all(bool((grad != 0).all()) for grad in grads)
    terms = two_player(OBJECTIVE, problem.policy, problem.reference, noisy, problem.facts, noise.alpha, beta=BETA)
    terms.total.backward()
    assert all(p.grad is None for p in (*body.parameters(), *head.parameters()))
    assert hidden_NH.grad is None


@pytest.mark.parametrize("room", [0, 2**20])
def test_the_gradient_of_the_noise_by_finite_differences(
    problem: Problem, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dL/dφ of the total is that of −mean ℓ(margiñ; ε′) + α mean(s²), derived by hand in float64."""
    monkeypatch.setitem(npo.KEPT, "cpu", room)
    noise = uneven(alpha=0.3)
    noise.zero_grad()
    problem.terms(noise, seed=5).total.backward()
    assert noise.weight_VH.grad is not None
    assert noise.bias_V.grad is not None
    weight, bias = weights_of(noise)
    _, second = problem.draws(seed=5)
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


def test_the_gradient_of_the_policy_uses_the_first_draw(problem: Problem) -> None:
    """dL/dθ of the total is that of the objective against log p̃ with ε, taken as a constant."""
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
    noise = TrainableModule(HIDDEN, VOCABULARY, start_log_std=-20.0)
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


def repeated(noise: NoiseModule, logits: list[float], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """log p̃ of token 0 for many independent draws, and ε; the noise has bound 1."""
    head = Head(torch.zeros(len(logits), 1), torch.tensor(logits))
    hidden_NH, target_N = torch.zeros(count, 1), torch.zeros(count, dtype=torch.long)
    rejected = Rejected(hidden_NH, head, target_N, [100] * (count // 100), range(seed * count, (seed + 1) * count, 100))
    found: list[Tensor] = []

    class Every(npo.Tally):
        def logps(self) -> tuple[Tensor, Tensor]:
            found.append(super().logps()[0])
            return super().logps()

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(npo, "Tally", Every)
        noise(torch.zeros(count // 100), rejected)
    return found[0].double(), drawn(rejected, hidden_NH, len(logits), 0).double()


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.usefixtures("whole")
def test_more_noise_lowers_confidence(name: str) -> None:
    """E log p̃(y) falls as s grows, for any logits and any y (log Σ exp is convex): why the noise narrows the margin.

    Every decrease is at least five standard errors of the difference of means.
    """
    means, errors = [], []
    for seed, log_std in enumerate([-20.0, -0.6, 0.0, 0.5, 0.9]):
        noise = TrainableModule(1, len(LOGITS[name]), start_log_std=log_std, max_variance=1e6)
        logp, _ = repeated(noise, LOGITS[name], 60_000, seed)
        means.append(float(logp.mean()))
        errors.append(float(logp.std()) / math.sqrt(len(logp)))
    for i in range(len(means) - 1):
        assert means[i] - means[i + 1] > 5 * math.hypot(errors[i], errors[i + 1])


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.usefixtures("whole")
def test_second_order_shift_at_small_noise(name: str) -> None:
    """E[log p − log p̃] = ½ Σ_v s_v² p_v (1 − p_v) to second order, with a different s for every entry.

    The linear part of each draw, Σ_v s_v ε_v ([v = y] − p_v), has mean 0; without it little Monte Carlo error is left.
    """
    count, size = 100_000, len(LOGITS[name])
    noise = TrainableModule(1, size, start_log_std=math.log(0.05))
    with torch.no_grad():
        noise.bias_V.add_(torch.linspace(-0.5, 0.5, size))
    std_V = noise.variance(torch.zeros(1, 1))[0].sqrt().detach().double()
    logits_V = torch.tensor(LOGITS[name], dtype=torch.float64)
    p_V = logits_V.softmax(0)
    onehot_V = torch.zeros_like(p_V)
    onehot_V[0] = 1
    logp_M, draw_MV = repeated(noise, LOGITS[name], count, 11)
    linear_M = (std_V * draw_MV) @ (onehot_V - p_V)
    shift_M = logits_V.log_softmax(0)[0] - (logp_M - linear_M)
    expected = float((std_V**2 * p_V * (1 - p_V)).sum() / 2)
    error = float(shift_M.std()) / math.sqrt(count)
    assert error < 0.01 * expected
    assert float(shift_M.mean()) == pytest.approx(expected, abs=4 * error + 0.01 * expected)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger() -> Problem:
    """Enough pairs that the mean gradient of s exceeds the variation of single draws."""
    return Problem(lengths=(6,) * 32, seed=2)


def train(noise: NoiseModule, problem: Problem, steps: int, lr: float, *terms: str) -> None:
    """Adam on some of the terms, with noise drawn anew each step."""
    optimizer = torch.optim.Adam(noise.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        found = problem.terms(noise, seed=step)
        sum((getattr(found, term) for term in terms), torch.zeros(())).backward()
        optimizer.step()


@pytest.mark.usefixtures("whole")
def test_the_noise_term_raises_the_noise_and_alpha_lowers_it(larger: Problem) -> None:
    """Without α the noise would grow without limit; without −ℓ it would vanish."""
    up, down = (TrainableModule(HIDDEN, VOCABULARY) for _ in range(2))
    train(up, larger, 40, 0.02, "noise")
    train(down, larger, 40, 0.02, "variance")
    start = 0.1192
    assert float(up.bias_V.detach().mean()) > -0.8
    assert float(up.variance(larger.hidden_NH).detach().mean()) > 1.3 * start
    assert bool((down.bias_V < -1.2).all())
    assert float(down.variance(larger.hidden_NH).detach().mean()) < 0.7 * start


@pytest.mark.usefixtures("whole")
def test_alpha_weights_the_variance(larger: Problem) -> None:
    """A large α exceeds the other term: the same training ends below its start instead of above."""
    ends = []
    for alpha in (0.0, 10.0):
        noise = TrainableModule(HIDDEN, VOCABULARY, alpha=alpha)
        train(noise, larger, 40, 0.02, "noise", "variance")
        ends.append(float(noise.variance(larger.hidden_NH).detach().mean()))
    assert ends[0] > 1.3 * 0.1192
    assert ends[1] < 0.7 * 0.1192


def test_the_bound_is_smooth(problem: Problem) -> None:
    """s² stays below m and can still decrease: at b = 2, where u = 54.6 m, and far beyond it.

    A hard clamp, which the text of the paper suggests, has gradient 0 there: the noise would never change again.
    """
    hidden_NH = torch.zeros(1, HIDDEN)
    for log_std in (2.0, 4.0, 6.0):
        noise = TrainableModule(HIDDEN, VOCABULARY, start_log_std=log_std)
        variance = noise.variance(hidden_NH)
        assert bool((variance < 1).all())
        (grad_V,) = torch.autograd.grad(variance.sum(), noise.bias_V)
        # d(u m / (u + m))/db = 2 u m² / (u + m)²
        u = math.exp(2 * log_std)
        torch.testing.assert_close(grad_V, torch.full_like(grad_V, 2 * u / (u + 1) ** 2), rtol=2e-2, atol=0)
        # And so in training, on the mean over the problem's entries.
        (grad_V,) = torch.autograd.grad(problem.through(noise, seed=0)[0].variance, noise.bias_V)
        torch.testing.assert_close(
            grad_V * VOCABULARY, torch.full_like(grad_V, 2 * u / (u + 1) ** 2), rtol=1e-5, atol=0
        )

    noise = TrainableModule(HIDDEN, VOCABULARY, start_log_std=2.0)
    clamped = (2 * linear(hidden_NH, noise.weight_VH, noise.bias_V)).exp().clamp(max=1.0)
    (grad_V,) = torch.autograd.grad(clamped.sum(), noise.bias_V)
    assert not grad_V.any()


@pytest.mark.parametrize("bound", [0.25, 1.0])
def test_the_bound_holds_for_any_weights(problem: Problem, bound: float) -> None:
    """For any log s, at most m and finite."""
    noise = TrainableModule(HIDDEN, VOCABULARY, max_variance=bound, start_log_std=500.0)
    assert bool((noise.variance(problem.hidden_NH) <= bound).all())
    noisy, at_bound = problem.through(noise, seed=0)
    assert all(bool(x.isfinite().all()) for x in noisy)
    assert float(noisy.variance.detach()) == pytest.approx(bound)
    assert float(at_bound) == 1


@pytest.mark.usefixtures("whole")
def test_variance_runs_away_without_a_bound(larger: Problem) -> None:
    """The reason for a bound: noise training at α = 0 raises mean(s²) over 100 without it, but not to 1 with it."""
    ends = {}
    for bound in (1e12, 1.0):
        noise = TrainableModule(HIDDEN, VOCABULARY, alpha=0.0, max_variance=bound)
        train(noise, larger, 40, 0.05, "noise", "variance")
        ends[bound] = noise.variance(larger.hidden_NH).detach()
    assert float(ends[1e12].mean()) > 100
    assert bool((ends[1.0] < 1.0).all())
    assert float(ends[1.0].mean()) > 0.5, "with the bound the same training gets close to it, not nowhere"


# --- kinds without parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "active", "reads"),
    [
        (SilentModule(), False, False),
        (FixedModule(variance=0.5), True, True),
        (OffsetModule(shift=1.5), True, False),
    ],
    ids=["none", "fixed", "offset"],
)
def test_noise_without_parameters(problem: Problem, noise: NoiseModule, active: bool, reads: bool) -> None:
    """No parameters, no gradient, no weight on the variance: the policy is the only player."""
    assert not list(noise.parameters())
    assert noise.alpha == 0
    assert noise.active is active
    assert noise.reads_states is reads
    noisy, at_bound = problem.through(noise, seed=0)
    assert not any(x.requires_grad for x in (*noisy, at_bound))
    assert float(problem.terms(noise, seed=0).variance) == 0
    assert float(at_bound) == 0


def test_no_noise_gives_spins_numbers(problem: Problem) -> None:
    """SPIN runs the same code as DNPO and must be equal in all digits; it needs no hidden states of the reference."""
    noisy, at_bound = SilentModule()(problem.clean_B, None)
    assert torch.equal(noisy.policy_B, problem.clean_B)
    assert torch.equal(noisy.noise_B, problem.clean_B)
    assert float(at_bound) == float(noisy.variance) == 0
    spin = OBJECTIVE(problem.policy, problem.reference).mean()
    assert torch.equal(problem.terms(SilentModule(), seed=0).policy, spin)


def test_fixed_noise_accepts_another_variance(problem: Problem) -> None:
    """To read N(0, 0.5) as a standard deviation, set 0.25; 0 is no noise."""
    noisy, _ = problem.through(FixedModule(variance=0.25), seed=3)
    quarter = np.full(problem.logits_NV.shape, 0.25)
    expected = brute_logps(problem, quarter, problem.draws(seed=3)[0])
    np.testing.assert_allclose(noisy.policy_B.numpy(), expected, atol=2e-5)
    noisy, _ = problem.through(FixedModule(variance=0.0), seed=3)
    torch.testing.assert_close(noisy.policy_B, problem.clean_B)


@pytest.mark.usefixtures("whole")
def test_fixed_noise_has_the_stated_variance() -> None:
    """Over two words log p̃/(1 − p̃) is z₁ − z₂ + s(ε₁ − ε₂), whose variance is 2 s² = 1 at s² = 0.5."""
    logp, _ = repeated(FixedModule(variance=0.5), [0.4, -0.3], 40_000, seed=0)
    log_odds = logp - torch.log1p(-logp.exp())
    assert float(log_odds.mean()) == pytest.approx(0.7, abs=0.02)  # 4 standard errors
    assert float(log_odds.var()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("shift", [1.5, -0.5, 0.0])
def test_offset_is_exact(problem: Problem, shift: float) -> None:
    """log p̃ is log p less the shift, so the policy's margin shrinks by β · shift."""
    noise = OffsetModule(shift=shift)
    noisy, at_bound = noise(problem.clean_B, None)
    assert torch.equal(noisy.policy_B, problem.clean_B - shift)
    assert torch.equal(noisy.noise_B, problem.clean_B - shift)
    assert float(at_bound) == float(noisy.variance) == 0
    gap = (problem.policy.chosen_B - problem.reference.chosen_B) - (problem.policy.rejected_B - problem.clean_B)
    expected = torch.nn.functional.softplus(-0.1 * (gap - shift)).mean()
    torch.testing.assert_close(problem.terms(noise, seed=0).policy, expected)


def test_settings_reach_the_module() -> None:
    """Each setting of a part reaches its module."""
    part = TrainableNoise(alpha=0.3, max_variance=2.0, learning_rate=0.02, start_log_std=-0.5)
    noise = part.module(HIDDEN, VOCABULARY)
    assert isinstance(noise, TrainableModule)
    assert (noise.alpha, noise.max_variance, noise.learning_rate) == (0.3, 2.0, 0.02)
    assert noise.weight_VH.shape == (VOCABULARY, HIDDEN)
    assert bool((noise.bias_V == -0.5).all())
    fixed, offset = FixedNoise(variance=0.3).module(HIDDEN, VOCABULARY), Offset(0.7).module(HIDDEN, VOCABULARY)
    assert isinstance(fixed, FixedModule)
    assert isinstance(offset, OffsetModule)
    assert (fixed.fixed, offset.shift) == (0.3, 0.7)
    assert isinstance(NoNoise().module(HIDDEN, VOCABULARY), SilentModule)
    for kind in (part, FixedNoise(), Offset(0.7), NoNoise()):
        assert kind.reads_states == kind.module(HIDDEN, VOCABULARY).reads_states
    assert MatchedOffset(part).at(0.7) == Offset(0.7)
