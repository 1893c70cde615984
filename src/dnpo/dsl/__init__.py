"""Labelling: decide which response of a pair is chosen and which is rejected.

A labeller gets the candidates of one prompt with their scores, and returns the pairs to make of them. Candidates are
the human response, the data's own rejected one, or K generated ones, depending on the labeller. ``rules.py`` has the
labellers, ``strength.py`` how sure a label is.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from dnpo.dsl.rules import (
    AgainstHuman,
    AmongGenerated,
    Best,
    BestWorst,
    Candidate,
    FirstTwo,
    GivenPairs,
    HigherScoreChosen,
    HumanChosen,
    Labelled,
    RandomPairs,
    Ranked,
    Right,
)
from dnpo.dsl.strength import AskedStrength, Compare, HardLabels, RewardStrength, with_strengths
from dnpo.records import HUMAN, Pair, Prompt, Response, Verdict
from dnpo.stats.sampling import pass_at_k

__all__ = [
    "AgainstHuman",
    "AmongGenerated",
    "AskedStrength",
    "Best",
    "BestWorst",
    "Candidate",
    "Counts",
    "FirstTwo",
    "GivenPairs",
    "HardLabels",
    "HigherScoreChosen",
    "HumanChosen",
    "Labelled",
    "Labeller",
    "RandomPairs",
    "Ranked",
    "RewardStrength",
    "Right",
    "Strength",
    "add_up",
    "explain",
    "label",
    "label_some",
    "with_strengths",
]


class Labeller(Protocol):
    """Makes pairs of candidates, configured by ``dsl=…``.

    Attributes:
        needs_scores: whether candidates need scores of a judge.
        admits_human: whether the human response is a candidate, always the first one.
        gives_pairs: whether it gives both sides of pairs; otherwise it gives only chosen responses.
        fewest: how many generated candidates it needs for each prompt.
        nothing: the reason under which prompts without a pair are counted, one of ``REASONS``; "" if they are not
            counted.
    """

    needs_scores: ClassVar[bool]
    admits_human: ClassVar[bool]
    gives_pairs: ClassVar[bool]
    fewest: ClassVar[int]
    nothing: ClassVar[str]

    @property
    def right_from(self) -> float | None:
        """The lowest score of a right answer, for pass@k; None if pass@k is not computed."""

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """The pairs to make of the candidates: the human response if it is admitted, then samples by number."""


class Strength(Protocol):
    """Says how sure the labels are, configured by ``strength=…``.

    Attributes:
        asks: whether it asks the judge to compare both sides.
        reads_scores: whether it reads scores as rewards in nats.
    """

    asks: ClassVar[bool]
    reads_scores: ClassVar[bool]

    def __call__(self, prompts: Mapping[str, Prompt], pairs: Sequence[Pair], compare: Compare | None) -> list[float]:
        """p(y⁺ ≻ y⁻) of each pair."""


class Labels(NamedTuple):
    """The pairs of an iteration, and counts of what was dropped or flipped."""

    pairs: list[Pair]
    counts: dict[str, int | float]


class Counts(NamedTuple):
    """Counts for some prompts of an iteration.

    Attributes:
        events: how often each event occurred.
        right: for each prompt, the number of samples and the number of right ones, for pass@k.
    """

    events: dict[str, int]
    right: list[tuple[int, int]]


REASONS = {
    "identical": "responses are identical (a higher generate.temperature varies them)",
    "unscored": "pairs lack a score (look at judge.…; dsl.unscored=keep_human keeps them, labelled by origin)",
    "tied": "prompts have candidates with equal scores",
    "wrong": "prompts have no right answer",
}


def explain(counts: Mapping[str, int | float]) -> str:
    """Explain why :func:`label` made no pair, and what to do about it."""
    found = [f"{counts[name]:,} {reason}" for name, reason in REASONS.items() if counts.get(name)]
    passed = [f"{name.replace('_at_', '@')} is {counts[name]:.3g} so far" for name in counts if "pass_at" in name]
    return "; ".join([*found, *passed]) or "the labeller (dsl=…) has dropped all of them"


def label(
    labeller: Labeller,
    prompts: Sequence[Prompt],
    human: Sequence[Response],
    generated: Sequence[Response],
    verdicts: Sequence[Verdict],
    iteration: int = 0,
) -> Labels:
    """Make the pairs of every prompt that has responses, in the order of the responses, and count what is left out."""
    pairs, counts = label_some(labeller, prompts, human, generated, verdicts, iteration)
    return Labels(pairs, add_up([counts]))


def label_some(
    labeller: Labeller,
    prompts: Sequence[Prompt],
    human: Sequence[Response],
    generated: Sequence[Response],
    verdicts: Sequence[Verdict],
    iteration: int,
) -> tuple[list[Pair], Counts]:
    """Do the work of :func:`label` for some prompts of an iteration; :func:`add_up` adds up the counts.

    ``generated`` has the responses of the policy, or the data's own rejected ones. Two kinds of samples are left out
    and counted: a sample with the same tokens as an earlier one (``repeated``), and a sample with the same tokens as
    the human response, if that is a candidate (``identical``): such a pair carries no signal. If the labeller needs
    scores, ``unscored`` counts the generated responses without a score, and also those whose human counterpart has
    none.
    """
    prompt_of, human_of = {row.id: row for row in prompts}, {row.id: row for row in human}
    score_of = {(v.id, v.source, v.sample): v.score for v in verdicts}

    def candidate(response: Response) -> Candidate:
        return Candidate(response, score_of.get((response.id, response.source, response.sample)))

    counts: Counter[str] = Counter()
    pairs: list[Pair] = []
    right: list[tuple[int, int]] = []  # for each prompt: samples, right ones
    for id, responses in _by_prompt(generated).items():
        prompt, distinct = prompt_of[id], _distinct(responses)
        fixed = [candidate(human_of[id])] if labeller.admits_human else []
        new = [candidate(each) for each in distinct if all(each.token_ids != old.response.token_ids for old in fixed)]
        counts["repeated"] += len(responses) - len(distinct)
        counts["identical"] += len(distinct) - len(new)
        if labeller.needs_scores:
            lacking = any(each.score is None for each in fixed)
            counts["unscored"] += sum(lacking or each.score is None for each in new)
        if labeller.right_from is not None:
            scores = [candidate(response).score or 0.0 for response in responses]
            right.append((len(scores), sum(score >= labeller.right_from for score in scores)))
        labelled = labeller(prompt, [*fixed, *new]) if new else []
        if not labelled and labeller.nothing:
            counts["identical" if len(new) < labeller.fewest <= len(responses) else labeller.nothing] += 1
        pairs += [make_pair(prompt, chosen, rejected, iteration) for chosen, rejected in labelled]
    counts["pairs"], counts["flipped"] = len(pairs), sum(pair.flipped for pair in pairs)
    return pairs, Counts(dict(counts), right)


def add_up(some: Sequence[Counts]) -> dict[str, int | float]:
    """The counts of an iteration from the counts of its prompts, in their order."""
    counts: Counter[str] = Counter()
    for each in some:
        counts.update(each.events)
    always = {name: counts[name] for name in ("pairs", "flipped", "identical", "unscored")}
    more = {name: counts[name] for name in (*REASONS, "repeated") if counts[name]}
    return {**always, **more, **_pass_at([prompt for each in some for prompt in each.right])}


def _pass_at(right: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Compute pass@1 and pass@K from each prompt's numbers of samples and of right ones."""
    most = max((count for count, _ in right), default=0)
    found = {}
    for k in dict.fromkeys((1, most) if most else ()):
        enough = [pass_at_k(count, hits, k) for count, hits in right if count >= k]
        found[f"pass_at_{k}"] = sum(enough) / len(enough)
    return found


def _distinct(responses: Iterable[Response]) -> list[Response]:
    """The responses, without repetitions of an earlier one token for token."""
    found: dict[tuple[int, ...], Response] = {}
    for response in responses:
        found.setdefault(tuple(response.token_ids), response)
    return list(found.values())


def make_pair(prompt: Prompt, chosen: Candidate, rejected: Candidate | None, iteration: int) -> Pair:
    """The pair of two candidates, or of a chosen one alone."""
    one, other = chosen.response, None if rejected is None else rejected.response
    return Pair(
        id=prompt.id,
        messages=prompt.messages,
        prompt_ids=prompt.token_ids,
        chosen=one.text,
        rejected="" if other is None else other.text,
        chosen_ids=one.token_ids,
        rejected_ids=[] if other is None else other.token_ids,
        chosen_source=one.source,
        rejected_source="" if other is None else other.source,
        chosen_score=chosen.score,
        rejected_score=None if rejected is None else rejected.score,
        flipped=other is not None and other.source == HUMAN,
        chosen_sample=one.sample,
        rejected_sample=0 if other is None else other.sample,
        iteration=iteration,
    )


def _by_prompt(responses: Iterable[Response]) -> dict[str, list[Response]]:
    """The responses of each prompt, by sample; the prompts in the order of their first response."""
    found: dict[str, list[Response]] = {}
    for response in responses:
        found.setdefault(response.id, []).append(response)
    return {id: sorted(some, key=lambda response: response.sample) for id, some in found.items()}
