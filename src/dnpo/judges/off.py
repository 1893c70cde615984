"""No judge: no response has a score."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.store import Report


@dataclass(frozen=True)
class NoJudge(Judge):
    """No judge, for methods that need no scores."""

    gives_scores: ClassVar[bool] = False

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict without a score on each response."""
        return [make_verdict(r, None, "judge=off") for r in responses]
