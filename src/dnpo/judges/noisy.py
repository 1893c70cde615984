"""A judge with known faults: errors at a set rate, a preference for length or position, and ties.

It is made for experiments: how good must a judge be, and which of its faults do harm? Draws depend only on the seed and
on the texts of prompt and responses, so a verdict depends neither on the order or batch of the questions nor on who
asks.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from dnpo.errors import SettingsError
from dnpo.judges import Canary, Forecast, Judge
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.ensemble import Ensemble
from dnpo.judges.longer import length_score
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.seeding import derive
from dnpo.settings import Fraction, Natural, Positive, Range, neutral
from dnpo.store import Report

EVEN = 50.0  # points of a tie, and of the human response in a comparison
EDGE = 1.0  # points at each end of the scale that are reserved for replaced scores


@dataclass(frozen=True)
class Noisy(Judge):
    """Adds faults to the verdicts of another judge. With all dials (the settings of faults) at 0 they are unchanged.

    A comparison is of two responses with different scores. Its outcome is the first of these that applies:

    1. with probability ``ties``: a tie, both responses have 50 points;
    2. with probability ``position``: decided by the position, so that the first response wins in both orders. The mean
       of the orders is a tie, with a disagreement of 100 points;
    3. with probability ``error``: the wrong one;
    4. otherwise the order of the scores, to which the preference for length has been added.

    A judge that scores single responses has no comparisons to reverse. Instead, a response's score is replaced with
    probability q = 1 − √(1 − 2·error): in half of the cases by a score below all others, else by one above. A
    comparison in which any score is replaced is wrong in half of the cases, hence with probability
    (1 − (1 − q)²) / 2 = ``error``, whatever the scores are. Scores that are not replaced are mapped to 1 to 99. Equal
    scores get an order in which each response is the better one with probability ``error``. A tie is drawn for a prompt
    and holds for all responses to it.

    Args:
        wraps: the judge.
        error: probability that a comparison is wrong, up to ½, which is chance.
        length: weight of the response's length in its score; 0: the judge alone, 1: ``judge=longer``.
        position: probability that the position decides a comparison; needs a judge that compares two responses.
        ties: probability that a comparison is a tie.
        half: characters of a response that has 50 points for its length.
        seed: seed of all draws.
        max_unscored: share of responses that may lack a score.

    Raises:
        SettingsError: the judge gives no scores of texts, or a dial has no meaning for it.
    """

    wraps: Judge
    error: Annotated[float, Range(ge=0, le=0.5)] = 0.0
    length: Fraction = 0.0
    position: Fraction = 0.0
    ties: Fraction = 0.0
    half: Positive = 200.0
    seed: Natural = 0
    max_unscored: Fraction = neutral(0.02)

    def __post_init__(self) -> None:
        kind = type(self.wraps).__name__
        if not self.wraps.gives_scores:
            raise SettingsError("wraps: gives no scores; choose another judge")
        if not self.wraps.measures_texts:
            raise SettingsError(
                f"wraps: {kind} does not score texts alone (it reads policies, or ratings of the data), so draws by "
                "text have no meaning for it; choose another judge"
            )
        if self.position and not self.wraps.only_compares:
            raise SettingsError(
                f"position={self.position:g}: {kind} scores single responses, which have no order; take 0, or wrap a "
                "judge that compares two, such as judge=openai with mode=pairwise"
            )
        if isinstance(self.wraps, Ensemble) and self.wraps.by == "mean" and self.wraps.only_compares:
            raise SettingsError(
                "wraps: this ensemble averages judges that compare two responses, so 50 points need not be a tie; wrap "
                "its members instead, or take wraps.by=majority"
            )

    @property
    def only_compares(self) -> bool:
        """The same as for the judge that it wraps."""
        return self.wraps.only_compares

    @property
    def mode(self) -> str:
        """``pairwise`` if that judge asks about both orders, otherwise ``score``."""
        return getattr(self.wraps, "mode", "score")

    @property
    def in_shards(self) -> bool:
        """The same as for the judge that it wraps."""
        return self.wraps.in_shards

    @property
    def spends_freely(self) -> bool:
        """The same as for the judge that it wraps."""
        return self.wraps.spends_freely

    @property
    def prompts_seen(self) -> frozenset[str]:
        """The same as for the judge that it wraps."""
        return frozenset(self.wraps.prompts_seen)

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """The objection of the judge that it wraps."""
        return self.wraps.accepts(prompts)

    def canary(self, ledger: Ledger) -> Canary | None:
        """The trial call of the judge that it wraps."""
        return self.wraps.canary(ledger)

    def forecast(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, seen: set[str]
    ) -> Forecast:
        """The forecast of the judge that it wraps."""
        return self.wraps.forecast(prompts, responses, ledger, seen)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response, after the other judge has judged all of them."""
        verdicts = self.wraps(prompts, responses, ledger, report)
        by_id = {prompt.id: prompt for prompt in prompts}
        human = {response.id: response.text for response in responses if response.source == HUMAN}
        found = []
        for response, verdict in zip(responses, verdicts, strict=True):
            prompt = by_id[response.id]
            against = human.get(response.id, prompt.human)
            if verdict.score is None:
                found.append(verdict)
            elif not self.only_compares:
                score = self._change_score(prompt, response.text, verdict.score)
                found.append(replace(verdict, score=score))
            elif response.source == HUMAN or response.text == against:
                found.append(verdict)  # compared with itself
            else:
                found.append(self._change_comparison(prompt, response.text, against, verdict, verdict.score))
        return found

    def _change_score(self, prompt: Prompt, text: str, score: float) -> float:
        """The score of a single response."""
        if self.ties and self._draw("tie", prompt) < self.ties:
            return EVEN
        if self.length:
            score = (1 - self.length) * score + self.length * length_score(text, self.half)
        if not self.error:
            return score
        replaced, draw = 1 - math.sqrt(1 - 2 * self.error), self._draw("error", prompt, text)
        if draw >= replaced:
            return EDGE + (100 - 2 * EDGE) * score / 100
        place = 2 * draw / replaced  # uniform from 0 to 2, so that the order of replaced scores is random too
        return EDGE * place if place < 1 else 100 - EDGE * (2 - place)

    def _change_comparison(self, prompt: Prompt, text: str, human: str, verdict: Verdict, score: float) -> Verdict:
        """The verdict on a response in comparison with the human one, which has 50 points."""
        both = sorted((text, human))  # so that the draws do not depend on who wrote which
        if self._draw("tie", prompt, *both) < self.ties:
            return replace(verdict, score=EVEN, disagreement=None if verdict.disagreement is None else 0.0)
        if self._draw("position", prompt, *both) < self.position:
            return replace(verdict, score=EVEN, disagreement=100.0)
        apart = verdict.disagreement
        if self.length:
            by_length = EVEN + (length_score(text, self.half) - length_score(human, self.half)) / 2
            score = (1 - self.length) * score + self.length * by_length
            apart = None if apart is None else (1 - self.length) * apart
        if self._draw("error", prompt, *both) < self.error:
            score = 100 - score
        return replace(verdict, score=score, disagreement=apart)

    def _draw(self, what: str, prompt: Prompt, *texts: str) -> float:
        """A number from 0 to 1, 1 excluded, that depends on the texts alone."""
        named = json.dumps([prompt.messages, *texts], sort_keys=True)
        return (derive(self.seed, "noisy judge", what, named) >> 10) / 2**53
