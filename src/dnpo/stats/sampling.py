"""Compute pass@k and the majority vote of several samples."""

from collections import Counter
from collections.abc import Hashable, Iterable
from math import prod
from typing import TypeVar

from dnpo.errors import DataError

Answer = TypeVar("Answer", bound=Hashable)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate, from ``samples`` samples, of the probability that at least one of ``k`` is right.

    1 − C(n−c, k) / C(n, k) for c right of n (Chen et al. 2021, "Evaluating large language models trained on code",
    equation 1), as the product 1 − Π_{i=n−c+1..n} (1 − k/i), which does not overflow.

    Raises:
        DataError: not 0 ≤ right ≤ samples, or not 1 ≤ k ≤ samples.
    """
    if not 0 <= right <= samples:
        raise DataError(f"pass@k: {right} of {samples} samples cannot be right")
    if not 1 <= k <= samples:
        raise DataError(f"pass@k: k is {k}; expected 1 to the number of samples, {samples}")
    if samples - right < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def majority(answers: Iterable[Answer | None]) -> Answer | None:
    """The most frequent answer (Wang et al. 2023, "Self-consistency").

    A sample without an answer is None and does not vote; if no sample votes, the result is None. Among equally frequent
    answers the first one wins. If samples are independent, this rule favours no answer, and it needs no random draw.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__, default=None)  # a Counter keeps the order of first appearance
