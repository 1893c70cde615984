"""An exact judge for prompts with a verifiable answer.

0-100 points: correctness 60, completeness 25 (the share of the words in ``Prompt.needs`` that are mentioned), form 15
(a capital or digit at the beginning, one full stop at the end, no word twice in a row; 5 each).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.store import Report

_MARKERS = {"is", "are", "equals", ":"}
_TOKEN = re.compile(r"(?<!\w)[-−]?\d+(?:\.\d+)?|[^\W_]+|:")


@dataclass(frozen=True)
class Rules(Judge):
    """Scores by the rules at the head of this file. In the tiny world it is both judge and measure."""

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
        return 60.0 * correct(prompt, text) + 25.0 * completeness(prompt, text) + form(text)


@dataclass(frozen=True)
class Correct(Rules):
    """100 points for the right answer in any wording, otherwise 0: a second, stricter measure."""

    option: ClassVar[str] = "correct"

    def points(self, prompt: Prompt, text: str) -> float:
        """The score of one response: 0 or 100."""
        return 100.0 * correct(prompt, text)


def correct(prompt: Prompt, text: str) -> bool:
    """Whether the response is the right answer, or ends with it directly after "is", "are", "equals" or a colon.

    Only words and numbers are compared, in lower case.
    """
    if prompt.answer is None:
        return False
    tokens, answer = _tokens(text), _tokens(prompt.answer)
    before = tokens[: len(tokens) - len(answer)]
    return bool(answer) and tokens[len(before) :] == answer and (not before or before[-1] in _MARKERS)


def read_answer(text: str) -> str:
    """Find the answer of a response: the words and numbers after its last "is", "are", "equals" or colon, or all of its
    words and numbers if it has none of these; "" if it has none at all."""
    tokens = _tokens(text)
    last = max((place for place, token in enumerate(tokens) if token in _MARKERS), default=-1)
    return " ".join(tokens[last + 1 :])


def completeness(prompt: Prompt, text: str) -> float:
    """The share of the prompt's needed words that the response mentions, each as often as needed."""
    needed = Counter(w for need in prompt.needs for w in words(need))
    if not needed:
        return 1.0
    return (needed & Counter(words(text))).total() / needed.total()


def form(text: str) -> float:
    """0, 5, 10 or 15 points for initial capital, full stop and no repeated word; 0 for an empty response."""
    tokens = words(text)
    if not tokens:
        return 0.0
    capital = text[0].isupper() or text[0].isdigit()
    stop = text.endswith(".") and len(re.findall(r"\.(?!\d)", text)) == 1
    stutters = any(a == b for a, b in pairwise(tokens))
    return 5.0 * (capital + stop + (not stutters))


def words(text: str) -> list[str]:
    """The words and numbers of a text, numbers with their sign and decimals, in lower case."""
    return [token for token in _tokens(text) if token != ":"]


def _tokens(text: str) -> list[str]:
    return [token.lower().replace("−", "-") for token in _TOKEN.findall(text)]
