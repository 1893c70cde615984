"""The baseline for judges: the longer response is the better one.

People often prefer longer answers, and judges are known to do so even more. So every judge should be compared with this
one. It needs no known answers, no model and no money, and works for any prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.settings import Positive
from dnpo.store import Report


@dataclass(frozen=True)
class Longer(Judge):
    """Scores by length alone.

    Args:
        half: characters of a response that scores 50.
    """

    half: Positive = 200.0

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response."""
        report.begin(len(responses), "verdicts")
        report.advance(len(responses))
        return [make_verdict(r, length_score(r.text, self.half)) for r in responses]


def length_score(text: str, half: float) -> float:
    """100 · n / (n + half) for n characters: 0 for none, 50 for ``half``, rising towards 100."""
    return 100.0 * len(text) / (len(text) + half)
