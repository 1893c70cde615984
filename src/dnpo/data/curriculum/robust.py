"""The worst distribution near the labelled pairs, as weights and shifts (adversarial preference optimisation).

A pair has ξ = σ(implicit reward of the chosen response − that of the rejected one), and the loss ℓ(ξ) = −log ξ. Among
all distributions in a 1-Wasserstein ball around the pairs, the worst one maximises the mean loss. With ℓ replaced by
the largest of K tangents ℓ_k this is a linear programme:

    max_{a,q}  (1/N) Σ_i Σ_k a_ik ℓ_k(ξ_i − q_ik/a_ik)
    s.t.       (1/N) Σ_i Σ_k |q_ik| ≤ ε,   Σ_k a_ik = 1,   a ≥ 0,   ξ_i − q_ik/a_ik ∈ [ξ_min, 1]

ℓ is convex and decreasing. So a unit of the budget increases the loss more if it moves mass all the way to ξ_min, not a
part of the way, and more if the mass comes from a smaller ξ. So sorting solves the programme: in the order of rising ξ,
all mass is moved to ξ_min until the budget is spent.

Shapes: N pairs, K tangents, P points.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dnpo.data.curriculum import Context, Counts, Curriculum
from dnpo.data.curriculum.earlier import hash_of
from dnpo.errors import DataError, SettingsError
from dnpo.records import Pair
from dnpo.settings import NonNegative, Positive, Range

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

ROUNDING = 1e-12  # a pair is not split for a smaller share of its mass
Pieces = Annotated[int, Range(ge=2)]
FIELDS = [field.name for field in fields(Pair)]
values_of = attrgetter(*FIELDS)


@dataclass(frozen=True)
class Robust(Curriculum):
    """Weighs and shifts pairs, so that the loss becomes the loss of the worst distribution near them.

    If the share m of a pair moves to ξ_min, the pair becomes two rows: weight 1 − m with shift 0, and weight m with
    shift ξ − ξ_min. A row of weight 0 is left out. At most one pair is split. The scores of the pairs have to be
    implicit rewards, in nats, of the current policy against the *initial* one.

    Args:
        epsilon: how far the mean ξ may fall, the radius of the ball; 0 leaves all pairs as they are.
        xi_min: the smallest ξ. Without it the worst loss is infinite for any ``epsilon`` above 0.
        pieces: number of tangents of −log ξ, at geometric points from ``xi_min`` to 1; only the reported loss depends
            on it, not the rows.
        reading: ``outside``: a row's weight multiplies its loss, as the worst distribution requires. ``inside``: it is
            inside the logarithm, as printed in the paper, where it has no effect on gradients: all rows have weight 1.

    Raises:
        SettingsError: ``xi_min`` is not below 1.
    """

    needs_scores = True

    epsilon: NonNegative = 0.05
    xi_min: Positive = 0.05
    pieces: Pieces = 32
    reading: Literal["outside", "inside"] = "outside"

    def __post_init__(self) -> None:
        if self.xi_min >= 1:
            raise SettingsError(f"xi_min={self.xi_min}: expected a number below 1, since ξ is a probability")

    def __call__(
        self, pairs: Sequence[Pair], history: Sequence[Sequence[Pair]], context: Context
    ) -> tuple[list[Pair], Counts]:
        """The rows in the order of the pairs, and the mean loss of the pairs and of the worst distribution."""
        import numpy as np

        if not pairs:
            return [], {"moved": 0, "split": 0}
        xi_N = np.clip(sigmoid(self._margins(pairs)), self.xi_min, 1.0)
        mass_N = move(xi_N, self.epsilon, self.xi_min, lambda i: (hash_of(pairs[i].id), i))
        rows = list(pairs)
        split = np.flatnonzero((mass_N > 0) & (mass_N < 1))
        moved, at = np.flatnonzero(mass_N == 1), FIELDS.index("shift")
        for i, shift in zip(moved.tolist(), (xi_N[moved] - self.xi_min).tolist(), strict=True):
            values = [*values_of(pairs[i])]
            values[at] = shift
            rows[i] = Pair(*values)  # like replace(), in half the time
        for i in split.tolist():  # at most one
            rows[i : i + 1] = self._split(pairs[i], float(mass_N[i]), float(xi_N[i]) - self.xi_min)
        points_K = tangent_points(self.xi_min, self.pieces)
        return rows, {
            "moved": int((mass_N > 0).sum()),
            "split": len(split),
            "loss": float(tangent_loss(xi_N, points_K).mean()),
            "worst_loss": worst_loss(xi_N, mass_N, self.xi_min, points_K),
        }

    def _split(self, pair: Pair, mass: float, shift: float) -> list[Pair]:
        """The two rows of a pair of which only a part is moved."""
        weights = (1 - mass, mass) if self.reading == "outside" else (1.0, 1.0)
        return [replace(pair, weight=weights[0]), replace(pair, weight=weights[1], shift=shift)]

    def _margins(self, pairs: Sequence[Pair]) -> "Array":
        """The differences of scores, in nats; shape N."""
        import numpy as np

        margins = []
        for pair in pairs:
            chosen, rejected = pair.chosen_score, pair.rejected_score
            if chosen is None or rejected is None:
                side = "chosen" if chosen is None else "rejected"
                raise DataError(
                    f"curriculum.epsilon={self.epsilon}: the {side} response to {pair.id} has no score, but the "
                    "weights follow from the implicit rewards of both; choose judge=implicit, and a dsl that needs it"
                )
            if pair.weight != 1 or pair.shift:
                raise DataError(
                    f"curriculum.epsilon={self.epsilon}: the pair of {pair.id} has the weight {pair.weight:g} and the "
                    f"shift {pair.shift:g} already; expected pairs without them, so use it only once"
                )
            margins.append(chosen - rejected)
        if self.epsilon and len(pairs) > 1 and not any(margins):
            raise DataError(
                f"curriculum.epsilon={self.epsilon}: both responses of every pair have the same score, as if the "
                "policy were the initial one, so the worst distribution is arbitrary; use it from iteration 1 on"
            )
        return np.array(margins, float)


def sigmoid(x_N: "Array") -> "Array":
    """The logistic function 1/(1 + e^−x); 0.5 at 0, 0.731 at 1, 0.269 at −1."""
    from scipy.special import expit

    values_N: Array = expit(x_N)
    return values_N


def move(xi_N: "Array", epsilon: float, xi_min: float, tie: Callable[[int], Any]) -> "Array":
    """Solve the programme: compute m, the share of every pair's mass that moves from ξ to ξ_min.

    In the order of rising ξ, m is 1 until (1/N) Σ m (ξ − ξ_min) = ε. Example: for ξ = .9, .3 and .6 with ξ_min = .05
    and ε = .2, the budget is N ε = .6. Moving .3 costs .25; the remaining .35 moves the share .35/.55 of .6, so m = 0,
    1, .636.

    Args:
        xi_N: between ``xi_min`` and 1.
        tie: returns a sorting key for the number of a pair; it orders pairs of equal ξ if the budget ends among them.

    Returns:
        m, shape N. At most one value is neither 0 nor 1; pairs with ξ = ξ_min cannot move and have 0.
    """
    import numpy as np

    cost_N, budget = xi_N - xi_min, epsilon * len(xi_N)
    mass_N = (cost_N > 0).astype(float)
    sorted_N = np.sort(cost_N)
    last = int(np.searchsorted(np.cumsum(sorted_N), budget, side="right"))
    if last == len(xi_N):
        return mass_N
    cost = sorted_N[last]
    mass_N[cost_N >= cost] = 0
    left = max(budget - float(cost_N[cost_N < cost].sum()), 0.0) / cost
    equal = sorted(np.flatnonzero(cost_N == cost).tolist(), key=tie)
    whole = min(int(left + ROUNDING), len(equal))
    mass_N[equal[:whole]] = 1
    if whole < len(equal) and left - whole > ROUNDING:
        mass_N[equal[whole]] = left - whole
    return mass_N


def tangent_points(xi_min: float, pieces: int) -> "Array":
    """The points of the tangents, geometric from ξ_min to 1, such as .05, .224, 1. Shape K."""
    import numpy as np

    return np.geomspace(xi_min, 1.0, pieces)


def tangent_loss(xi_P: "Array", points_K: "Array") -> "Array":
    """The largest of the tangents of −log ξ at these points, −log t − (ξ − t)/t; shape P.

    With tangents at ½ and 1 the value at ¾ is max(.693 − .5, 0 + .25) = .25, below −log ¾ = .288.
    """
    import numpy as np

    # The tangents at neighbouring points s < t meet at log(t/s) / (1/s − 1/t); between two such points one is largest.
    s_k, t_k = points_K[:-1], points_K[1:]
    meet_k = np.log(t_k / s_k) / (1 / s_k - 1 / t_k)
    t_P = points_K[np.searchsorted(meet_k, xi_P)]
    loss_P: Array = 1 - np.log(t_P) - xi_P / t_P
    return loss_P


def worst_loss(xi_N: "Array", mass_N: "Array", xi_min: float, points_K: "Array") -> float:
    """The value of the programme, (1/N) Σ (1 − m) ℓ(ξ) + m ℓ(ξ_min), in nats; ℓ is the largest tangent.

    For one pair it is ℓ(ξ) + min(1, ε/(ξ − ξ_min)) (ℓ(ξ_min) − ℓ(ξ)).
    """
    import numpy as np

    loss_N, at_min = tangent_loss(xi_N, points_K), tangent_loss(np.array([xi_min]), points_K)[0]
    return float(((1 - mass_N) * loss_N + mass_N * at_min).mean())
