"""Further measurements for objectives, in every micro-batch: doubtful labels, and drift.

A watch adds numbers to the :class:`Facts` that its objective reads. It may have a state, which checkpoints include.
Shapes: B pairs, N completion tokens of their responses, the chosen ones first, H hidden size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import sigmoid

from dnpo import ranks
from dnpo.optimise.objective import Facts, PairLogps, drift, log_ratio_gap, percentile
from dnpo.policy.logprobs import ROWS, Head, Tally, sum_by_sequence, tiles
from dnpo.policy.packing import Packed


class States(NamedTuple):
    """A model's last hidden states that predict the N completion tokens, and its output head."""

    hidden_NH: Tensor
    head: Head


class Seen(NamedTuple):
    """The data of a micro-batch that a watch reads.

    Attributes:
        step: the policy step, from 0.
        numbers: the numbers of its pairs.
        packed: its sequences: the chosen responses, then the rejected ones if these are read.
        policy, reference: the log-probabilities of the responses.
        states: the policy's hidden states, with gradient.
        frozen: the reference's hidden states, if the watch reads them in every step.
    """

    step: int
    numbers: Sequence[int]
    packed: Packed
    policy: PairLogps
    reference: PairLogps
    states: States
    frozen: States | None


class Moments(NamedTuple):
    """Moments of the reference's hidden states on all chosen responses: each response's mean, and overall variances."""

    mean_PH: Tensor
    variance_H: Tensor


class Watch:
    """Measures numbers for an objective; this base class measures nothing.

    Attributes:
        reads_states: whether it reads the reference's hidden states of all completion tokens in every step.
        reads_moments: whether it reads the reference's :class:`Moments`, computed once before the training.
    """

    reads_states = False
    reads_moments = False

    def prepare(self, moments: Moments) -> None:
        """Receive the moments, which are computed before the training if ``reads_moments``."""

    def measure(self, facts: Facts, seen: Seen) -> tuple[Facts, dict[str, Tensor]]:
        """Add to the facts of a micro-batch; the metrics are one number for each pair."""
        return facts, {}

    def end_step(self) -> None:
        """Called at the end of a policy step."""

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""


class Suspects(Watch):
    """Finds labels in which the policy has less confidence than in recent labels (SPA, equations 9, 11 and 12).

    The threshold is a percentile of the confidences in the last pairs before the step, in training order. So it does
    not depend on micro-batches. The metrics also report the labels that are suspect by the confidence of the policy
    itself, without extrapolation, and those that are suspect by both.

    Args:
        beta: preference temperature of the confidence σ(margin).
        extrapolation: λ; if it is 0, no hidden states are read.
        share: the percentile, from 0 to 1.
        window: number of last pairs.
        start: the first policy step that has suspects.
    """

    def __init__(self, beta: float, extrapolation: float, share: float, window: int, start: int) -> None:
        self.beta, self.extrapolation, self.share, self.window, self.start = beta, extrapolation, share, window, start
        self.reads_states = extrapolation > 0
        self.recent: list[list[float]] = [[], []]  # confidences of the extrapolated policy, and of the policy itself
        self.present: list[list[float]] = [[], []]  # the same for the present step

    @torch.no_grad()
    def measure(self, facts: Facts, seen: Seen) -> tuple[Facts, dict[str, Tensor]]:
        """Add ``suspect_B``."""
        plain_B = self._confidence(seen.policy.detach(), seen.reference)
        confidence_B = plain_B if seen.frozen is None else self._confidence(self._extrapolate(seen), seen.reference)
        found = [torch.zeros_like(plain_B), torch.zeros_like(plain_B)]
        for which, value_B in enumerate((confidence_B, plain_B)):
            if seen.step >= self.start and self.recent[which]:
                found[which] = (value_B < percentile(self.recent[which], self.share)).to(plain_B.dtype)
            self.present[which] += value_B.tolist()
        suspect_B, too_B = found
        metrics = {
            "suspects/confidence": confidence_B,
            "suspects/share": suspect_B,
            "suspects/share_plain": too_B,
            "suspects/share_both": suspect_B * too_B,
        }
        return facts._replace(suspect_B=suspect_B), metrics

    def end_step(self) -> None:
        """Add the confidences of all ranks' pairs, in their order, to the window."""
        if ranks.world() > 1:
            self.present = [ranks.join_shares(present) for present in self.present]
        self.recent = [(old + new)[-self.window :] for old, new in zip(self.recent, self.present, strict=True)]
        self.present = [[], []]

    def state_dict(self) -> dict[str, Any]:
        """The window."""
        return {"recent": self.recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the window of a checkpoint."""
        self.recent = state["recent"]

    def _confidence(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        return sigmoid(self.beta * log_ratio_gap(policy, reference))

    def _extrapolate(self, seen: Seen) -> PairLogps:
        assert seen.frozen is not None, "the reference's hidden states are read"
        logp_N = extrapolated_logps(seen.states, seen.frozen, seen.packed.target_N, self.extrapolation)
        chosen_B, rejected_B = sum_by_sequence(logp_N, seen.packed.completions_S).chunk(2)
        return PairLogps(chosen_B, rejected_B)


class Drift(Watch):
    """Measures the distance of the mean hidden states of chosen responses from the reference's."""

    reads_moments = True

    def __init__(self) -> None:
        self.moments: Moments | None = None

    def prepare(self, moments: Moments) -> None:
        """Receive the reference's means and variances."""
        self.moments = moments

    def measure(self, facts: Facts, seen: Seen) -> tuple[Facts, dict[str, Tensor]]:
        """Add ``drift_B``."""
        assert self.moments is not None, "they are computed before the training"
        count = len(seen.numbers)
        lengths = seen.packed.completions[:count]
        policy_BH = mean_by_sequence(seen.states.hidden_NH[: sum(lengths)], seen.packed.completions_S[:count])
        reference_BH = self.moments.mean_PH[list(seen.numbers)].to(policy_BH)
        drift_B = drift(policy_BH, reference_BH, self.moments.variance_H.to(policy_BH))
        return facts._replace(drift_B=drift_B), {"drift/states": drift_B.detach()}


@torch.no_grad()
def extrapolated_logps(policy: States, reference: States, target_N: Tensor, by: float) -> Tensor:
    """log softmax((1 + λ) z_θ − λ z_r)[target] of each token, shape N, one tile of the vocabulary at a time.

    It is (1 + λ) log p_θ − λ log p_r − log Z, where Z is the sum of p_θ^(1 + λ) p_r^−λ over the vocabulary (SPA,
    equation 12).

    Args:
        by: λ.
    """
    heads = [states.head.cast(states.hidden_NH.device) for states in (policy, reference)]
    parts = []
    for start in range(0, len(target_N), ROWS):
        span = slice(start, start + ROWS)
        tally = Tally(target_N[span])
        for first, end in tiles(heads[0]):
            logits_NC = heads[0].tile(policy.hidden_NH[span], first, end)
            frozen_NC = heads[1].tile(reference.hidden_NH[span], first, end)
            tally.add(logits_NC.mul_(1 + by).sub_(frozen_NC, alpha=by), first)
        parts.append(tally.logps()[0])
    return torch.cat(parts) if parts else torch.zeros(0, device=target_N.device)


def mean_by_sequence(value_NH: Tensor, lengths_S: Tensor) -> Tensor:
    """Means over the tokens of each sequence, S × H, in float32 or wider; 0 for a sequence without tokens."""
    reduce: Any = torch.segment_reduce
    wide_NH = value_NH.to(torch.promote_types(value_NH.dtype, torch.float32))
    total_SH: Tensor = reduce(wide_NH, "sum", lengths=lengths_S, initial=0.0, unsafe=True)
    return total_SH / lengths_S.clamp(min=1).unsqueeze(-1)


@torch.no_grad()
def measure_moments(
    hidden: Callable[[Packed], Tensor], batches: Iterable[tuple[Sequence[int], Packed]], pairs: int
) -> Moments:
    """Compute the :class:`Moments` of a model from batches of chosen responses.

    Args:
        hidden: packed sequences → hidden states of their completion tokens.
        batches: the numbers of the pairs of each batch, and their packed chosen responses.
        pairs: number of all pairs.
    """
    means: dict[int, Tensor] = {}
    total = square = torch.zeros(1, dtype=torch.float64)
    tokens = 0
    for numbers, packed in batches:
        hidden_NH = hidden(packed)
        means |= dict(zip(numbers, mean_by_sequence(hidden_NH, packed.completions_S).cpu(), strict=True))
        wide_NH = hidden_NH.double()
        total, square = total + wide_NH.sum(0).cpu(), square + wide_NH.square().sum(0).cpu()
        tokens += len(wide_NH)
    variance_H = (square / max(tokens, 1) - (total / max(tokens, 1)).square()).clamp(min=0)
    empty_H = torch.zeros(len(variance_H))
    mean_PH = torch.stack([means.get(number, empty_H) for number in range(pairs)])
    return Moments(mean_PH, variance_H.to(mean_PH.dtype))
