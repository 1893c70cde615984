"""The labellers: rules that make pairs of the candidates of one prompt.

``origin`` and ``score`` compare every generated response with the human one. The others compare generated responses
with each other, and do not admit the human one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from dnpo.errors import DataError
from dnpo.records import GIVEN, Prompt, Response
from dnpo.seeding import derive
from dnpo.settings import Count, Natural


class Candidate(NamedTuple):
    """A response with its score; None if there is none."""

    response: Response
    score: float | None


class Labelled(NamedTuple):
    """The sides of a pair; ``rejected`` is None if only a chosen response is given."""

    chosen: Candidate
    rejected: Candidate | None


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
    nothing: ClassVar[str] = "unscored"

    def __call__(self, prompt: Prompt, candidates: Sequence[Candidate]) -> list[Labelled]:
        """One response without a counterpart; the first of several best ones."""
        return [Labelled(best, None) for best in by_score(candidates)[:1]]


@dataclass(frozen=True)
class Right(AmongGenerated):
    """The right answers alone, at most ``cap`` a prompt (ReST-EM).

    Args:
        cap: how many right answers a prompt may give; 0: all. The seed draws them.
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
        """``score``."""
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
