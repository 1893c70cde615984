"""Which methods are off a Pareto front beyond doubt: paired tests of methods in two quantities.

A method *beats* another if it is better by more than a margin in one of the quantities, and in the other not worse by
more than its margin. Means alone do not show that: without a margin, a method stays on the front because it costs a
trifle less; without a test, a method that was lucky takes others off it. The margin is the same for better and for
worse, so two methods never beat each other.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

from scipy.special import stdtr

from analysis.results import Array, whole
from dnpo.stats.intervals import estimate_mean
from dnpo.stats.table import ALPHA

POINTS = 0.01  # the margin of a share, and of points as a share of 100: one point
SHARE = 0.05  # the margin of an amount, as a share of it

# By pairs of methods, the p of the test that the first is not worse than the second by the margin; None: no test
# is possible. 1 − p is the p of the test that the second is better than the first by more than the margin.
Tests = Mapping[tuple[str, str], float | None]


def compare_pairs(
    methods: Sequence[str], values: Callable[[str, str], tuple[Array, Array]], margin: float, *, less: bool
) -> Tests:
    """Test all pairs of methods in one quantity: one-sided t tests, paired by seeds, and by items if there are any.

    Args:
        values: returns the values of two methods under the seeds that both have, each of shape S × I.
        margin: in the unit of the values; if less is better, as a share of the better value.
        less: whether less is better, as of a cost. Amounts that are the same under all seeds, such as numbers of judged
            responses, are then compared as they are.
    """
    found: dict[tuple[str, str], float | None] = {}
    for a, b in itertools.permutations(methods, 2):
        a_SI, b_SI = values(a, b)
        lead_SI = (1 + margin) * b_SI - a_SI if less else a_SI - b_SI + margin
        mean = estimate_mean(_by_item(whole(lead_SI))) if lead_SI.size else None
        if mean is None:
            found[a, b] = None
        elif mean.error:
            found[a, b] = float(stdtr(mean.df, -mean.value / mean.error))
        else:
            found[a, b] = float(mean.value < 0) if less else None
    return found


def find_beaten(methods: Sequence[str], x: Tests, y: Tests) -> dict[str, str]:
    """The methods that are off the front beyond doubt, each with the method that beats it most clearly.

    Each p is corrected for the two ways to beat a method and for the number of other methods (Bonferroni), so a method
    that nothing beats is taken off the front with a probability of at most 5 %.
    """
    found = {}
    for method in methods:
        by = {other: _p_beats(other, method, x, y) for other in methods if other != method}
        best = min(by, key=lambda other: by[other], default=method)
        if by and by[best] * len(by) <= ALPHA:
            found[method] = best
    return found


def _p_beats(a: str, b: str, x: Tests, y: Tests) -> float:
    """The p of the test that a is better than b in one quantity and not worse in the other."""
    ps = x[a, b], y[a, b], x[b, a], y[b, a]
    if None in ps:
        return 1.0
    x_holds, y_holds, x_back, y_back = (p for p in ps if p is not None)
    return 2 * min(max(1 - x_back, y_holds), max(1 - y_back, x_holds))


def _by_item(x_SI: Array) -> Array:
    """The values, with seeds in place of items if there is one item."""
    return x_SI if x_SI.shape[1] > 1 else x_SI.T
