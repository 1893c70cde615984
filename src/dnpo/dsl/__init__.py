"""Dynamic sample labelling: decide which response is chosen and which is rejected (DNPO paper, section 4.2).

A labeller turns prompts, a human and a generated response to each, and the verdicts on both into pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from dnpo.errors import DataError
from dnpo.records import Pair, Prompt, Response, Verdict


class Labeller(Protocol):
    """What ``dsl=…`` configures."""

    @property
    def needs_scores(self) -> bool:
        """Whether the labeller needs scores of a judge."""

    def prefers_generated(self, prompt: Prompt, human: Response, generated: Response, scores: "Scores") -> bool | None:
        """Whether the generated response is chosen; None leaves the pair out."""


class Scores(NamedTuple):
    """The scores of the two responses of a pair; None where a score is missing."""

    human: float | None
    generated: float | None


@dataclass(frozen=True)
class HumanChosen:
    """The human response is always chosen (SPIN, equation 4.7 of its paper): labels by origin."""

    needs_scores: ClassVar[bool] = False

    def prefers_generated(self, prompt: Prompt, human: Response, generated: Response, scores: Scores) -> bool | None:
        """Never."""
        return False


@dataclass(frozen=True)
class HigherScoreChosen:
    """The response with the higher score is chosen, the human one at a tie (DNPO, equation 2): labels by quality.

    Args:
        unscored: what happens to a pair that lacks a score: ``drop`` leaves it out, ``keep_human`` chooses the human
            response, ``fail`` ends the run.
    """

    needs_scores: ClassVar[bool] = True

    unscored: Literal["drop", "keep_human", "fail"] = "drop"

    def prefers_generated(self, prompt: Prompt, human: Response, generated: Response, scores: Scores) -> bool | None:
        """s′ > s; if a score is missing, ``unscored`` decides."""
        if scores.human is None or scores.generated is None:
            if self.unscored == "fail":
                raise DataError(
                    f"dsl.unscored=fail: the {'human' if scores.human is None else 'generated'} response to "
                    f"{prompt.id} has no score; drop such pairs (drop), or choose the human response (keep_human)"
                )
            return None if self.unscored == "drop" else False
        return scores.generated > scores.human


def explain(counts: Mapping[str, int]) -> str:
    """Say why :func:`label` made no pair, and what to do about it."""
    reasons = {
        "identical": "generated responses equal the human ones (a higher generate.temperature varies them)",
        "unscored": "pairs lack a score (look at judge.…; dsl.unscored=keep_human keeps them, labelled by origin)",
    }
    found = [f"{counts[name]:,} {reason}" for name, reason in reasons.items() if counts[name]]
    return "; ".join(found) or "the labeller (dsl=…) has dropped all of them"


def label(
    labeller: Labeller,
    prompts: Sequence[Prompt],
    human: Sequence[Response],
    generated: Sequence[Response],
    verdicts: Sequence[Verdict],
) -> tuple[list[Pair], dict[str, int]]:
    """Make a labelled pair of each generated response and its human one, and count what happened.

    The pairs are in the order of ``generated``. A pair of identical token sequences carries no signal; it is dropped
    and counted as ``identical``. ``unscored`` counts the pairs that lack a score which the labeller needs.
    """
    prompt_of = {p.id: p for p in prompts}
    human_of = {r.id: r for r in human}
    score_of: Mapping[tuple[str, str], float | None] = {(v.id, v.source): v.score for v in verdicts}
    pairs: list[Pair] = []
    counts = {"pairs": 0, "flipped": 0, "identical": 0, "unscored": 0}
    for new in generated:
        prompt, old = prompt_of[new.id], human_of[new.id]
        scores = Scores(score_of.get((old.id, old.source)), score_of.get((new.id, new.source)))
        if new.token_ids == old.token_ids:
            counts["identical"] += 1
            continue
        flipped = labeller.prefers_generated(prompt, old, new, scores)
        counts["unscored"] += labeller.needs_scores and None in (scores.human, scores.generated)
        if flipped is None:
            continue
        sides = [(old, scores.human), (new, scores.generated)]
        (chosen, chosen_score), (rejected, rejected_score) = reversed(sides) if flipped else sides
        pairs.append(
            Pair(
                id=prompt.id,
                messages=prompt.messages,
                prompt_ids=prompt.token_ids,
                chosen=chosen.text,
                rejected=rejected.text,
                chosen_ids=chosen.token_ids,
                rejected_ids=rejected.token_ids,
                chosen_source=chosen.source,
                rejected_source=rejected.source,
                chosen_score=chosen_score,
                rejected_score=rejected_score,
                flipped=flipped,
            )
        )
        counts["pairs"] += 1
        counts["flipped"] += flipped
    return pairs, counts
