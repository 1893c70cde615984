"""Results by held-out prompt: a policy's mean, and its change from another policy, with intervals over prompts.

Screen and report use these, so that they show the same numbers.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from dnpo.stats.intervals import Array, Estimate, estimate_mean
from dnpo.stats.paired import Comparison, compare_paired

if TYPE_CHECKING:
    import pyarrow as pa


def by_prompt(items: "pa.Table", kind: str, column: str) -> dict[str, float]:
    """Return the mean over each prompt's responses: NaN for prompts without a value, empty if no prompt has one.

    Args:
        items: rows of :class:`dnpo.records.Item`.
        kind: the kind of responses that count: ``human``, ``greedy`` or ``sample``.
        column: the column to average, such as ``score``.
    """
    found: dict[str, list[float]] = {}
    rows = zip(items["id"].to_pylist(), items["kind"].to_pylist(), items[column].to_pylist(), strict=True)
    for id, of_kind, value in rows:
        if of_kind == kind:
            found.setdefault(id, []).extend(() if value is None else (float(value),))
    means = {id: sum(values) / len(values) if values else math.nan for id, values in found.items()}
    return {} if all(map(math.isnan, means.values())) else means


def loss_by_prompt(items: "pa.Table") -> dict[str, float]:
    """Return the loss of each human response, scaled so that the mean over responses is the loss per token.

    Args:
        items: rows of :class:`dnpo.records.Item`. The result is empty if they lack log-probabilities.
    """
    import pyarrow.compute as pc

    rows = items.filter(pc.field("kind") == "human")
    logprobs, tokens = rows["logprob"].to_pylist(), rows["tokens"].to_pylist()
    if not logprobs or None in logprobs:
        return {}
    length = sum(tokens) / len(tokens)
    return {id: -logprob / length for id, logprob in zip(rows["id"].to_pylist(), logprobs, strict=True)}


def mean(x_SI: Array, share: bool = False) -> Estimate:
    """Estimate a mean over seeds and prompts (S × I); prompts without a value under some seed are left out.

    Args:
        share: the values lie between 0 and 1, and so does the interval (Wilson's).
    """
    whole = x_SI[:, ~np.isnan(x_SI).any(0)]
    found = estimate_mean(whole)
    if found is None:
        return Estimate(float(np.nanmean(x_SI)))
    return found.share(whole.shape[1]) if share else found.estimate()


def change(after: dict[str, float], before: dict[str, float]) -> Comparison | None:
    """Compare two policies on the same prompts; None if there are fewer than two prompts, or not the same ones."""
    if len(after) < 2 or after.keys() != before.keys():
        return None
    a, b = list(after.values()), [before[key] for key in after]
    return compare_paired(a, b, kind="scores", interval="t", missing="drop")
