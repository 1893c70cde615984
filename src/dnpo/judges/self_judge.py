"""A policy as judge, even of its own responses: which is better, A or B? (OSP; Self-Rewarding)

The answer is read from the logits of the two letters, so nothing is generated. A policy prefers one of the two
positions, so both orders are asked and averaged. A response's score is the probability that it is better than an empty
response. So two questions for each response are enough to rank many responses. For the strength of a label, the policy
is asked about the two responses of the pair.

Such a judge can do only what the policy learned in training. Measure it before you trust it (``python -m
benchmarks.self_judge``), also on pairs in which exactly one response is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dnpo.errors import JudgeError, ModelError
from dnpo.judges import Judge, PolicyName, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.policy.question import TINY, check_template
from dnpo.records import Message, Pair, Prompt, Response, Verdict
from dnpo.settings import Fraction, neutral
from dnpo.store import Report

if TYPE_CHECKING:
    from dnpo.policy.choices import Choices
    from dnpo.policy.model import Policy

EMPTY = ""  # the response that all others are compared with
UNBOUND = "judge=self: asks a policy, so it labels pairs in a run and judges nowhere else"


def average_orders(a_first: float, a_second: float) -> float:
    """p(y₁ ≻ y₂), the mean over both orders: (P(A | y₁, y₂) + 1 − P(A | y₂, y₁)) / 2.

    Example: P(A) is 0.9 with y₁ in the first position, and 0.6 with y₂ there: (0.9 + 0.4) / 2 = 0.65. For a judge that
    always answers A the result is ½.

    Args:
        a_first: P(A) if A is y₁.
        a_second: P(A) if A is y₂.
    """
    return 0.5 + (a_first - a_second) / 2  # exactly ½ if both responses are the same


@dataclass(frozen=True, kw_only=True)
class SelfJudge(Judge):
    """A policy of the run, asked which of two responses is better.

    Args:
        asks: the ``initial`` policy (OSP), taught first if ``augment=…`` says so, or the current ``policy``
            (Self-Rewarding).
        template: the question, with ``{question}``, ``{y1}`` and ``{y2}``; it becomes the user's turn.
        max_unscored: share of responses that may lack a score.

    Raises:
        SettingsError: the template lacks something.
    """

    measures_texts: ClassVar[bool] = False

    asks: Literal["initial", "policy"] = "initial"
    template: str = TINY
    max_unscored: Fraction = neutral(0.02)

    def __post_init__(self) -> None:
        check_template(self.template, "template")

    @property
    def only_compares(self) -> bool:
        """True: a score is the probability that a response is better than an empty one."""
        return True

    @property
    def reads_policies(self) -> frozenset[PolicyName]:
        """The policy that is asked."""
        return frozenset((self._asked,))

    @property
    def _asked(self) -> PolicyName:
        return "taught" if self.asks == "initial" else "policy"

    def accepts_model(self, policy: "Policy") -> str | None:
        """Refuse tokenizers in which a letter is not a single token."""
        from dnpo.policy.choices import find_letters

        try:
            find_letters(policy, self.template)
        except ModelError as error:
            return str(error)
        return None

    def with_policies(self, policies: "Mapping[PolicyName, Policy]") -> "Judge":
        """The judge with the policy that it asks."""
        from dnpo.policy.choices import Choices

        return AskedPolicy(Choices(policies[self._asked], self.template), self.max_unscored)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Refuse: there is no policy to ask."""
        raise JudgeError(UNBOUND)

    def compare_pairs(self, prompts: Sequence[Prompt], pairs: Sequence[Pair]) -> list[float]:
        """Refuse, as :meth:`__call__`."""
        raise JudgeError(UNBOUND)


@dataclass(frozen=True)
class AskedPolicy(Judge):
    """:class:`SelfJudge` with its policy."""

    measures_texts: ClassVar[bool] = False

    choices: "Choices"
    max_unscored: float

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response: 100 · p(y ≻ an empty response), with the difference of both orders."""
        messages = {prompt.id: prompt.messages for prompt in prompts}
        report.begin(2 * len(responses), "questions")
        asked = [self._orders(messages[r.id], r.text, EMPTY) for r in responses]
        report.advance(sum(any(map(self._is_long, both)) for both in asked) * 2)
        by_prompt: dict[str, list[int]] = {}
        for number, (response, both) in enumerate(zip(responses, asked, strict=True)):
            if not any(map(self._is_long, both)):
                by_prompt.setdefault(response.id, []).append(number)
        groups = [[ids for number in numbers for ids in asked[number]] for numbers in by_prompt.values()]
        verdicts = [make_verdict(r, None, self._too_long(both)) for r, both in zip(responses, asked, strict=True)]
        for numbers, found in zip(by_prompt.values(), self.choices.probabilities(groups), strict=True):
            report.advance(len(found))
            for number, first, second in zip(numbers, found[::2], found[1::2], strict=True):
                score, apart = 100 * average_orders(first, second), 100 * abs(first + second - 1)
                verdicts[number] = make_verdict(responses[number], score, disagreement=apart)
        return verdicts

    def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        """p(first ≻ second), the mean over both orders.

        Raises:
            JudgeError: the question is longer than the policy's context.
        """
        return self._compare([(prompt, first.text, second.text)])[0]

    def compare_pairs(self, prompts: Sequence[Prompt], pairs: Sequence[Pair]) -> list[float]:
        """p(chosen ≻ rejected) of each pair, the mean over both orders.

        Args:
            prompts: the prompt of each pair.

        Raises:
            JudgeError: a question is longer than the policy's context.
        """
        return self._compare([(p, pair.chosen, pair.rejected) for p, pair in zip(prompts, pairs, strict=True)])

    def _compare(self, rows: Sequence[tuple[Prompt, str, str]]) -> list[float]:
        asked = [self._orders(prompt.messages, first, second) for prompt, first, second in rows]
        for (prompt, *_), both in zip(rows, asked, strict=True):
            if any(map(self._is_long, both)):
                raise JudgeError(
                    f"judge=self: the question which response to {prompt.id} is better {self._too_long(both)}; lower "
                    "data.max_prompt_tokens or data.max_response_tokens, or give a shorter judge.template"
                )
        return [average_orders(*both) for both in self.choices.probabilities(asked)]

    def _orders(self, messages: Sequence[Message], first: str, second: str) -> list[list[int]]:
        return [self.choices.encode(messages, first, second), self.choices.encode(messages, second, first)]

    def _is_long(self, ids: list[int]) -> bool:
        return len(ids) > self.choices.context

    def _too_long(self, both: Sequence[list[int]]) -> str:
        return f"has {max(map(len, both)):,} tokens, more than the {self.choices.context:,} that the model reads"
