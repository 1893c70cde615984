"""An exact judge for prompts with a verifiable answer, by the points of :mod:`dnpo.data.verifiable`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dnpo.data.verifiable import correct, points, words
from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.store import Report


@dataclass(frozen=True)
class Rules(Judge):
    """0-100 points for correctness, completeness and form. In the tiny world it judges and measures."""

    option: ClassVar[str] = "rules"

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Accept prompts that all have an answer with a word or a number in it."""
        without = [p.id for p in prompts if p.answer is None or not words(p.answer)]
        if not without:
            return None
        return (
            f"judge={self.option} needs a verifiable answer for every prompt; {len(without):,} of {len(prompts):,} "
            f"have none, the first is {without[0]}; choose another judge, or judge=off with method=spin or method=npo"
        )

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response; it has no score if the prompt has no answer."""
        by_id = {p.id: p for p in prompts}
        report.begin(len(responses), "verdicts")
        report.advance(len(responses))
        return [self._judge(by_id[r.id], r) for r in responses]

    def _judge(self, prompt: Prompt, response: Response) -> Verdict:
        if prompt.answer is None:
            return make_verdict(response, None, "the prompt has no verifiable answer")
        return make_verdict(response, self.points(prompt, response.text))

    def points(self, prompt: Prompt, text: str) -> float:
        """The score of one response, 0-100."""
        return points(prompt, text)


@dataclass(frozen=True)
class Correct(Rules):
    """100 points for the right answer in any wording, otherwise 0; a second measure, stricter than :class:`Rules`."""

    option: ClassVar[str] = "correct"

    def points(self, prompt: Prompt, text: str) -> float:
        """The score of one response: 0 or 100."""
        return 100.0 * correct(prompt, text)
