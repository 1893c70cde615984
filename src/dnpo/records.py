"""The rows that flow through a run: ``Prompt`` → ``Response`` → ``Verdict`` → ``Pair``.

A row is a frozen dataclass of plain values. ``tables.py`` reads and writes files of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Message = dict[str, str]
Finish = Literal["eos", "length"]

HUMAN = "human"
GIVEN = "given"


def policy_source(iteration: int) -> str:
    """The source of responses that the policy of this iteration generated."""
    return f"policy@{iteration}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation up to its next response, with the response that a human gave.

    Attributes:
        id: unique within its data.
        messages: ``role``/``content`` turns up to the response, without it.
        human: the text of the human response.
        family: task family of verifiable data, "" otherwise.
        answer: the verifiable answer, if there is one.
        needs: words that a complete response has to mention (verifiable data).
        token_ids: the rendered prompt, beginning-of-sequence included; empty until a tokenizer has seen it.
        rejected: the rejected text, if the data have a pair; ``human`` is then the chosen one.
        human_score: the data's rating of the human response.
        rejected_score: the data's rating of the rejected response.
    """

    id: str
    messages: list[Message]
    human: str
    family: str = ""
    answer: str | None = None
    needs: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    rejected: str | None = None
    human_score: float | None = None
    rejected_score: float | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One response to the prompt of the same id.

    Attributes:
        source: ``human``, ``given`` for the rejected response of a pair in the data, or ``policy@k``.
        token_ids: completion tokens; the last is end-of-sequence if ``finish`` is ``eos``, or if one was appended to a
            response that was cut (``rollout.append_eos``).
        tokens: number of completion tokens.
        finish: ``eos``, or ``length`` for one cut at the limit.
        logprob: log-probability of the completion under the policy that generated it, in nats; None for human ones.
        sample: its number among the responses of this source to the prompt, from 0.
    """

    id: str
    source: str
    text: str
    token_ids: list[int]
    tokens: int
    finish: Finish
    logprob: float | None = None
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on one response: a score, mostly 0-100, or None with the reason why there is none.

    Attributes:
        sample: number of the response among its source's responses to the prompt.
        disagreement: in points, the difference between the two orders of a comparison, or the standard deviation over
            the members of an ensemble; None if there is nothing to compare.
    """

    id: str
    source: str
    score: float | None
    reason: str = ""
    disagreement: float | None = None
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected response to one prompt, with the source, sample and score of each side.

    Pairs are unique by id, iteration, step, and both samples.

    Attributes:
        rejected: "" with no ``rejected_ids`` if a labeller chooses responses without rejecting any.
        flipped: whether a generated response was chosen over the human one.
        iteration: the iteration that labelled it.
        strength: p(y⁺ ≻ y⁻), how sure the label is; 1 for hard labels.
        weight: its weight in the loss of a step.
        shift: how much σ(margin) is lowered in the loss, for robust training.
        step: the policy step before which it was made, if that was during training (``rollout=live``).
        draws: how many policy steps trained on it, with ``rollout=live``.
    """

    id: str
    messages: list[Message]
    prompt_ids: list[int]
    chosen: str
    rejected: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_source: str
    rejected_source: str
    chosen_score: float | None
    rejected_score: float | None
    flipped: bool
    chosen_sample: int = 0
    rejected_sample: int = 0
    iteration: int = 0
    strength: float = 1.0
    weight: float = 1.0
    shift: float = 0.0
    step: int = 0
    draws: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """A response that was made and judged while a policy was trained; fields as in :class:`Response`.

    Attributes:
        rollout: the number of the rollout that it belongs to.
        step: the policy step before which that rollout was made.
        prompt_ids: the rendered prompt.
        score: the judge's; None without a judge, or if it gave none.
        reason: why there is no score.
        disagreement: as in :class:`Verdict`.
    """

    id: str
    source: str
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    tokens: int
    finish: Finish
    logprob: float | None
    sample: int
    score: float | None
    reason: str
    rollout: int
    step: int
    disagreement: float | None = None


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """log p_r(y⁺|x) and log p_r(y⁻|x) of a pair, in nats.

    Attributes:
        pair: its number among the pairs of the iteration.
    """

    pair: int
    chosen: float
    rejected: float


@dataclass(frozen=True, slots=True)
class Item:
    """The result of one held-out response, for comparisons that are paired over prompts.

    Attributes:
        id: of the prompt.
        kind: ``human``, ``greedy``, or ``sample``, of which there are several.
        sample: its number among the samples, 0 otherwise.
        score: None if the judge gave none.
        second: the second judge's score; None if there is none.
        right: whether it gives the prompt's answer; None if prompts have none.
        logprob: in nats, under the policy that is measured; None for human ones in files of earlier versions.
    """

    id: str
    family: str
    kind: Literal["human", "greedy", "sample"]
    sample: int
    score: float | None
    second: float | None
    right: bool | None
    tokens: int
    logprob: float | None


def mean_over_steps(steps: Sequence[Mapping[str, float]], name: str) -> float:
    """The mean of a metric over those training steps that have it, each weighted by its rows."""
    weights = [(step[name], step.get("rows", 1.0)) for step in steps if name in step]
    return sum(value * rows for value, rows in weights) / sum(rows for _, rows in weights)
