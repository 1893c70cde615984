"""The worst distribution near the pairs: the linear program solved by sorting, against a solver."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import lil_matrix

from dnpo.data.curriculum.earlier import hash_of
from dnpo.data.curriculum.robust import Robust, move, sigmoid, tangent_loss, tangent_points, worst_loss
from dnpo.errors import DataError, SettingsError
from dnpo.records import Pair
from dnpo.settings import build, check
from tests.test_curriculum import context, pair


def scored(margins: list[float]) -> list[Pair]:
    """Pairs with implicit rewards of these differences, in nats."""
    return [
        replace(pair(f"row-{i}", 1), chosen_score=margin + 0.25, rejected_score=0.25)
        for i, margin in enumerate(margins)
    ]


def first(i: int) -> int:
    """Ties in the order of the pairs."""
    return i


def solve(xi_N: np.ndarray, epsilon: float, xi_min: float, points_K: np.ndarray) -> float:
    """The value of the linear program as written, in a, q and |q|, by HiGHS."""
    n, k = len(xi_N), len(points_K)
    level_K, slope_K = -np.log(points_K) + 1, -1 / points_K  # ℓ_k(ξ) = 1 − log t − ξ/t
    a, q, size = (np.arange(n * k).reshape(n, k) + block * n * k for block in range(3))
    gain = np.zeros(3 * n * k)
    gain[a] = (level_K + slope_K * xi_N[:, None]) / n
    gain[q] = np.broadcast_to(-slope_K, (n, k)) / n
    upper, limits = lil_matrix((4 * n * k + 1, 3 * n * k)), np.zeros(4 * n * k + 1)
    for row, (i, j) in enumerate(np.ndindex(n, k)):
        at = 4 * row
        upper[at, q[i, j]], upper[at, size[i, j]] = 1, -1  # q ≤ |q|
        upper[at + 1, q[i, j]], upper[at + 1, size[i, j]] = -1, -1
        upper[at + 2, q[i, j]], upper[at + 2, a[i, j]] = 1, -(xi_N[i] - xi_min)  # a ξ − q ≥ a ξ_min
        upper[at + 3, q[i, j]], upper[at + 3, a[i, j]] = -1, xi_N[i] - 1  # a ξ − q ≤ a
    upper[-1, size.ravel()], limits[-1] = 1 / n, epsilon
    equal = lil_matrix((n, 3 * n * k))
    for i in range(n):
        equal[i, a[i]] = 1
    bounds = [(0, None)] * (n * k) + [(None, None)] * (n * k) + [(0, None)] * (n * k)
    found = linprog(-gain, upper.tocsr(), limits, equal.tocsr(), np.ones(n), bounds, method="highs")
    assert found.success, found.message
    return -float(found.fun)


def test_sorting_solves_the_linear_programme() -> None:
    """The value equals HiGHS's on random programs: few and many pairs, ties, ξ at both ends, every size of ball."""
    draw = np.random.default_rng(0)
    worst = 0.0
    for _ in range(60):
        n, k = int(draw.integers(1, 13)), int(draw.integers(2, 9))
        xi_min = float(draw.choice([0.01, 0.05, 0.3]))
        epsilon = float(draw.choice([0.0, 0.01, 0.05, 0.2, 0.7]))
        xi_N = np.clip(sigmoid(draw.normal(0, 2, n)), xi_min, 1)
        if draw.random() < 0.5:
            xi_N[draw.random(n) < 0.5] = draw.choice([xi_min, 0.5, 1.0])
        points_K = tangent_points(xi_min, k)
        mass_N = move(xi_N, epsilon, xi_min, first)
        value = worst_loss(xi_N, mass_N, xi_min, points_K)
        worst = max(worst, abs(value - solve(xi_N, epsilon, xi_min, points_K)))
        assert (mass_N * (xi_N - xi_min)).mean() <= epsilon + 1e-12
        assert ((mass_N > 0) & (mass_N < 1)).sum() <= 1
    assert worst < 1e-9


def test_worked_numbers() -> None:
    mass_N = move(np.array([0.9, 0.3, 0.6]), 0.2, 0.05, first)
    assert mass_N == pytest.approx([0, 1, 0.35 / 0.55], abs=1e-12)
    assert tangent_points(0.05, 3) == pytest.approx([0.05, math.sqrt(0.05), 1])
    assert tangent_loss(np.array([0.75]), np.array([0.5, 1.0])) == pytest.approx([0.25])
    assert sigmoid(np.array([0.0, 1, -1])) == pytest.approx([0.5, 0.7310586, 0.2689414])


def test_the_largest_tangent_touches_the_loss() -> None:
    points_K, xi_P = tangent_points(0.05, 32), np.linspace(0.05, 1, 1000)
    every_PK = 1 - np.log(points_K) - xi_P[:, None] / points_K
    assert tangent_loss(xi_P, points_K) == pytest.approx(every_PK.max(1), abs=1e-12)
    assert tangent_loss(points_K, points_K) == pytest.approx(-np.log(points_K), abs=1e-12)
    assert (tangent_loss(xi_P, points_K) <= -np.log(xi_P) + 1e-12).all()


def test_one_pair_in_closed_form() -> None:
    points_K = tangent_points(0.05, 32)
    at_min = tangent_loss(np.array([0.05]), points_K)[0]
    for xi in (0.05, 0.06, 0.4, 1.0):
        loss = tangent_loss(np.array([xi]), points_K)[0]
        for epsilon in (0.0, 0.001, 0.1, 0.35, 2.0):
            moved = min(1, epsilon / (xi - 0.05)) if xi > 0.05 else 0
            mass_N = move(np.array([xi]), epsilon, 0.05, first)
            value = worst_loss(np.array([xi]), mass_N, 0.05, points_K)
            assert value == pytest.approx(loss + moved * (at_min - loss), abs=1e-12)


def test_the_value_rises_with_the_ball_from_the_mean_loss() -> None:
    draw = np.random.default_rng(1)
    xi_N = np.clip(sigmoid(draw.normal(1, 2, 500)), 0.05, 1)
    points_K = tangent_points(0.05, 32)
    values = [worst_loss(xi_N, move(xi_N, e, 0.05, first), 0.05, points_K) for e in np.linspace(0, 1.1, 60)]
    assert values[0] == pytest.approx(tangent_loss(xi_N, points_K).mean(), abs=1e-15)
    assert (np.diff(values) >= -1e-12).all()
    assert values[-1] == pytest.approx(tangent_loss(np.array([0.05]), points_K)[0])


def test_a_ball_of_radius_0_changes_nothing() -> None:
    pairs = scored([0.3, -1.0, 2.0])
    rows, counts = Robust(epsilon=0)(pairs, [], context(1))
    assert rows == pairs
    assert counts["worst_loss"] == counts["loss"]
    assert (counts["moved"], counts["split"]) == (0, 0)


def test_rows_have_the_weights_and_shifts_of_the_solution() -> None:
    """σ(0) = .5, σ(−1) = .269, σ(2) = .881: at N ε = .4 the second moves completely (.219), the first by .181/.45."""
    pairs = scored([0.0, -1.0, 2.0])
    rows, counts = Robust(epsilon=0.4 / 3)(pairs, [], context(1))
    xi = 1 / (1 + math.exp(1))
    part = (0.4 - (xi - 0.05)) / 0.45
    assert [(each.id, each.weight, each.shift) for each in rows] == [
        ("row-0", pytest.approx(1 - part), 0),
        ("row-0", pytest.approx(part), pytest.approx(0.45)),
        ("row-1", 1, pytest.approx(xi - 0.05)),
        ("row-2", 1, 0),
    ]
    assert (counts["moved"], counts["split"]) == (2, 1)
    assert sum(each.weight for each in rows) == pytest.approx(3)
    assert sum(each.weight * each.shift for each in rows) / 3 == pytest.approx(0.4 / 3)
    inside, _ = Robust(epsilon=0.4 / 3, reading="inside")(pairs, [], context(1))
    assert inside == [replace(each, weight=1.0) for each in rows]


def test_ties_are_broken_by_the_hash_of_the_id_in_any_order() -> None:
    """Ten equal pairs at σ = .5: N ε = 2.25 moves five of them completely, those with the smallest hashes."""
    pairs = scored([0.0] * 10)
    pairs[0] = replace(pairs[0], chosen_score=99.0)  # so that not all are equal; it stays, at ξ = 1
    rows, _ = Robust(epsilon=0.225)(pairs, [], context(1))
    by_hash = sorted((each.id for each in pairs[1:]), key=hash_of)
    assert {each.id for each in rows if each.shift} == set(by_hash[:5])
    again, _ = Robust(epsilon=0.225)(pairs[::-1], [], context(1))
    assert again == rows[::-1]


def test_refusals_name_the_setting() -> None:
    part, pairs = Robust(), scored([1.0, 2.0])
    with pytest.raises(DataError, match=r"curriculum\.epsilon=0\.05: the rejected response to row-1 has no score"):
        part([pairs[0], replace(pairs[1], rejected_score=None)], [], context(1))
    with pytest.raises(DataError, match=r"curriculum\.epsilon=0\.05: both responses of every pair have the same score"):
        part(scored([0.0, 0.0]), [], context(0))
    with pytest.raises(DataError, match=r"curriculum\.epsilon=0\.05: .* use it only once"):
        part([replace(pairs[0], weight=0.5), pairs[1]], [], context(1))
    for setting, value in (("epsilon", -0.1), ("xi_min", 0.0), ("xi_min", 1.0), ("pieces", 1), ("reading", "between")):
        tree = {"_target_": "dnpo.data.curriculum.robust.Robust", setting: value}
        with pytest.raises(SettingsError, match=rf"curriculum\.{setting}="):
            build("curriculum", check("curriculum", tree))
    assert part.needs_scores
