"""Judges: they return verdicts on responses, and do not depend on training.

A judge is called with prompts and with responses to them, of any source and in any order. It returns a verdict on each
response, in the same order. A response that it cannot judge gets a reason in place of a score; a failure is never a
score.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from dnpo.errors import JudgeError
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.store import Report
from dnpo.tables import column

if TYPE_CHECKING:
    from dnpo.policy.model import Policy

# The iteration's policy, the policy after fine-tuning, and a copy of the fine-tuned one that was taught to judge.
PolicyName = Literal["policy", "initial", "taught"]

MANY = 20  # this many equal scores cannot be a coincidence


@dataclass(frozen=True)
class Forecast:
    """The calls and the cost that judging would need.

    Attributes:
        calls: number of different questions.
        new: questions that the ledger cannot answer.
        cost: estimated cost of the new ones in US dollars; None if the price is not known.
    """

    calls: int = 0
    new: int = 0
    cost: float | None = 0.0

    def __add__(self, other: "Forecast") -> "Forecast":
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        return Forecast(self.calls + other.calls, self.new + other.new, cost)


@dataclass(frozen=True)
class Canary:
    """The outcome of a trial call, which is made before a run to see whether the judge works.

    Attributes:
        text: the reply, in words.
        settings: the settings to look at if there is no score.
        warning: a warning about a judge that works; "" for none.
    """

    scored: bool
    text: str
    settings: str = ""
    warning: str = ""


class Judge(ABC):
    """A judge, configured by ``judge=…``.

    Attributes:
        gives_scores: false for ``judge=off``.
        measures_texts: whether its scores measure the quality of a text, whoever wrote it. If not, evaluations cannot
            use it, but it can label pairs.
        in_nats: whether its scores are rewards in nats instead of points from 0 to 100.
        judges_generated: whether it can judge generated responses.
        max_unscored: share of responses that may lack a score.
    """

    gives_scores: ClassVar[bool] = True
    measures_texts: ClassVar[bool] = True
    in_nats: ClassVar[bool] = False
    judges_generated: ClassVar[bool] = True
    max_unscored: float = 0.02

    @property
    def only_compares(self) -> bool:
        """Whether a score compares a response with another one, so that it cannot serve as a reward."""
        return False

    @property
    def in_shards(self) -> bool:
        """Whether it is called for a few thousand prompts at a time, with all responses to them.

        Then an interruption loses little. A judge whose replies are kept in the ledger loses nothing anyway, so it is
        called once for all prompts.
        """
        return True

    @property
    def spends_freely(self) -> bool:
        """Whether its replies cost money and no limit is set."""
        return False

    @property
    def reads_policies(self) -> frozenset[PolicyName]:
        """The policies that it needs, which become inputs of the judge stage; most judges need none."""
        return frozenset()

    def with_policies(self, policies: "Mapping[PolicyName, Policy]") -> "Judge":
        """The judge with the policies that ``reads_policies`` names."""
        return self

    def accepts_policy(self, k: int, is_initial: bool) -> str | None:
        """Why it cannot judge responses of iteration ``k``'s policy, or None; asked before anything is computed.

        Args:
            is_initial: whether that policy is still the initial one.
        """
        return None

    @property
    def prompts_seen(self) -> Collection[str]:
        """:func:`~dnpo.data.seen.hash_conversation` of the conversations that it was fitted on."""
        return frozenset()

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Why this judge cannot judge these prompts, or None if it can; asked before anything is computed."""
        return None

    def accepts_model(self, policy: "Policy") -> str | None:
        """Why it cannot ask policies of this kind, or None.

        Args:
            policy: only its tokenizer and configuration are read; it may have no weights.
        """
        return None

    def canary(self, ledger: Ledger) -> "Canary | None":
        """Judge one invented response, as a check before a long run; None if that would check nothing.

        Raises:
            JudgeError: the judge cannot be used with its settings.
        """
        return None

    def forecast(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, seen: set[str]
    ) -> Forecast:
        """Estimate the calls and the cost of these verdicts.

        Args:
            seen: keys of questions that are already counted; the new keys are added.
        """
        return Forecast()

    @abstractmethod
    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response, in their order.

        Args:
            prompts: the prompts that the responses name by id; others are ignored.
            ledger: stores replies, so that no question is paid for twice.
            report: receives the total and the progress.
        """


def judge_responses(
    judge: Judge, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
) -> list[Verdict]:
    """Judge the responses; at most the judge's ``max_unscored`` of the verdicts may lack a score.

    Raises:
        JudgeError: too many verdicts lack a score. The ledger has all replies, so a rerun asks only for the rest.
    """
    verdicts = ask(judge, prompts, responses, ledger, report)
    check_verdicts(judge, verdicts, report)
    return verdicts


def check_verdicts(judge: Judge, verdicts: Sequence[Verdict], report: Report) -> None:
    """Check that enough verdicts have a score, and note if all scores are equal.

    Raises:
        JudgeError: too many verdicts lack a score.
    """
    scores = column(verdicts, "score")
    missing = sum(score is None for score in scores)
    if judge.gives_scores and missing > judge.max_unscored * len(scores):
        reasons = [reason for reason, score in zip(column(verdicts, "reason"), scores, strict=True) if score is None]
        raise JudgeError(too_many(missing, len(scores), judge.max_unscored, reasons))
    given = [score for score in scores if score is not None]
    if len(given) >= MANY and len(set(given)) == 1:
        report.note(
            f"judge: all {len(given):,} responses have the same score, {given[0]:g}: by these verdicts none is "
            "better than another. Look at some of them (check=true shows an answer of the judge)"
        )


def ask(
    judge: Judge, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
) -> list[Verdict]:
    """Judge the responses; any number of verdicts may lack a score, which the caller counts.

    Raises:
        JudgeError: the verdicts are not in the order of the responses.
    """
    return _match(judge(prompts, responses, ledger, report), responses)


def make_verdict(
    response: Response, score: float | None, reason: str = "", disagreement: float | None = None
) -> Verdict:
    """Make the verdict on a response."""
    return Verdict(response.id, response.source, score, reason, disagreement, response.sample)


def _match(verdicts: Sequence[Verdict], responses: Sequence[Response]) -> list[Verdict]:
    """Check that verdicts are in the order of the responses, and give them the sample numbers of the responses.

    Raises:
        JudgeError: they are not in this order.
    """
    if [(v.id, v.source) for v in verdicts] != [(r.id, r.source) for r in responses]:
        raise JudgeError("judge: it did not return one verdict for each response, in their order")
    return [replace(v, sample=r.sample) for v, r in zip(verdicts, responses, strict=True)]


def tally(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Count verdicts, and average their disagreement if it is known."""
    apart = [points for points in column(verdicts, "disagreement") if points is not None]
    unscored = sum(score is None for score in column(verdicts, "score"))
    counts: dict[str, float] = {"verdicts": len(verdicts), "unscored": unscored}
    return counts | ({"disagreement": sum(apart) / len(apart)} if apart else {})


def too_many(missing: int, total: int, limit: float, reasons: Sequence[str], what: str = "responses") -> str:
    """The message if more verdicts are missing than ``max_unscored`` allows."""
    shown = "; ".join(f"{count:,} × {reason}" for reason, count in Counter(reasons).most_common(3))
    return (
        f"judge: {missing:,} of {total:,} {what} have no score, more than judge.max_unscored={limit:g} allows. Most "
        f"often: {shown}. What was answered is kept: run the same command again and only the rest is asked; or raise "
        "judge.max_unscored, the share that may lack a score"
    )
