"""Several judges as one: their mean score or their majority's preference, with their disagreement."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dnpo.errors import SettingsError
from dnpo.judges import Canary, Forecast, Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import HUMAN, Prompt, Response, Verdict
from dnpo.settings import Fraction, neutral, part_key
from dnpo.store import Report


@dataclass(frozen=True)
class Ensemble(Judge):
    """Asks every member about every response.

    ``mean``: the mean of the members' scores. ``majority``: every member votes on whether a response is better than the
    human one to the same prompt. The response's score is 100 × its share of votes; a tie is half a vote. So above 50
    points the majority prefers it; the human response has 50. A response that any member could not judge has no score.
    The disagreement is the standard deviation of the members' scores, or of their votes × 100.

    Args:
        members: judges, by any names.
        by: ``mean`` or ``majority``.
        max_unscored: share of responses that may lack a score.

    Raises:
        SettingsError: there are fewer than two members, or the scores of one cannot be combined.
    """

    members: Mapping[str, Judge]
    by: Literal["mean", "majority"] = "mean"
    max_unscored: Fraction = neutral(0.02)

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise SettingsError(f"members: has {len(self.members)}; an ensemble needs two judges or more")
        for name, member in self.members.items():
            if not member.gives_scores:
                raise SettingsError(f"members.{name}: gives no scores; choose another judge for it")
            if not member.measures_texts:
                raise SettingsError(
                    f"members.{name}: does not score texts alone (it reads policies, or ratings of the data), so its "
                    "scores cannot be combined with others; choose another judge for it"
                )

    @property
    def only_compares(self) -> bool:
        """Whether members compare with the human response by votes, or one of them only compares."""
        return self.by == "majority" or any(member.only_compares for member in self.members.values())

    @property
    def in_shards(self) -> bool:
        """Whether all members may be called for some prompts at a time."""
        return all(member.in_shards for member in self.members.values())

    @property
    def spends_freely(self) -> bool:
        """Whether the replies of a member cost money without a limit."""
        return any(member.spends_freely for member in self.members.values())

    @property
    def prompts_seen(self) -> frozenset[str]:
        """The conversations that any member was fitted on."""
        return frozenset(seen for member in self.members.values() for seen in member.prompts_seen)

    def identity(self) -> Mapping[str, Any]:
        """The values that determine the verdicts: the members, without their names, and how they are combined."""
        kinds = [part_key(member) for member in self.members.values()]
        return {"ensemble": sorted(kinds, key=str), "by": self.by}

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """The first objection of a member."""
        objections = (member.accepts(prompts) for member in self.members.values())
        return next((objection for objection in objections if objection), None)

    def canary(self, ledger: Ledger) -> Canary | None:
        """The outcome of every member's trial call, in one line."""
        found = {name: member.canary(ledger) for name, member in self.members.items()}
        called = {name: canary for name, canary in found.items() if canary is not None}
        if not called:
            return None
        parts = {
            name: "; ".join(f"{member}: {getattr(c, name)}" for member, c in called.items() if getattr(c, name))
            for name in ("text", "settings", "warning")
        }
        return Canary(all(c.scored for c in called.values()), **parts)

    def forecast(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, seen: set[str]
    ) -> Forecast:
        """The sum of the members' forecasts."""
        parts = (member.forecast(prompts, responses, ledger, seen) for member in self.members.values())
        return sum(parts, Forecast())

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response, after every member has judged all of them."""
        asked = [*responses, *(self._missing_human(prompts, responses) if self.by == "majority" else [])]
        by_member = {name: member(prompts, asked, ledger, report) for name, member in self.members.items()}
        rows = [dict(zip(by_member, some, strict=True)) for some in zip(*by_member.values(), strict=True)]
        human = {
            response.id: [verdict.score for verdict in verdicts.values()]
            for response, verdicts in zip(asked, rows, strict=True)
            if response.source == HUMAN
        }
        return [
            self._combine(response, verdicts, human)
            for response, verdicts in zip(responses, rows[: len(responses)], strict=True)
        ]

    @staticmethod
    def _missing_human(prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Response]:
        """The human responses that votes need and that are not among the responses to judge."""
        there = {response.id for response in responses if response.source == HUMAN}
        needed = {response.id for response in responses} - there
        needed = {id_ for id_ in needed if id_.rsplit("#", 1)[0] not in there}
        return [Response(p.id, HUMAN, p.human, [], 0, "eos") for p in prompts if p.id in needed]

    def _combine(
        self, response: Response, verdicts: Mapping[str, Verdict], human: Mapping[str, Sequence[float | None]]
    ) -> Verdict:
        for name, verdict in verdicts.items():
            if verdict.score is None:
                return make_verdict(response, None, f"{name}: {verdict.reason}")
        scores = [v.score for v in verdicts.values() if v.score is not None]
        if self.by == "majority":
            against = human.get(response.id) or human.get(response.id.rsplit("#", 1)[0])
            if against is None or None in against:
                return make_verdict(response, None, "no score of the human response to compare with")
            votes = [_vote(new, old) for new, old in zip(scores, against, strict=True) if old is not None]
            scores = [100.0 * vote for vote in votes]
        return make_verdict(response, statistics.fmean(scores), disagreement=statistics.pstdev(scores))


def _vote(new: float, old: float) -> float:
    return 1.0 if new > old else 0.5 if new == old else 0.0
