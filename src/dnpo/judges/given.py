"""The ratings in the data, such as UltraFeedback's or distilabel's, as a judge. Nothing is judged again.

The ratings of the chosen (or human) and the rejected response are read with the rows (``data.columns`` names their
columns). Generated responses have no ratings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import GIVEN, HUMAN, Prompt, Response, Verdict
from dnpo.settings import Fraction, neutral
from dnpo.store import Report


@dataclass(frozen=True)
class GivenScores(Judge):
    """The ratings in the data, in any unit.

    Args:
        column: the name of the ratings in the data, for messages.
        max_unscored: share of responses that may lack a score.
    """

    measures_texts: ClassVar[bool] = False
    judges_generated: ClassVar[bool] = False

    column: str = neutral("score")
    max_unscored: Fraction = neutral(0.02)

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Accept prompts of which at most ``max_unscored`` lack a rating."""
        without = [p for p in prompts if p.human_score is None or (p.rejected is not None and p.rejected_score is None)]
        if len(without) <= self.max_unscored * len(prompts):
            return None
        side = "human (or chosen)" if without[0].human_score is None else "rejected"
        return (
            f"judge=given judge.column={self.column}: {len(without):,} of {len(prompts):,} rows do not rate all their "
            f"responses; the first is {without[0].id}, which lacks the rating of the {side} one. Name the columns with "
            "the ratings: data.columns='{chosen_score: …, rejected_score: …}', or take a judge that reads texts"
        )

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response; those that the data do not rate have no score."""
        by_id = {prompt.id: prompt for prompt in prompts}
        report.begin(len(responses), "verdicts")
        report.advance(len(responses))
        return [self._read(by_id[response.id], response) for response in responses]

    def _read(self, prompt: Prompt, response: Response) -> Verdict:
        ratings = {HUMAN: prompt.human_score, GIVEN: prompt.rejected_score}
        if response.source not in ratings:
            return make_verdict(response, None, "the data rate no generated responses (judge=given)")
        score = ratings[response.source]
        return make_verdict(response, score, "" if score is not None else f"its row has no {self.column}")
