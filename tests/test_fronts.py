"""Which methods are off a Pareto front beyond doubt: by hand, and how often by chance."""

from collections.abc import Mapping

import numpy as np
import pytest
from analysis.fronts import POINTS, SHARE, Tests, compare_pairs, find_beaten
from analysis.results import Array

SEEDS, ITEMS = 5, 40


def paired(values: Mapping[str, Array], *, less: bool = False) -> Tests:
    return compare_pairs(list(values), lambda a, b: (values[a], values[b]), SHARE if less else POINTS, less=less)


def constant(**costs: float) -> dict[str, Array]:
    """Costs that are the same under all seeds."""
    return {name: np.full((SEEDS, 1), cost) for name, cost in costs.items()}


def noisy(**means: float) -> dict[str, Array]:
    """Qualities that vary by a hundredth of a point."""
    draw = np.random.default_rng(0)
    return {name: mean + draw.normal(0, 1e-4, (SEEDS, ITEMS)) for name, mean in means.items()}


@pytest.mark.parametrize(
    ("cost", "quality", "off"),
    [
        ({"a": 100, "b": 100}, {"a": 0.6, "b": 0.5}, {"b": "a"}),  # better at the same cost
        ({"a": 104, "b": 100}, {"a": 0.6, "b": 0.5}, {"b": "a"}),  # at a cost within the margin
        ({"a": 106, "b": 100}, {"a": 0.6, "b": 0.5}, {}),  # at a higher cost
        ({"a": 50, "b": 100}, {"a": 0.495, "b": 0.5}, {"b": "a"}),  # cheaper, and worse by less than the margin
        ({"a": 50, "b": 100}, {"a": 0.48, "b": 0.5}, {}),
        ({"a": 104, "b": 100}, {"a": 0.505, "b": 0.5}, {}),  # each is a little better in one
        ({"a": 0, "b": 0}, {"a": 0.6, "b": 0.5}, {"b": "a"}),  # neither generates anything
        ({"a": 0, "b": 1}, {"a": 0.5, "b": 0.5}, {"b": "a"}),
        ({"a": 1, "b": 2, "c": 3}, {"a": 0.5, "b": 0.6, "c": 0.55}, {"c": "b"}),
    ],
)
def test_a_method_is_beaten_by_a_better_one_that_is_no_worse(
    cost: dict[str, float], quality: dict[str, float], off: dict[str, str]
) -> None:
    assert find_beaten(list(cost), paired(constant(**cost), less=True), paired(noisy(**quality))) == off


def test_one_seed_or_equal_results_prove_nothing() -> None:
    quality, cost = noisy(a=0.6, b=0.5), constant(a=1, b=1)
    one = {name: values[:1] for name, values in cost.items()}
    assert find_beaten("ab", paired(one, less=True), paired(quality)) == {}
    same = {name: np.full((SEEDS, ITEMS), 0.5) for name in "ab"}
    assert find_beaten("ab", paired(constant(a=1, b=2), less=True), paired(same)) == {}
    apart = {name: np.empty((0, 0)) for name in "ab"}  # no seed in common
    assert find_beaten("ab", paired(apart, less=True), paired(quality)) == {}
    assert find_beaten("a", paired(constant(a=1), less=True), paired(noisy(a=0.5))) == {}


@pytest.mark.parametrize("factor", [1.0, 1 + SHARE])
def test_few_methods_are_taken_off_the_front_by_chance(factor: float) -> None:
    """The first method is at the edge of what counts as beaten: others are equal, or better for 5 % more."""
    draw, names, taken = np.random.default_rng(1), "abcdef", 0
    tables = 200
    for _ in range(tables):
        means = {name: 0.5 if name == "a" or factor == 1 else 0.9 for name in names}
        costs = {name: 100 * (1 if name == "a" else factor) for name in names}
        quality = {name: mean + draw.normal(0, 0.01, (SEEDS, 1)) for name, mean in means.items()}
        cost = {name: mean * draw.normal(1, 0.05, (SEEDS, 1)) for name, mean in costs.items()}
        taken += "a" in find_beaten(names, paired(cost, less=True), paired(quality))
    assert taken <= 0.08 * tables  # 5 %, and two standard errors
    worse = {name: quality[name] - 0.2 * (name == "a") for name in names}
    assert "a" in find_beaten(names, paired(constant(**dict.fromkeys(names, 100)), less=True), paired(worse))
