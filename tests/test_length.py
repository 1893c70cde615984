"""The win rate at equal length: against scipy's optimizer on the same likelihood, known values, and limits."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from dnpo.errors import DataError
from dnpo.stats.length import control_length, fit

# 75 of 100 duels with ours 10 characters longer, 60 of them won; 25 with ours 10 shorter, 5 won
EXAMPLE = [1.0] * 60 + [0.0] * 15 + [1.0] * 5 + [0.0] * 20, [10.0] * 75 + [-10.0] * 25


def simulated(
    count: int, theta: float, phi: float, seed: int, ties: float = 0.1, mean: float = 40.0
) -> tuple[list[float], list[float]]:
    """Duels of responses that are longer by ``mean`` characters; a share of them has no result."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(mean, 90.0, count).round()
    value = (rng.random(count) < expit(theta + phi * np.tanh(difference / difference.std()))).astype(float)
    value[rng.random(count) < ties] = 0.5
    return value.tolist(), difference.tolist()


def by_optimizer(value: list[float], difference: list[float], ridge: float = 0.0) -> tuple[float, float]:
    """σ(θ) and φ by scipy, from the likelihood as written."""
    y, x = np.array(value), np.tanh(np.array(difference) / np.std(difference))

    def cost(w: np.ndarray) -> float:
        eta = w[0] + w[1] * x
        return float((np.logaddexp(0, eta) - y * eta).sum() + ridge * (w**2).sum())

    found = minimize(cost, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
    return float(expit(found.x[0])), float(found.x[1])


def test_the_example_of_the_docstring() -> None:
    found = control_length(*EXAMPLE, resamples=200)
    assert found.rate.value == pytest.approx(0.5)
    assert found.effect == pytest.approx(logit(0.8) / np.tanh(10 / np.sqrt(75)))
    assert found.effect == pytest.approx(1.692, abs=5e-4)
    assert (found.spread, found.difference) == (pytest.approx(np.sqrt(75)), 5.0)
    assert (found.duels, found.prompts, found.notes) == (100, 100, ())


@pytest.mark.parametrize(
    ("theta", "phi", "count"), [(-0.4, 0.9, 60), (0.0, 0.0, 200), (1.5, -3.0, 200), (0.3, 6.0, 90)]
)
def test_the_maximum_equals_an_optimizers(theta: float, phi: float, count: int) -> None:
    for seed in range(5):
        value, difference = simulated(count, theta, phi, seed)
        found = control_length(value, difference, resamples=2)
        rate, effect = by_optimizer(value, difference)
        assert found.rate.value == pytest.approx(rate, abs=1e-5)
        assert found.effect == pytest.approx(effect, abs=1e-4)


def test_a_known_value_is_recovered() -> None:
    """A model that is worse at equal length (40 %) and writes more, so that it wins more than half of all duels."""
    theta, phi = float(logit(0.4)), 1.5
    value, difference = simulated(40_000, theta, phi, 0, ties=0.0, mean=60.0)
    found = control_length(value, difference, resamples=400)
    assert np.mean(value) > 0.54
    assert found.rate.value == pytest.approx(0.4, abs=0.01)
    assert found.effect == pytest.approx(phi, abs=0.05)
    assert found.rate.low is not None
    assert found.rate.high is not None
    assert found.rate.low < 0.4 < found.rate.high < 0.42


def test_without_an_effect_of_length_the_result_is_the_plain_win_rate() -> None:
    """Wins, ties and losses have the same lengths, so the estimated effect is exactly 0."""
    lengths = [-30.0, -5.0, 0.0, 12.0, 80.0]
    value = [v for v in (1.0, 1.0, 0.5, 0.0) for _ in lengths]
    found = control_length(value, lengths * 4, resamples=2)
    assert found.effect == pytest.approx(0.0, abs=1e-9)
    assert found.rate.value == pytest.approx(np.mean(value))
    same = control_length(value, [0.0] * len(value), resamples=200)
    assert same.rate.value == pytest.approx(np.mean(value))
    assert same.rate.low is not None
    assert same.rate.low < np.mean(value)


def test_units_and_sides_do_not_matter() -> None:
    value, difference = simulated(150, -0.5, 1.0, 3)
    found = control_length(value, difference, resamples=300)
    tokens = control_length(value, [d / 4.2 for d in difference], resamples=300)
    assert tokens.rate == found.rate
    other = control_length([1 - v for v in value], [-d for d in difference], resamples=300)
    assert other.rate.value == pytest.approx(1 - found.rate.value)
    assert other.effect == pytest.approx(found.effect)
    assert found.rate.low is not None
    assert other.rate.high == pytest.approx(1 - found.rate.low)


def test_the_interval_equals_one_from_resampled_prompts() -> None:
    """A loop that draws prompts with all their duels and fits each draw by scipy."""
    value, difference = simulated(120, 0.4, 1.0, 1)
    prompts = [i // 3 for i in range(120)]
    found = control_length(value, difference, prompts, resamples=4000)
    rng, spread, drawn = np.random.default_rng(5), np.std(difference), []
    for _ in range(300):
        rows = [3 * p + n for p in rng.integers(0, 40, 40) for n in range(3)]
        y, x = np.array(value)[rows], np.tanh(np.array(difference)[rows] / spread)
        some = minimize(lambda w, y=y, x=x: (np.logaddexp(0, w[0] + w[1] * x) - y * (w[0] + w[1] * x)).sum(), [0, 0])
        drawn.append(expit(some.x[0]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.prompts == 40
    assert (found.rate.low, found.rate.high) == (pytest.approx(low, abs=0.03), pytest.approx(high, abs=0.03))


def test_prompts_are_the_unit() -> None:
    """Repeating each duel four times gives no more information than one."""
    value, difference = simulated(80, 0.2, 0.8, 2)
    once = control_length(value, difference, resamples=500)
    often = control_length(value * 4, difference * 4, list(range(80)) * 4, resamples=500)
    assert often.rate.value == pytest.approx(once.rate.value)
    assert often.rate.half == pytest.approx(once.rate.half)
    naive = control_length(value * 4, difference * 4, resamples=500)
    assert naive.rate.half is not None
    assert once.rate.half is not None
    assert naive.rate.half < 0.6 * once.rate.half


@pytest.mark.parametrize(
    ("won", "lost", "limit"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 0], np.nan),  # -2 -1 | 1 2: the border may be anywhere around 0
        ([0, 0, 0, 1], [1, 1, 1, 0], 0.0),  # it lies between 1 and 2
        ([0, 1, 1, 1], [1, 0, 0, 0], 1.0),
        ([1, 0, 0, 0], [0, 1, 1, 1], 0.0),  # the shorter one wins
        ([1, 1, 1, 1], [0, 0, 0, 0], 1.0),
        ([0, 0, 0, 0], [1, 1, 1, 1], 0.0),
        ([0, 0, 1, 1], [0, 0, 0, 0], np.nan),  # all won, but all longer
        ([0, 0, 3, 0], [0, 0, 1, 0], np.nan),  # one length
        ([0, 0, 3, 4], [5, 0, 1, 0], 0.0),  # the border has both, to its left is 0
    ],
)
def test_limits_where_length_decides(won: list[float], lost: list[float], limit: float) -> None:
    """If a limit exists, the regression with a vanishing ridge converges to it."""
    x = np.tanh([-2.0, -1.0, 1.0, 2.0])
    (rate,), _ = fit(x, np.array([won], float), np.array([lost], float))
    assert rate == pytest.approx(limit, nan_ok=True)
    if np.isnan(limit):
        return
    y = np.repeat([1.0, 0.0], 4)
    n = np.array([*won, *lost])

    def cost(w: np.ndarray) -> float:
        eta = w[0] + w[1] * np.tile(x, 2)
        return float((n * (np.logaddexp(0, eta) - y * eta)).sum() + 1e-9 * (w**2).sum())

    theta = minimize(cost, np.zeros(2), method="Nelder-Mead", options={"maxiter": 20000, "maxfev": 20000}).x[0]
    assert expit(theta) == pytest.approx(limit, abs=0.02)


def test_duels_of_equal_length_count_if_length_decides_all_others() -> None:
    x = np.tanh([-1.0, 0.0, 1.0])
    (rate,), _ = fit(x, np.array([[0.0, 3.0, 4.0]]), np.array([[2.0, 1.0, 0.0]]))
    assert rate == 0.75


def test_undetermined_results_are_refused() -> None:
    with pytest.raises(DataError, match=r"length alone decides all 4 duels"):
        control_length([0, 0, 1, 1], [-9, -2, 3, 4])
    with pytest.raises(DataError, match=r"one side won all 3 duels, and all of our responses are shorter"):
        control_length([1, 1, 1], [-9, -2, -3])
    with pytest.raises(DataError, match=r"all differences in length are 7"):
        control_length([1, 0, 1], [7, 7, 7])
    with pytest.raises(DataError, match=r"none of 2 duels has a preference"):
        control_length([None, None], [1, 2])
    with pytest.raises(DataError, match=r"there are 2, 1 and 2"):
        control_length([1, 0], [1])
    with pytest.raises(DataError, match=r"preferences must be between 0 and 1"):
        control_length([2.0, 0.0], [1, 2])
    with pytest.raises(DataError, match="not a finite number"):
        control_length([1.0, 0.0], [1, np.inf])
    won = control_length([1, 1, 1], [-9, 0, 3], resamples=200)
    assert won.rate.value == 1.0
    assert "one side won every duel, at any length" in won.notes
    assert any("give no win rate at the same length" in note for note in won.notes)
    dropped = control_length([None, *EXAMPLE[0]], [500.0, *EXAMPLE[1]], resamples=200)
    assert dropped.rate.value == pytest.approx(0.5)
    assert dropped.notes == ("1 of 101 duels have no preference and are left out",)
    alone = control_length(*EXAMPLE, prompts=["one"] * 100)
    assert (alone.rate.low, alone.notes) == (None, ("one prompt: no interval",))


def test_too_few_usable_resamples_give_no_interval() -> None:
    found = control_length([0, 1, 0, 1], [-9, -2, 3, 4], resamples=400)
    assert found.rate.low is None
    assert found.notes[-1] == "these are too many for an interval"
