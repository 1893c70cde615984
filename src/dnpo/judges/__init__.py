"""Judges: rows in, verdicts out; they know nothing of training.

A judge is called with prompts and with responses to them (of any source, in any order) and returns one verdict a
response, in the same order. A response it cannot judge gets no score, with the reason; a failure is never a score.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dnpo.errors import JudgeError
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.store import Report


@dataclass(frozen=True)
class Forecast:
    """What judging would take.

    Attributes:
        calls: questions, each counted once.
        new: those that the ledger cannot answer.
        cost: of the new ones in US dollars, by estimated tokens; None where the price is not known.
    """

    calls: int = 0
    new: int = 0
    cost: float | None = 0.0

    def __add__(self, other: "Forecast") -> "Forecast":
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Forecast(self.calls + other.calls, self.new + other.new, cost)


@dataclass(frozen=True)
class Canary:
    """What became of one call made to see whether the judge can be relied on."""

    scored: bool
    text: str


class Judge(ABC):
    """What ``judge=…`` configures.

    Attributes:
        gives_scores: false for the absent judge.
        max_unscored: share of responses that may stay without a score.
    """

    gives_scores: ClassVar[bool] = True
    max_unscored: float = 0.02

    @property
    def prompts_seen(self) -> Collection[str]:
        """:func:`~dnpo.data.seen.hash_conversation` of the conversations that it was fitted on."""
        return frozenset()

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Why this judge cannot judge these prompts, or None if it can; asked before anything is computed."""
        return None

    def canary(self, ledger: Ledger) -> "Canary | None":
        """Judge one made-up response for real, before hours depend on it; None where that would say nothing.

        Raises:
            JudgeError: the judge cannot be used as it is set.
        """
        return None

    def forecast(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, seen: set[str]
    ) -> Forecast:
        """What these verdicts would take; keys of questions are added to ``seen``, and those in it count nothing."""
        return Forecast()

    @abstractmethod
    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """One verdict a response, in their order.

        Args:
            prompts: those that the responses name by their ids, and perhaps others.
            ledger: where questions that cost something are looked up and answers kept.
            report: told of the total and of every verdict.
        """


def judge_responses(
    judge: Judge, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
) -> list[Verdict]:
    """Verdicts of which no more than the judge's ``max_unscored`` are without a score.

    Raises:
        JudgeError: too many are. What was answered is in the ledger: a rerun asks only for the rest.
    """
    verdicts = judge(prompts, responses, ledger, report)
    missing = [v for v in verdicts if v.score is None]
    if judge.gives_scores and len(missing) > judge.max_unscored * len(verdicts):
        raise JudgeError(too_many(len(missing), len(verdicts), judge.max_unscored, [v.reason for v in missing]))
    return verdicts


def tally(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Counts of verdicts, and how far they disagree with themselves on average where that is known."""
    apart = [v.disagreement for v in verdicts if v.disagreement is not None]
    counts: dict[str, float] = {"verdicts": len(verdicts), "unscored": sum(v.score is None for v in verdicts)}
    return counts | ({"disagreement": sum(apart) / len(apart)} if apart else {})


def too_many(missing: int, total: int, limit: float, reasons: Sequence[str], what: str = "responses") -> str:
    """What to say when more verdicts are missing than ``max_unscored`` allows."""
    shown = "; ".join(f"{count:,} × {reason}" for reason, count in Counter(reasons).most_common(3))
    return (
        f"judge: {missing:,} of {total:,} {what} have no score, more than judge.max_unscored={limit:g} allows. Most "
        f"often: {shown}. What was answered is kept: run the same command again and only the rest is asked; or raise "
        "judge.max_unscored (dsl.unscored says what becomes of such pairs)"
    )
