"""Comparisons: published examples, brute force, and error rates of intervals and tests for known truths."""

import csv
import io
import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from dnpo.errors import DataError
from dnpo.stats.intervals import (
    Array,
    Components,
    Estimate,
    Mean,
    Unvaried,
    bootstrap,
    estimate_components,
    estimate_mean,
    percentiles,
)
from dnpo.stats.paired import compare_paired
from dnpo.stats.sampling import majority, pass_at_k
from dnpo.stats.significance import (
    benjamini_hochberg,
    cohens_dz,
    cohens_g,
    holm,
    mcnemar,
    mcnemar_clustered,
    wilcoxon,
)
from dnpo.stats.table import Cell, latex, latex_words, markdown, table, to_csv, with_words

RNG = np.random.default_rng


# --- McNemar ----------------------------------------------------------------------------------------------------------


def test_mcnemar_by_published_numbers() -> None:
    """Approval of a prime minister in two surveys, in which 150 and 86 people changed their minds: z = −4.17 (Agresti,
    Categorical Data Analysis, table 10.1). For 6 against 16 the exact p is 0.052, the mid-p 0.035, and the chi-square p
    0.033 (10² / 22 = 4.545)."""
    assert stats.norm.isf(mcnemar(150, 86, "chi-square") / 2) == pytest.approx(4.17, abs=0.005)
    assert mcnemar(6, 16) == pytest.approx(0.0525, abs=5e-5)
    assert mcnemar(6, 16, "mid-p") == pytest.approx(0.0347, abs=5e-5)
    assert mcnemar(6, 16, "chi-square") == pytest.approx(0.0330, abs=5e-5)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (1, 0), (2, 5), (4, 4), (0, 9), (7, 3)])
def test_exact_mcnemar_equals_all_sign_flips(only_a: int, only_b: int) -> None:
    """Either side is equally likely to be right: all 2^(b + c) assignments, one by one."""
    count = only_a + only_b
    apart = [abs(2 * sum(signs) - count) for signs in product((0, 1), repeat=count)]
    seen = abs(only_a - only_b)
    assert mcnemar(only_a, only_b) == pytest.approx(np.mean([one >= seen for one in apart]))
    middle = np.mean([one > seen for one in apart]) + np.mean([one == seen for one in apart]) / 2
    if seen:  # if both tails are equal, half of the middle is left out of each
        assert mcnemar(only_a, only_b, "mid-p") == pytest.approx(middle)
    assert mcnemar(only_a, only_b) == pytest.approx(stats.binomtest(only_a, count).pvalue)


def test_mcnemar_at_its_extremes() -> None:
    for variant in ("exact", "mid-p", "chi-square"):
        assert mcnemar(0, 0, variant) == 1.0  # type: ignore[arg-type]
        assert mcnemar(5, 5, variant) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert mcnemar(10**9, 10**9 + 10**6) < 1e-100
    with pytest.raises(DataError, match="-1"):
        mcnemar(3, -1)


def test_mcnemar_equals_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for only_a, only_b in ((6, 16), (1, 9), (150, 86)):
        assert mcnemar(only_a, only_b) == pytest.approx(tables.mcnemar([[0, only_a], [only_b, 0]]).pvalue)


def test_clustered_mcnemar_by_hand() -> None:
    """Items with sums 2, 1, 0, −1, 1: (2 + 1 + 0 − 1 + 1)² / (4 + 1 + 0 + 1 + 1) = 9/7. Ten independent answers, 4
    against 1, would give 9/5. With one seed it is the ordinary McNemar test."""
    apart = np.array([[1, 1, 0, -1, 1], [1, 0, 0, 0, 0.0]])
    assert mcnemar_clustered(apart) == pytest.approx(stats.chi2.sf(9 / 7, 1))
    one = RNG(0).integers(-1, 2, (1, 50)).astype(float)
    assert mcnemar_clustered(one) == pytest.approx(mcnemar(int((one > 0).sum()), int((one < 0).sum()), "chi-square"))
    assert mcnemar_clustered(np.zeros((3, 4))) == 1.0


def test_clustered_mcnemar_is_near_the_exact_test() -> None:
    """All signs of all items flipped, the seeds of an item together."""
    apart = RNG(3).integers(-1, 2, (3, 14)).astype(float)
    sums = apart.sum(0)
    turned = np.abs(np.array(list(product((-1, 1), repeat=14))) @ sums)
    exact = (turned > abs(sums.sum())).mean() + (turned == abs(sums.sum())).mean() / 2
    assert mcnemar_clustered(apart) == pytest.approx(exact, abs=0.03)


# --- Wilcoxon ---------------------------------------------------------------------------------------------------------

MAIZE = [6.0, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]


def test_wilcoxon_by_published_numbers() -> None:
    """Darwin's maize, cross- minus self-fertilised, in eighths of an inch: its negative ranks are 10 and 14."""
    assert wilcoxon(np.array(MAIZE)) == pytest.approx(0.041259765625)


@pytest.mark.parametrize("apart", [[3.0, 1, -2, 4, 5, -6, 7], [0.0, 0, 1, 1, -1, 2, 2, 3, 0, 4], [0.0, 0, 5], [1.0]])
def test_wilcoxon_equals_all_sign_flips(apart: list[float]) -> None:
    """Pratt: all differences get ranks, zeros included; the signs of the non-zero ones are flipped one by one."""
    d = np.array(apart)
    ranks = stats.rankdata(np.abs(d))[d != 0]
    seen = abs(ranks @ np.sign(d[d != 0]))
    turned = [abs(ranks @ np.array(signs)) for signs in product((-1, 1), repeat=len(ranks))]
    assert wilcoxon(d) == pytest.approx(np.mean([one >= seen - 1e-9 for one in turned]))
    assert wilcoxon(d) == stats.wilcoxon(d, zero_method="pratt").pvalue


def test_wilcoxon_with_many_zeros_is_the_sign_test() -> None:
    d = np.array([*range(1, 21), *(-10.0, -18, -19, -20, -21, -22, -23, -24, -25, -26)])
    assert wilcoxon(np.concatenate([d, np.zeros(100_000)])) == pytest.approx(mcnemar(20, 10, "chi-square"), rel=1e-3)
    assert wilcoxon(d) > 0.5
    assert wilcoxon(np.zeros(9)) == 1.0


def test_rounding_breaks_no_tie() -> None:
    """0.3 − 0.2 and 0.2 − 0.1 differ in their last digit but are equal, and 0.1 + 0.2 − 0.3 counts as no difference."""
    rough = np.array([0.3 - 0.2, 0.1 - 0.2, 0.4 - 0.2, 0.7 - 0.6, 0.1])
    assert wilcoxon(rough) == wilcoxon(np.array([1.0, -1, 2, 1, 1]))
    found = compare_paired([0.1 + 0.2] * 8, [0.3] * 8)
    assert (found.p, found.effect) == (1.0, 0.0)


# --- Holm -------------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    """0.005·4, 0.01·3, 0.03·2, and 0.04·1 raised to the value before it; in the given order, not sorted."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.50, 0.003, 0.32, 0.054, 0.0003]) == pytest.approx([0.64, 0.012, 0.64, 0.162, 0.0015])
    assert holm([0.319, 0.201, 0.4, 0.374, 0.113]) == pytest.approx([0.957, 0.804, 0.957, 0.957, 0.565])
    assert holm([]) == []
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_holm_equals_closed_testing_with_bonferroni() -> None:
    """Closed testing: an adjusted p is the largest Bonferroni p of all sets with this hypothesis."""
    ps = list(RNG(1).uniform(0, 0.4, 6))
    for i, adjusted in enumerate(holm(ps)):
        sets = [s for size in range(1, 7) for s in combinations(range(6), size) if i in s]
        assert adjusted == pytest.approx(max(min(len(s) * min(ps[j] for j in s), 1.0) for s in sets))


def test_benjamini_and_hochberg_by_hand_and_by_scipy() -> None:
    """0.005·4/1, 0.01·4/2, 0.03·4/3 lowered to the value after it, 0.04; in the given order."""
    assert benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    ps = [*RNG(4).uniform(0, 0.3, 20), 1.0, 1.0, 0.0]
    assert benjamini_hochberg(ps) == pytest.approx(list(stats.false_discovery_control(ps)))
    assert benjamini_hochberg([]) == []


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1])
def test_corrections_refuse_values_that_are_not_probabilities(wrong: float) -> None:
    for correct in (holm, benjamini_hochberg):
        with pytest.raises(DataError, match="between 0 and 1"):
            correct([0.1, wrong])


# --- effects ----------------------------------------------------------------------------------------------------------


def test_effects_by_hand() -> None:
    """1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9)/3. 15 against 5: a quarter above half, three to one."""
    assert cohens_dz(np.array([1.0, 2, 3, 6])) == pytest.approx(3 / math.sqrt(14 / 3))
    assert (cohens_g(15, 5), cohens_g(5, 15), cohens_g(0, 0), cohens_g(3, 0)) == (0.25, -0.25, 0.0, 0.5)
    assert (cohens_dz(np.zeros(4)), cohens_dz(np.full(4, 0.1)), cohens_dz(np.ones(1))) == (0.0, None, None)


# --- means and intervals ----------------------------------------------------------------------------------------------


def test_with_one_seed_it_is_the_t_test() -> None:
    x = RNG(0).normal(0.4, 1, 30)
    found, known = estimate_mean(x[None]), stats.ttest_1samp(x, 0)
    assert found is not None
    assert found.p() == pytest.approx(known.pvalue)
    assert (found.estimate().low, found.estimate().high) == pytest.approx(tuple(known.confidence_interval()))


def crossed(rng: np.random.Generator, shape: tuple[int, int], seeds: float, items: float, rest: float) -> Array:
    """Differences of 0 on average: effects of seeds and of items with these standard deviations, and the rest."""
    made: Array = rng.normal(0, seeds, (shape[0], 1)) + rng.normal(0, items, (1, shape[1])) + rng.normal(0, rest, shape)
    return made


def test_crossed_effects_by_the_mean_squares_of_statsmodels() -> None:
    """V₁, V₂ and V₁₂ are the mean squares of seeds, items and residuals over S · I."""
    ols, anova = pytest.importorskip("statsmodels.formula.api").ols, pytest.importorskip("statsmodels.stats.anova")
    x = 0.3 + crossed(RNG(2), (4, 25), 0.3, 0.6, 1.0)
    rows = {"x": x.ravel(), "s": np.repeat(range(4), 25), "i": np.tile(range(25), 4)}
    squares = anova.anova_lm(ols("x ~ C(s) + C(i)", rows).fit())["mean_sq"]
    seeds, items, rest = (float(squares[name]) for name in ("C(s)", "C(i)", "Residual"))
    whole = (seeds + items - rest) / 100
    df = (seeds + items - rest) ** 2 / (seeds**2 / 3 + items**2 / 24 + rest**2 / 72)
    found = estimate_mean(x)
    assert found is not None
    assert (found.value, found.error, found.df) == pytest.approx((x.mean(), math.sqrt(whole), df))
    assert found.p() == pytest.approx(2 * stats.t.sf(abs(x.mean()) / math.sqrt(whole), df))
    assert found.p(bound=0.5) == pytest.approx(2 * stats.t.sf(abs(x.mean() - 0.5) / math.sqrt(whole), df))
    parts = estimate_components(x)
    assert parts.rest == pytest.approx(rest)
    assert (parts.seeds, parts.items) == pytest.approx(((seeds - rest) / 25, (items - rest) / 4))
    again = parts.mean(4, 25, float(x.mean()))
    assert (again.value, again.error, again.df) == pytest.approx((found.value, found.error, found.df))


def test_a_negative_variance_is_random_error() -> None:
    """Residuals larger than both effects: V₁ + V₂ − V₁₂ is under both, here even under 0."""
    x = np.array([[1.0, -1.0, 0.2], [-1.0, 1.0, 0.1]])
    found, parts = estimate_mean(x), estimate_components(x)
    assert found is not None
    by_seed, by_item = (x.mean(axis).var(ddof=1) / x.shape[1 - axis] for axis in (1, 0))
    assert found.error == pytest.approx(math.sqrt(min(by_seed, by_item)))
    assert found.df >= 1
    assert (parts.seeds, parts.items) == (0.0, 0.0)
    one = estimate_components(np.array([[1.0], [2.0], [4.0]]))
    assert (one.seeds, one.items, one.rest) == (pytest.approx(7 / 3), 0.0, 0.0)
    assert one.mean(12, 1).error == pytest.approx(math.sqrt(7 / 3 / 12))
    assert one.mean(12, 1).df == 11


@pytest.mark.parametrize("shape", [(3, 1), (3, 40)])
def test_rounding_errors_are_no_variance(shape: tuple[int, int]) -> None:
    """Equal numbers that were computed in different ways; a plan would call any effect detectable otherwise."""
    x = np.full(shape, 0.6)
    x[::2] = 0.1 * 3 + 0.3
    assert np.ptp(x) > 0
    assert estimate_components(x) == Components(0.0, 0.0, 0.0)


SCENARIOS = [(0.4, 1.0, 1.0), (0.0, 1.0, 1.0), (0.0, 0.0, 1.0), (0.05, 0.3, 1.0), (1.0, 0.0, 1.0), (0.03, 0.1, 0.4)]


@pytest.mark.parametrize("seeds", [5, 12])
def test_the_t_test_over_items_and_seeds_has_its_nominal_size(seeds: int) -> None:
    """5 %, wherever the variance comes from, between 3.5 and 6.5 %; p agrees with the interval each time."""
    for scenario in SCENARIOS:
        rng, found = RNG([12, seeds]), []
        for _ in range(1500):
            mean = estimate_mean(crossed(rng, (seeds, 60), *scenario))
            assert mean is not None
            interval = mean.estimate()
            assert interval.low is not None
            assert interval.high is not None
            assert (mean.p() <= 0.05) == (not interval.low < 0 < interval.high)
            found.append(mean.p() <= 0.05)
        assert 0.035 < np.mean(found) < 0.065, scenario


def test_t_over_seeds_by_hand() -> None:
    """1, 2, 3: mean 2, standard error 1/√3, and 4.3027 of them on two degrees of freedom."""
    mean = estimate_mean(np.array([[1.0, 2.0, 3.0]]))
    assert mean is not None
    found = mean.estimate()
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert (found.value, found.low) == (2.0, pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4))
    assert estimate_mean(np.array([[5.0]])) is None
    same = estimate_mean(np.array([[5.0, 5.0]]))
    assert same is not None
    assert (same.estimate(), same.p(), same.p(bound=4.0)) == (Estimate(5.0), 1.0, 1.0)  # not 0: it proves nothing


def test_equal_values_have_an_exact_bound() -> None:
    """0 of 300 units differ: scipy's one-sided Clopper-Pearson bound of their share, times the largest effect."""
    share = stats.binomtest(0, 300, alternative="less").proportion_ci(0.95, method="exact").high
    found = Unvaried(0.0, -100.0, 100.0, 300)
    assert found.estimate() == Estimate(0.0, pytest.approx(-100 * share), pytest.approx(100 * share))
    # all 300 are alike with probability 0.99³⁰⁰ where one in a hundred differs, by 100
    assert found.p(bound=1.0) == pytest.approx(0.99**300) == pytest.approx(found.p(bound=-1.0))
    assert found.p() == 1.0
    assert found.p(bound=101.0) == 0.0
    trials = RNG(3).random((20_000, 300)) < 0.01
    assert found.p(bound=1.0) == pytest.approx((~trials.any(1)).mean(), abs=0.004)
    for bound in (0.2, 0.9, 0.99, 1.0, 1.1, 30.0):
        assert (found.p(bound) <= 0.05) == (100 * share <= bound)
    one = Unvaried(0.0, 0.0, 100.0, 60)  # a share that was 0 everywhere
    assert one.estimate().low == 0.0
    assert one.p(bound=50.0) == pytest.approx(0.5**60)
    assert one.p(bound=-1.0) == 0.0


def test_the_detectable_difference_by_hand_and_by_simulation() -> None:
    """(1.95996 + 0.84162) · 0.1 with many degrees of freedom; about 80 % of true means of this size are detected."""
    assert Mean(0.0, 0.1, 1e7).detectable() == pytest.approx(0.280158, abs=1e-5)
    for df, alpha in ((3.0, 0.05), (11.0, 0.0125), (40.0, 0.001)):
        least = Mean(0.0, 1.0, df).detectable(alpha)
        assert stats.nct.sf(stats.t.ppf(1 - alpha / 2, df), df, least) == pytest.approx(0.8, abs=3e-4)
    x = RNG(5).normal(0, 1, (2000, 40))
    found = np.array(
        [m.p() <= 0.05 for row in x if (m := estimate_mean(row[None] + Mean(0, 1 / math.sqrt(40), 39).detectable()))]
    )
    assert 0.77 < found.mean() < 0.83


def test_the_bootstrap_draws_items_and_seeds() -> None:
    """Against single draws by index: the same spread and ends, within the random error of 4,000 resamples."""
    rng = RNG(7)
    x = rng.normal(0, 1, (3, 40)) + rng.normal(0, 0.5, (3, 1))
    slow = np.array([x[rng.integers(0, 3, 3)][:, rng.integers(0, 40, 40)].mean() for _ in range(4000)])
    fast = bootstrap(x[None], 0, 4000)[:, 0]
    assert fast.std() == pytest.approx(slow.std(), rel=0.06)
    assert np.percentile(fast, [2.5, 50, 97.5]) == pytest.approx(np.percentile(slow, [2.5, 50, 97.5]), abs=0.06)


def test_with_one_seed_the_bootstrap_equals_scipys() -> None:
    x = RNG(8).exponential(1, 60)
    known = stats.bootstrap((x,), np.mean, n_resamples=8000, method="percentile", rng=1).confidence_interval
    found = percentiles(x.mean(), bootstrap(x[None, None], 0, 8000)[:, 0])
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.02)


def test_equal_items_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right and wrong answers, which have few different values, give the same spread as values that differ by next to
    nothing; and the size of batches does not change the distribution of resamples."""
    x = (RNG(9).random((2, 1, 300)) < 0.4).astype(float)
    alike = bootstrap(x, 0, 4000)
    single = bootstrap(x + RNG(10).uniform(0, 1e-9, x.shape), 0, 4000)
    assert alike.mean(0) == pytest.approx(x.mean((1, 2)), abs=0.003)
    assert np.cov(alike.T) == pytest.approx(np.cov(single.T), abs=6e-5)
    monkeypatch.setattr("dnpo.stats.intervals.BATCH", 1000)
    assert bootstrap(x + RNG(10).uniform(0, 1e-9, x.shape), 0, 500).mean(0) == pytest.approx(x.mean((1, 2)), abs=0.01)


def coverage(seeds: int, between: float, sets: int = 200) -> dict[str, float]:
    """Shares of intervals with the truth, 0, and of tests that reject it, over simulated differences of 80 items."""
    rng, found = RNG(11), Counter[str]()
    for one in range(sets):
        x = rng.normal(0, between, (seeds, 1)) + rng.normal(0, 1, (1, 80)) + rng.normal(0, 1, (seeds, 80))
        mean = estimate_mean(x)
        assert mean is not None
        within = {"bootstrap": percentiles(x.mean(), bootstrap(x[None], one, 500)[:, 0]), "t": mean.estimate()}
        for name, e in within.items():
            assert e.low is not None
            assert e.high is not None
            found[name] += e.low <= 0 <= e.high
        found["items alone"] += wilcoxon(x.mean(0)) <= 0.05
        found["t test"] += mean.p() <= 0.05
    return {name: found[name] / sets for name in ("bootstrap", "t", "items alone", "t test")}


def test_intervals_over_items_contain_the_truth() -> None:
    found = coverage(1, 0.0)
    assert 0.90 < found["bootstrap"] < 0.99
    assert 0.90 < found["t"] < 0.99
    assert found["items alone"] < 0.10


def test_with_three_seeds_only_the_t_interval_is_reliable() -> None:
    """If training moves the mean more than items do, a bootstrap over three seeds claims too much, and a test over
    items that ignores seeds rejects a true hypothesis far too often. Hence the note, and the p of the t test."""
    found = coverage(3, 0.4)
    assert found["t"] > 0.91
    assert found["t test"] < 0.09
    assert found["bootstrap"] < 0.93
    assert found["items alone"] > 0.25


# --- paired -----------------------------------------------------------------------------------------------------------


def test_right_and_wrong_from_end_to_end() -> None:
    """16 items that only a has right, 6 only b, 40 both, and 38 neither."""
    a = np.repeat([1, 0, 1, 0], [16, 6, 40, 38])
    b = np.repeat([0, 1, 1, 0], [16, 6, 40, 38])
    found = compare_paired(a, b)
    assert (found.kind, found.items, found.seeds) == ("right", 100, 1)
    assert (found.a.value, found.b.value, found.difference.value) == pytest.approx((0.56, 0.46, 0.10))
    assert found.tests == {"McNemar's exact test": pytest.approx(0.0525, abs=5e-5)}
    assert found.effect == pytest.approx(16 / 22 - 0.5)
    error = math.sqrt((22 - 10**2 / 100) / 99 / 100)
    assert found.detectable == pytest.approx(2.82967 * error, abs=1e-4)  # noncentral t, 99 degrees of freedom
    assert found.difference.half == pytest.approx(1.96 * error, rel=0.05)
    assert found.notes == ("one seed: the interval is over items only, without the variation between trainings",)
    assert compare_paired(b, a).difference.value == pytest.approx(-0.10)
    assert compare_paired(a.astype(bool), b.astype(bool)) == found
    assert compare_paired(a[None], b[None]) == found


def test_scores_from_end_to_end() -> None:
    b = RNG(0).uniform(0, 100, 15)
    found = compare_paired(b + np.array(MAIZE), b)
    assert found.kind == "scores"
    assert found.p == pytest.approx(0.041259765625)
    assert found.effect == pytest.approx(cohens_dz(np.array(MAIZE)))
    known = stats.ttest_1samp(MAIZE, 0).confidence_interval()
    exact = compare_paired(b + np.array(MAIZE), b, interval="t").difference
    assert (exact.low, exact.high) == pytest.approx((known.low, known.high))
    both = compare_paired(b + np.array(MAIZE), b, interval="t")
    assert both.p == both.tests["t test over items"] == pytest.approx(stats.ttest_1samp(MAIZE, 0).pvalue)
    assert both.tests["Wilcoxon's signed-rank test over items"] == found.p


def test_several_seeds_need_both_tests() -> None:
    """One seed is much better and two are not: significant over items, but not over seeds."""
    rng = RNG(1)
    b = rng.normal(50, 10, (3, 200))
    a = b + np.array([[8.0], [0.5], [-0.2]]) + rng.normal(0, 3, (3, 200))
    found = compare_paired(a, b)
    items, both = found.tests["Wilcoxon's signed-rank test over items"], found.tests["t test over items and seeds"]
    assert items < 1e-10
    assert both > 0.2
    assert found.p == both
    assert found.seeds == 3
    assert "3 seeds" in found.notes[0]
    wide = compare_paired(a, b, interval="t")
    assert wide.notes == ()
    assert wide.p == both
    assert wide.difference.half is not None
    assert found.difference.half is not None
    assert wide.difference.half > found.difference.half
    assert set(compare_paired(a > 50, b > 50).tests) == {
        "McNemar's test, clustered by item",
        "t test over items and seeds",
    }


def test_pairing_narrows_the_interval() -> None:
    """Two sides that vary much but together have a difference that varies little."""
    b = RNG(4).normal(50, 20, 100)
    found = compare_paired(b + RNG(5).normal(1, 1, 100), b)
    assert found.difference.half is not None
    assert found.a.half is not None
    assert found.difference.half < found.a.half / 10


def test_comparisons_are_repeatable() -> None:
    a, b = RNG(0).normal(size=(2, 2, 30))
    assert compare_paired(a, b, seed=3) == compare_paired(a, b, seed=3)
    assert compare_paired(a, b, seed=3).difference != compare_paired(a, b, seed=4).difference


def test_results_without_variance() -> None:
    """Equal sides: p is 1, without division by zero. A constant difference proves nothing about other trainings."""
    for x in (np.ones(20), np.arange(20.0), np.arange(40.0).reshape(2, 20)):
        found = compare_paired(x, x)
        assert (found.p, found.effect, found.detectable) == (1.0, 0.0, None)
        assert found.difference == Estimate(0.0, 0.0, 0.0)
        assert "all differences are the same" in found.notes[-1]
    x = RNG(0).uniform(0, 1, (3, 8))
    for interval in ("bootstrap", "t"):
        found = compare_paired(x + 0.1, x, interval=interval)  # type: ignore[arg-type]
        assert found.tests["Wilcoxon's signed-rank test over items"] == pytest.approx(2 / 2**8)
        assert (found.p, found.effect, found.detectable) == (1.0, None, None)
    assert found.difference == Estimate(pytest.approx(0.1))
    assert "there is no interval and no test" in found.notes[-1]


def test_one_item() -> None:
    for a, b in (([1], [0]), ([70.0], [20.0]), ([[70.0], [71.0]], [[20.0], [22.0]])):
        found = compare_paired(a, b)
        assert found.p == 1.0
        assert found.difference.low is None
        assert found.detectable is None
        assert found.notes == ("one item: no interval, and no test can be significant",)


def test_many_items() -> None:
    a, b = RNG(0).random((2, 3, 300_000)) < np.array([0.505, 0.5])[:, None, None]
    found = compare_paired(a, b)
    assert found.p < 0.01
    assert found.difference.low is not None
    assert found.difference.low > 0


def test_missing_results() -> None:
    a, b = [1.5, None, 3, 4], [1, 2, math.nan, 3]
    with pytest.raises(DataError, match=r"2 of 4 items lack a result .*item 1 under seed 0.*missing='drop'"):
        compare_paired(a, b)
    found = compare_paired(a, b, missing="drop")
    assert (found.items, found.a.value, found.b.value) == (2, 2.75, 2.0)
    assert found.notes[-1] == "2 of 4 items lack a result and were dropped on both sides"
    with pytest.raises(DataError, match="nothing is left"):
        compare_paired([None], [1.0], missing="drop")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1, 2, 3], "1 × 2 and 1 × 3"),
        ([[1, 2], [3, 4]], [1, 2], "2 × 2 and 1 × 2"),
        ([[1, 2], [3]], [[1, 2], [3]], "a: expected numbers"),
        (["good"], ["bad"], "a: expected numbers"),
        ([], [], "expected one or more results"),
        (1.0, 2.0, "expected one or more results"),
        ([[[1.0]]], [[[1.0]]], "by seed and item"),
        ([math.inf, 1], [1, 2], "infinite"),
    ],
)
def test_results_that_cannot_be_compared(a: object, b: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compare_paired(a, b)


def test_kinds_can_be_given() -> None:
    assert compare_paired([0, 1, 1], [1, 1, 0], kind="scores").kind == "scores"
    with pytest.raises(DataError, match="compare them as scores"):
        compare_paired([0, 2], [1, 0], kind="right")


# --- tables -----------------------------------------------------------------------------------------------------------


def cell(value: float, p: float | None = None, half: float = 0.25, signed: bool = False) -> Cell:
    return Cell(Estimate(value, value - half, value + half), p, signed)


def test_stars_follow_the_corrected_p() -> None:
    """0.03 alone has a star; together with 0.04 it becomes 0.06 and has none."""
    assert markdown(table({"dnpo": {"k=1": cell(59.9, 0.03)}})).splitlines()[2] == r"| dnpo | 59.9 ± 0.2\* |"
    both = table({"spin": {"k=1": cell(52.3)}, "dnpo": {"k=1": cell(59.9, 0.03), "k=2": cell(58.0, 0.04)}})
    assert [s and (s.adjusted, s.star) for row in both.rows for s in row.shown] == [
        (None, False),
        None,
        (0.06, False),
        (0.06, False),
    ]
    assert both.caption == "Mean ± half of the 95 % interval. *: p ≤ 0.05 after Holm's correction over 2 tests."
    assert table({"spin": {"k=1": cell(52.3)}}).caption == "Mean ± half of the 95 % interval."


def test_numbers_are_formatted_alike() -> None:
    cells = {
        "a": {"x": cell(0.12345, 0.001, 0.0211), "d": cell(-0.0312, signed=True)},
        "b": {"d": Cell(Estimate(-1e-9))},
    }
    found = table(cells, digits=1, scale=100)
    assert [s and s.text for row in found.rows for s in row.shown] == ["12.3 ± 2.1*", "−3.1 ± 25.0", None, "0.0"]
    assert r"a & $12.3 \pm 2.1^{*}$ & $-3.1 \pm 25.0$ \\" in latex(found)
    assert r"b &  & $0.0$ \\" in latex(found)
    assert r"| a | 12.3 ± 2.1\* | −3.1 ± 25.0 |" in markdown(found)
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [(row["row"], row["column"]) for row in rows] == [("a", "x"), ("a", "d"), ("b", "d")]
    assert (float(rows[0]["value"]), float(rows[0]["p"]), rows[0]["star"]) == (0.12345, 0.001, "1")
    assert rows[0]["text"] == "12.3 ± 2.1*"
    assert (rows[2]["low"], rows[2]["p_holm"]) == ("", "")


@pytest.mark.parametrize(
    ("half", "text"),
    [(0.04, "9.60 ± 0.04"), (0.004, "9.600 ± 0.004"), (0.06, "9.6 ± 0.1"), (0.0, "9.6 ± 0.0"), (1e-15, "9.6 ± 0.0")],
)
def test_an_interval_is_not_shown_as_zero_unless_it_has_no_width(half: float, text: str) -> None:
    (row,) = table({"a": {"x": cell(9.6, half=half)}}).rows
    assert [shown and shown.text for shown in row.shown] == [text]


def test_columns_can_be_set_off_at_the_end() -> None:
    loss = Cell(Estimate(0.5, 0.4, 0.6), mark="†")
    found = table({"r": {"loss": loss, "score": cell(1.0, p=0.01)}}, digits={"loss": 3, "score": 1}, beside=["loss"])
    assert found.columns == ("score", "loss")
    shown = markdown(found, "policy").splitlines()
    assert shown[0] == "| policy | score | *loss* |"
    assert shown[2] == "| r | 1.0 ± 0.2\\* | 0.500 ± 0.100† |"
    assert r"\begin{tabular}{lr@{\qquad\quad}r}" in latex(found)
    assert r"$0.500 \pm 0.100$$\dagger$" in latex(found)
    assert "0.500 ± 0.100†" in to_csv(found)
    assert found.tests == 1


def test_columns_of_words_follow_columns_of_numbers() -> None:
    numbers = table({"a": {"x": cell(1234.5)}, "b": {"x": Cell(Estimate(2.0))}})
    found = with_words(numbers, {"claim": {"a": "5 % more"}, "here": {"a": "holds", "c": "of no row"}})
    lines = markdown(found).splitlines()
    assert lines[0] == "|  | x | claim | here |"
    assert lines[2].startswith("| a | 1,234.5 ± ")
    assert lines[2].endswith(" | 5 % more | holds |")
    assert lines[3] == "| b | 2.0 |  |  |"
    assert r"\begin{tabular}{lr}" in latex(found)
    assert r"a & 5 \% more & holds \\" in latex_words(found)
    assert "\nb &" not in latex_words(found), "a row without words"
    assert latex_words(numbers) == ""
    rows = {(row["row"], row["column"]): row["text"] for row in csv.DictReader(io.StringIO(to_csv(found)))}
    assert (rows["a", "claim"], rows["a", "here"], rows["b", "here"]) == ("5 % more", "holds", "")


def test_labels_stay_text() -> None:
    name = 'a|b_c & 5 % <b>\n"x", $1 #{~^\\}'
    found = table({name: {name: cell(1.0)}})
    line = markdown(found, "of *all*").splitlines()
    assert line[0].startswith(r"| of \*all\* | a\|b\_c &amp; 5 % &lt;b> ")
    assert line[2].replace(r"\|", "").count("|") == 3
    assert r"a$|$b\_c \& 5 \% $<$b$>$" in latex(found)
    assert r"\$1 \#\{\textasciitilde{}\textasciicircum{}\textbackslash{}\}" in latex(found)
    (row,) = csv.DictReader(io.StringIO(to_csv(found), newline=""))
    assert row["row"] == row["column"] == name


def test_a_comparison_fills_a_table() -> None:
    b = RNG(0).normal(50, 10, 100)
    found = compare_paired(b + RNG(1).normal(5, 5, 100), b)
    shown = table({"ours": {"score": Cell(found.a, found.p)}, "theirs": {"score": Cell(found.b)}})
    assert [row.shown[0] and row.shown[0].text[-1] == "*" for row in shown.rows] == [True, False]


# --- several samples --------------------------------------------------------------------------------------------------


def test_pass_at_k_counts_subsets() -> None:
    """2 of 5 right, 2 drawn: 3 of the 10 pairs have none, 0.7. And every case up to 7 samples, subset by subset."""
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for n in range(1, 8):
        for c, k in product(range(n + 1), range(1, n + 1)):
            passed = np.mean([min(drawn) < c for drawn in combinations(range(n), k)])
            assert pass_at_k(n, c, k) == pytest.approx(passed)


def test_pass_at_k_of_many_samples() -> None:
    """pass@1 is the share of right samples; and 1 − C(n−c, k)/C(n, k) in whole numbers at n = 200, as in the paper, and
    above."""
    assert pass_at_k(200, 58, 1) == pytest.approx(0.29)
    for n, c, k in ((200, 13, 100), (200, 1, 10), (100_000, 7, 5_000)):
        exact = 1 - math.comb(n - c, k) * 10**30 // math.comb(n, k) / 10**30
        assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-9)


def published_pass_at_k(n: int, c: int, k: int) -> float:
    """The numerically stable script that Chen et al. 2021 print as figure 3, word for word."""
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def test_pass_at_k_equals_the_published_estimate() -> None:
    cases = [(n, c, k) for n in (1, 2, 5, 8, 32, 64, 200) for c in range(n + 1) for k in {1, 2, 4, 8, 32, n} if k <= n]
    assert len(cases) > 1500
    for n, c, k in cases:
        assert pass_at_k(n, c, k) == pytest.approx(published_pass_at_k(n, c, k), abs=1e-12)


@pytest.mark.parametrize(("n", "k", "p"), [(8, 1, 0.3), (8, 4, 0.3), (8, 8, 0.05), (32, 8, 0.02), (200, 100, 0.01)])
def test_pass_at_k_is_unbiased(n: int, k: int, p: float) -> None:
    """Its mean over the binomial number of right samples is 1 − (1 − p)^k; the plug-in 1 − (1 − c/n)^k is too low."""
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    plugged = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
    assert k == 1 or plugged < mean - 1e-4


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0), (0, 0, 1)])
def test_pass_at_k_says_what_it_needs(samples: int, right: int, k: int) -> None:
    with pytest.raises(DataError, match="pass@k"):
        pass_at_k(samples, right, k)


def test_majority_votes() -> None:
    assert majority(["4", "5", "4"]) == "4"
    assert majority(["5", "4", "4", "5"]) == "5"
    assert majority([None, None, "7"]) == "7"
    assert majority([None]) is None
    assert majority([]) is None
    assert majority([0, None, None]) == 0


def test_arguments_are_not_changed() -> None:
    a: Array = RNG(0).normal(size=(2, 9))
    before = a.copy()
    compare_paired(a, a[::-1])
    assert (a == before).all()
