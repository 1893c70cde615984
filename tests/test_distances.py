"""Distances of samples: by hand, by brute force and in closed form."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dnpo.errors import DataError
from dnpo.evaluate.distances import Array, kl, ks, overlap, overlap_by_chance, wasserstein


def draws(seed: int) -> tuple[Array, Array]:
    """Two samples of different size with ties within and between."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=37).round(1), rng.normal(0.4, 2, size=52).round(1)


def test_worked_numbers() -> None:
    assert ks([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert wasserstein([1, 2, 3, 4], [3, 4, 5, 6]) == 2
    assert wasserstein([0], [0, 3]) == 1.5
    assert overlap([0, 1, 2, 3], [2, 3, 4, 5], bins=5) == 0.5
    even = np.linspace(0, 1, 1000)
    assert overlap_by_chance(even, even) == pytest.approx(0.904, abs=5e-4)
    assert overlap_by_chance(even, even, bins=1) == 1


@pytest.mark.parametrize("seed", range(5))
def test_ks_by_brute_force(seed: int) -> None:
    """At every value, the shares of both samples that are not above it, counted one by one."""
    first, second = draws(seed)
    apart = [abs(sum(x <= v for x in first) / 37 - sum(x <= v for x in second) / 52) for v in [*first, *second]]
    assert ks(first, second) == pytest.approx(max(apart))
    assert ks(second, first) == pytest.approx(max(apart))


@pytest.mark.parametrize("seed", range(5))
def test_wasserstein_by_sorting(seed: int) -> None:
    """Both samples repeated to equal length, sorted, and subtracted value by value."""
    first, second = draws(seed)
    apart = np.abs(np.sort(np.repeat(first, 52)) - np.sort(np.repeat(second, 37)))
    assert wasserstein(first, second) == pytest.approx(apart.mean())
    assert wasserstein(first + 3, second + 3) == pytest.approx(apart.mean())
    assert wasserstein(5 * first, 5 * second) == pytest.approx(5 * apart.mean())


@pytest.mark.parametrize("seed", range(5))
def test_overlap_by_numpys_histograms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=37), rng.normal(0.4, 2, size=52)  # not rounded: none on an edge between bins
    edges = np.histogram_bin_edges(np.concatenate([first, second]), 12)
    shares = [np.histogram(x, edges)[0] / len(x) for x in (first, second)]
    assert overlap(first, second, bins=12) == pytest.approx(np.minimum(*shares).sum())


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 0.9, 1.0, 3.0])
def test_closed_forms_of_shifted_uniforms(shift: float) -> None:
    """Uniform on [0, 1] and on [shift, 1 + shift]: both densities are 1 on the common part, so the overlap is
    1 − shift. Every value moves by the shift, and that share of the first lies below the second."""
    first = (np.arange(10_000) + 0.5) / 10_000
    assert overlap(first, first + shift) == pytest.approx(max(1 - shift, 0), abs=0.04)  # up to one bin on either side
    assert overlap(first, first + shift, bins=500) == pytest.approx(max(1 - shift, 0), abs=0.004)
    assert wasserstein(first, first + shift) == pytest.approx(shift)
    assert ks(first, first + shift) == pytest.approx(min(shift, 1), abs=2e-4)


def test_overlap_of_normals() -> None:
    """Two normal distributions of variance 1 at distance d overlap by 2 Φ(−d/2) (Inman and Bradley 1989)."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=200_000), rng.normal(1.5, size=200_000)
    assert overlap(first, second, bins=60) == pytest.approx(2 * stats.norm.cdf(-0.75), abs=0.01)


@pytest.mark.parametrize("sizes", [(1000, 1000), (300, 1500)])
def test_overlap_of_two_samples_from_one_distribution(sizes: tuple[int, int]) -> None:
    """The mean over 300 pairs of samples from one distribution."""
    rng = np.random.default_rng(1)
    for draw in (rng.random, rng.standard_normal):
        pairs = [(draw(sizes[0]), draw(sizes[1])) for _ in range(300)]
        expected = np.mean([overlap_by_chance(*pair) for pair in pairs])
        assert np.mean([overlap(*pair) for pair in pairs]) == pytest.approx(expected, abs=0.005)


def test_extreme_samples() -> None:
    for distance in (ks, wasserstein):
        assert distance([2.5], [2.5]) == 0
        assert distance([1, 2, 2], [2, 1, 2]) == 0
    assert overlap([2.5], [2.5]) == overlap([1, 2, 2], [2, 1, 2]) == 1
    assert (ks([1], [2]), wasserstein([1], [2]), overlap([1], [2])) == (1, 1, 0)
    just_above = np.nextafter(1.0, 2.0)
    assert overlap([1.0], [just_above]) == 0
    assert overlap([-5.0] * 3, [-5.0] * 7, bins=1) == 1
    assert overlap([0], [5e-324]) == 0


@pytest.mark.parametrize("function", [ks, wasserstein, overlap, overlap_by_chance])
def test_invalid_samples_are_refused(function: Callable[[Any, Any], float]) -> None:
    for wrong, message in (
        ([], r"shape is \(0,\)"),
        ([[1.0]], r"shape is \(1, 1\)"),
        ([1, np.nan], "number 1 .* nan"),
        ([-np.inf], "number 0 .* -inf"),
        (["a"], "list of numbers"),
    ):
        with pytest.raises(DataError, match=f"second: .*{message}"):
            function([1.0], wrong)
        with pytest.raises(DataError, match=f"first: .*{message}"):
            function(wrong, [1.0])


def test_bins_are_needed() -> None:
    with pytest.raises(DataError, match="bins=0"):
        overlap([1], [2], bins=0)


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    found = kl([-1, -2, -4], [-2, -2, -6], [2, 1, 3])
    assert found == pytest.approx((1, 3**-0.5, 0.5, 0.5 / 3**0.5 / 2))
    assert found == pytest.approx((1, 0.577, 0.5, 0.144), abs=5e-4)
    assert kl([-1.5], [-2], [5]) == (0.5, None, 0.1, None)
    assert kl([-1, -2], [-1, -2], [1, 4]) == (0, 0, 0, 0)
    assert kl([-2], [-1], [1]).sequence == -1


def test_divergence_of_known_policies() -> None:
    """Chains that stop after every token with probability 1/4 and otherwise choose among three others, so the true
    divergence is known. Of 400 estimates from 200 sequences each, about 95 % lie within 1.96 standard errors of it."""
    p, q = np.array([0.25, 0.6, 0.1, 0.05]), np.array([0.25, 0.25, 0.25, 0.25])
    per_token = float((p * np.log(p / q)).sum())
    rng = np.random.default_rng(2)
    hits = []
    for _ in range(400):
        tokens = rng.geometric(0.25, size=200)  # the stop is the last of them
        said = np.column_stack([np.ones(200, int), rng.multinomial(tokens - 1, p[1:] / 0.75)])
        found = kl(said @ np.log(p), said @ np.log(q), tokens)
        assert found.sequence_error is not None
        assert found.token_error is not None
        hits.append(
            (
                abs(found.sequence - 4 * per_token) < 1.96 * found.sequence_error,
                abs(found.token - per_token) < 1.96 * found.token_error,
            )
        )
    assert np.mean(hits, axis=0) == pytest.approx([0.95, 0.95], abs=0.03)


def test_divergence_needs_tokens_and_samples() -> None:
    for arguments, message in (
        (([-1, -2], [-1], [1]), "2, 1 and 1"),
        (([-1], [-1], [0]), "sequence 0 .* no tokens"),
        (([-1], [-np.inf], [1]), "reference: number 0"),
        (([], [], []), "policy: "),
    ):
        with pytest.raises(DataError, match=message):
            kl(*arguments)
