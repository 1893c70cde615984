"""Labelling: decide which response of a pair is chosen and which is rejected.

A labeller gets the candidates of one prompt with their scores, and returns the pairs to make of them. Candidates are
the human response, the data's own rejected one, or K generated ones, depending on the labeller. ``strength.py``
computes how sure a label is.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from dnpo.dsl.strength import AskedStrength, Compare, HardLabels, RewardStrength, with_strengths
from dnpo.errors import DataError
from dnpo.records import GIVEN, HUMAN, Pair, Prompt, Response, Verdict
from dnpo.seeding import derive
from dnpo.settings import Count, Natural
from dnpo.stats.sampling import pass_at_k
from dnpo.wording import plural

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


class Candidate(NamedTuple):
    """A response with its score; None if there is none."""

    response: Response
    score: float | None


class Labelled(NamedTuple):
    """The sides of a pair; ``rejected`` is None if only a chosen response is given."""

    chosen: Candidate
    rejected: Candidate | None


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
        """The pairs to make of the candidates: these are the human response, if admitted, then samples by number."""


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
    "unscored": "responses lack a score (look at judge.…)",
    "tied": "prompts have candidates with equal scores",
    "wrong": "prompts have no right answer",
}


def explain(counts: Mapping[str, int | float], labeller: Labeller) -> str:
    """Explain why :func:`label` made no pair, and what to do about it."""
    found = [f"{counts[name]:,} {reason}" for name, reason in REASONS.items() if counts.get(name)]
    if counts.get("unscored") and isinstance(labeller, HigherScoreChosen):
        found.append("dsl.unscored=keep_human keeps pairs that lack a score, labelled by origin")
    passed = [
        f"{name.replace('_at_', '@')} is {counts[name]:.3g} in this iteration" for name in counts if "pass_at" in name
    ]
    return "; ".join([*found, *passed]) or "the labeller (dsl=…) has dropped all of them"


def summarise(counts: Mapping[str, int | float]) -> str:
    """Say how many pairs were made and what was left out, such as ``14 pairs, 38 identical``."""
    left_out = [f"{counts[name]:,} {name}" for name in REASONS if counts.get(name)]
    return ", ".join([plural(int(counts["pairs"]), "pair"), *left_out])


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

    ``generated`` has the responses of the policy, or the data's own rejected ones. A sample with the same tokens as an
    earlier one is left out and counted as ``repeated``. If the human response is a candidate, a sample with its tokens
    is left out and counted as ``identical``, since a pair of equal responses carries no signal. If the labeller needs
    scores, ``unscored`` counts the samples without a score, and those whose human counterpart has none.
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
            scored = sum(not labeller.needs_scores or each.score is not None for each in new)
            if len(new) < labeller.fewest <= len(responses):
                counts["identical"] += 1
            elif not scored < labeller.fewest <= len(new):  # the others are counted as unscored
                counts[labeller.nothing] += 1
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


# --- labellers, which compare generated responses with the human one or with each other


class AgainstHuman:
    """Base class of labellers that compare each generated response with the human one."""

    needs_scores: ClassVar[bool] = False
    admits_human: ClassVar[bool] = True
    gives_pairs: ClassVar[bool] = True
    fewest: ClassVar[int] = 1
    nothing: ClassVar[str] = ""

    @property
    def right_from(self) -> float | None:
        """None: pass@k is not computed."""
        return None


class AmongGenerated(AgainstHuman):
    """Base class of labellers that compare generated responses with each other, by their scores."""

    needs_scores: ClassVar[bool] = True
    admits_human: ClassVar[bool] = False
    fewest: ClassVar[int] = 2
    nothing: ClassVar[str] = "tied"


@dataclass(frozen=True)
class HumanChosen(AgainstHuman):
    """The human response is always chosen (SPIN, equation 4.7 of its paper): labels by origin."""

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """The human response against each generated one."""
        human, *generated = candidates
        return [Labelled(human, new) for new in generated]


@dataclass(frozen=True)
class HigherScoreChosen(AgainstHuman):
    """The response with the higher score is chosen, the human one at a tie (DNPO, equation 2): labels by quality.

    Args:
        unscored: what happens to a pair that lacks a score: ``drop`` leaves it out, ``keep_human`` chooses the human
            response, ``fail`` ends the run.
    """

    needs_scores: ClassVar[bool] = True

    unscored: Literal["drop", "keep_human", "fail"] = "drop"

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """s′ > s chooses the generated response; if a score is missing, ``unscored`` decides."""
        human, *generated = candidates
        return [pair for new in generated for pair in self._label(prompt, human, new)]

    def _label(self, prompt: Prompt, human: Candidate, new: Candidate) -> list[Labelled]:
        if human.score is None or new.score is None:
            if self.unscored == "fail":
                raise DataError(
                    f"dsl.unscored=fail: the {'human' if human.score is None else 'generated'} response to "
                    f"{prompt.id} has no score; drop such pairs (drop), or choose the human response (keep_human)"
                )
            return [] if self.unscored == "drop" else [Labelled(human, new)]
        return [Labelled(new, human) if new.score > human.score else Labelled(human, new)]


@dataclass(frozen=True)
class BestWorst(AmongGenerated):
    """The best generated response against one of the worst (HG-DPO paper, section 3; Self-Rewarding).

    Args:
        loser_rank: which response is rejected: 1 for the worst, 2 for the second worst, … If there are too few
            responses, the second best is rejected.
    """

    loser_rank: Count = 1

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """One pair, or none if both sides have the same score."""
        ranked = by_score(candidates)
        if len(ranked) < 2:
            return []
        return differing(ranked[0], ranked[max(len(ranked) - self.loser_rank, 1)])


@dataclass(frozen=True)
class Ranked(AmongGenerated):
    """The best against the worst, the second best against the second worst, … (OSP paper, ranked pairing).

    K responses make ⌊K/2⌋ pairs; the middle one of an odd K is left out.
    """

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """The pairs whose sides differ in score."""
        ranked = by_score(candidates)
        return [pair for i in range(len(ranked) // 2) for pair in differing(ranked[i], ranked[-1 - i])]


@dataclass(frozen=True)
class RandomPairs(AmongGenerated):
    """Random pairs of generated responses, as a control for :class:`Ranked`: also ⌊K/2⌋ pairs, the better side chosen.

    Args:
        seed: seed of the pairing, together with the prompt's id.
    """

    seed: Natural = 0

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """The pairs whose sides differ in score."""
        order = list(by_score(candidates))
        random.Random(derive(self.seed, "pairing", prompt.id)).shuffle(order)
        sides = [by_score(order[2 * i : 2 * i + 2]) for i in range(len(order) // 2)]
        return [pair for better, worse in sides for pair in differing(better, worse)]


@dataclass(frozen=True)
class FirstTwo(AmongGenerated):
    """Two samples. The one with the higher score is chosen; at a tie, the second one (SPA, equation 8)."""

    nothing: ClassVar[str] = "identical"

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """One pair."""
        two = [(each.score, each) for each in candidates if each.score is not None][:2]
        if len(two) < 2:
            return []
        (score, first), (other, second) = two
        return [Labelled(first, second) if score > other else Labelled(second, first)]


@dataclass(frozen=True)
class Best(AmongGenerated):
    """The best generated response alone, for objectives that read no rejected one (RAFT)."""

    gives_pairs: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    nothing: ClassVar[str] = ""  # then all samples lack a score, and are counted one by one

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """One response without a counterpart; the first of several best ones."""
        return [Labelled(best, None) for best in by_score(candidates)[:1]]


@dataclass(frozen=True)
class Right(AmongGenerated):
    """The right answers alone, at most ``cap`` a prompt (ReST-EM).

    Args:
        cap: maximum number of right answers for each prompt, drawn at random; 0: all.
        score: lowest score of a right answer.
        seed: seed of that draw, together with the prompt's id.
    """

    gives_pairs: ClassVar[bool] = False
    fewest: ClassVar[int] = 1
    nothing: ClassVar[str] = "wrong"

    cap: Natural = 10
    score: Natural = 100
    seed: Natural = 0

    @property
    def right_from(self) -> float | None:
        """The setting ``score``."""
        return self.score

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """Responses without a counterpart, in the order of their samples."""
        right = [each for each in candidates if each.score is not None and each.score >= self.score]
        if self.cap and len(right) > self.cap:
            draw = random.Random(derive(self.seed, "cap", prompt.id))
            right = [right[i] for i in sorted(draw.sample(range(len(right)), self.cap))]
        return [Labelled(each, None) for each in right]


@dataclass(frozen=True)
class GivenPairs(AgainstHuman):
    """The pair that the data have, unchanged, if nothing is generated (``rollout=given``)."""

    fewest: ClassVar[int] = 0

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """The human response, which is the chosen one in the data, against the rejected one."""
        human, *given = candidates
        return [Labelled(human, each) for each in given if each.response.source == GIVEN]


def by_score(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that have a score, the best first; candidates with equal scores keep their order."""
    return sorted((each for each in candidates if each.score is not None), key=lambda each: -(each.score or 0.0))


def differing(chosen: Candidate, rejected: Candidate) -> list[Labelled]:
    """The pair of two candidates, unless their scores are equal: then there is nothing to learn from it."""
    return [] if chosen.score == rejected.score else [Labelled(chosen, rejected)]
