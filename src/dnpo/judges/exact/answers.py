"""Judges for prompts with a known answer: 100 points if a response gives it, 0 if not.

A response without a recognisable answer is wrong: it gets 0 points, with the reason. If it had no score, its pair would
be left out, and the policy would never learn to answer. Prompts whose gold answer is unusable are refused before
anything is computed.
"""

import re
import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import ClassVar

from dnpo.errors import SettingsError
from dnpo.judges import Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.store import Report


class Checker(Judge):
    """Base class of judges that check whether a response gives the gold answer.

    Attributes:
        option: the judge's name in ``judge=…``.
    """

    option: ClassVar[str]

    @property
    @abstractmethod
    def expects(self) -> str:
        """The kind of answer that a prompt must have, for messages."""

    @abstractmethod
    def usable(self, gold: str) -> bool:
        """Whether responses can be checked against a prompt's answer."""

    @abstractmethod
    def check(self, gold: str, text: str) -> tuple[bool, str]:
        """Return whether a response is right, and a reason if there is more to report than a wrong answer."""

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Accept prompts that all have a usable answer."""
        without = [p.id for p in prompts if p.answer is None or not self.usable(p.answer)]
        if not without:
            return None
        return (
            f"judge={self.option} needs {self.expects} as the answer of every prompt; {len(without):,} of "
            f"{len(prompts):,} have none, the first is {without[0]}; correct the rows, or choose another judge"
        )

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response; it has no score if the prompt has no usable answer."""
        by_id = {p.id: p for p in prompts}
        report.begin(len(responses), "verdicts")
        report.advance(len(responses))
        return [self.verdict(by_id[r.id], r) for r in responses]

    def verdict(self, prompt: Prompt, response: Response) -> Verdict:
        """Judge one response."""
        if prompt.answer is None or not self.usable(prompt.answer):
            return make_verdict(response, None, f"the prompt's answer is not {self.expects}")
        right, reason = self.check(prompt.answer, response.text)
        return make_verdict(response, 100.0 if right else 0.0, reason)


# --- a number ---------------------------------------------------------------------------------------------------------

# A minus is a sign only if nothing before it could be a minuend.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-−][$€£]?|[$€£][-−])?"
    r"(?<![\w.])(?P<value>(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,2}\b)?)"
    r"(?:/(?P<under>[1-9]\d*))?",
    re.IGNORECASE,
)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_FINAL = (
    re.compile(r"####(?=(.*))"),
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"\banswer\b[*_]*(?:\s+(?:is|was|equals)\b|\s*[:=])+(?=(.*))", re.IGNORECASE),
)


@dataclass(frozen=True)
class Numeric(Checker):
    """A number as the final answer, as in GSM8K.

    The gold answer is the number after ``####``, or its last number if there is no such mark. A response's answer is
    the first number after its last ``####``, in its last ``\\boxed{…}``, or after its last "answer is" or "answer:"; if
    an equation follows there, it is the first number after the last equals sign. Without any of these it is the
    response's last number. Commas between thousands, currency signs, percent signs, a full stop at the end and
    other notations of the same value make no difference; ``1/2`` is 0.5. Numbers are compared exactly, without
    rounding.
    """

    option: ClassVar[str] = "numeric"

    @property
    def expects(self) -> str:
        """A number."""
        return "a number"

    def usable(self, gold: str) -> bool:
        """Whether it contains a number."""
        return gold_number(gold) is not None

    def check(self, gold: str, text: str) -> tuple[bool, str]:
        """Whether both have the same value."""
        given = final_number(text)
        if given is None:
            return False, "no number in the response"
        return given == gold_number(gold), ""


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text, in order, as exact values."""
    values = []
    for match in _NUMBER.finditer(text.replace("\\$", "$")):
        value = Fraction(match["value"].replace(",", "")) / int(match["under"] or 1)
        values.append(-value if match["sign"] else value)
    return values


def final_number(text: str) -> Fraction | None:
    """The final number of a response, found as :class:`Numeric` describes."""
    text = _FRACTION.sub(r"\1/\2", text)
    for mark in _FINAL:
        given = mark.findall(text)
        if given and numbers(given[-1]):
            return (numbers(given[-1].rpartition("=")[2]) or numbers(given[-1]))[0]
    return next(reversed(numbers(text)), None)


def gold_number(answer: str) -> Fraction | None:
    """The number of a gold answer."""
    return next(reversed(numbers(answer.rpartition("####")[2])), None)


# --- a choice ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice(Checker):
    """The letter of one of several choices that the prompt lists.

    A response's letter is the first of these that exists: the last letter after "answer is", "answer:" or ``\\boxed{``;
    the letter that is the whole response or begins it (``B``, ``(B)``, ``B.``, ``B) blue``); the last letter in
    brackets; the letter that is the whole last line. A letter within a sentence is a word ("A dog") and does not count.

    Args:
        letters: the possible answers, such as ``ABCD``, or ``"1234"`` for numbered choices. Within sentences, only
            capitals and letters in brackets count.

    Raises:
        SettingsError: ``letters`` are not different letters or digits.
    """

    option: ClassVar[str] = "choice"

    letters: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        if not self.letters.isalnum() or len(set(self.letters.upper())) != len(self.letters):
            raise SettingsError(f"letters={self.letters}: expected different letters or digits, such as ABCD")

    @property
    def expects(self) -> str:
        """One of the letters."""
        return f"one of the letters {self.letters.upper()}"

    @property
    def _one(self) -> str:
        """A pattern with a group that matches a letter."""
        return f"([{self.letters.upper()}])"

    @cached_property
    def _named(self) -> re.Pattern[str]:
        # in a sentence a small letter is a word ("the answer is a dog"), unless it is in brackets or at the very end
        one, small = self._one, self._one.lower()
        return re.compile(
            r"(?i:\banswer\b[*_]*(?:\s+is\b|\s*:)+|\\boxed\{)\s*(?:(?i:option|choice)\s+)?[\s*_`\"'(\[]*(?:\\text\{)?"
            rf"(?:{one}(?![\w'’])|(?<=\(){small}\)|{small}[\s*_`\"')\].}}]*\Z)"
        )

    @cached_property
    def _alone(self) -> re.Pattern[str]:
        return re.compile(rf"[\s*_`\"'(\[]*{self._one}[\s*_`\"')\].]*", re.IGNORECASE)

    @cached_property
    def _first(self) -> re.Pattern[str]:
        return re.compile(rf"\s*[*_]*(?:\({self._one}\)|\[{self._one}\]|{self._one}[).:](?!\w))")

    @cached_property
    def _brackets(self) -> re.Pattern[str]:
        return re.compile(rf"\({self._one}\)|\[{self._one}\]")

    def usable(self, gold: str) -> bool:
        """Whether it is one of the letters."""
        return self._alone.fullmatch(gold) is not None

    def check(self, gold: str, text: str) -> tuple[bool, str]:
        """Whether both are the same letter."""
        given, meant = self.letter(text), self._alone.fullmatch(gold)
        assert meant is not None
        return given == meant.group(1).upper(), "" if given else "no choice in the response"

    def letter(self, text: str) -> str | None:
        """The letter that a response chooses; None if there is none."""
        match = _last(self._named, text) or self._alone.fullmatch(text) or self._first.match(text)
        match = match or _last(self._brackets, text)
        if match is None:
            match = self._alone.fullmatch((text.strip().splitlines() or [""])[-1])
        return None if match is None else next(group for group in match.groups() if group).upper()


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


# --- a text -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact(Checker):
    """The whole response must be the answer; white space around it is ignored.

    Args:
        normalised: whether to ignore case, punctuation, articles (a, an, the), differences in spacing, and differences
            between compatible Unicode characters too; the usual normalisation for short answers.
    """

    option: ClassVar[str] = "exact"

    normalised: bool = True

    @property
    def expects(self) -> str:
        """A text."""
        return "a text"

    def usable(self, gold: str) -> bool:
        """Whether it is not empty after normalisation."""
        return bool(self._form(gold))

    def check(self, gold: str, text: str) -> tuple[bool, str]:
        """Whether both are the same text."""
        given = self._form(text)
        return given == self._form(gold), "" if given else "no answer in the response"

    def _form(self, text: str) -> str:
        return normalise(text) if self.normalised else text.strip()


def normalise(text: str) -> str:
    """Reduce a text to the words and signs that :class:`Exact` compares."""
    text = unicodedata.normalize("NFKC", text).casefold()
    # a sign or a point in a number is part of its value, unlike punctuation
    text = re.sub(r"(?<![\w.])[-−](?=\d)|(?<=\d)\.(?=\d)", lambda m: "\0" if m.group() == "." else "\1", text)
    text = "".join(c if c in "\0\1" or not unicodedata.category(c).startswith("P") else " " for c in text)
    words = [word for word in text.split() if word not in ("a", "an", "the")]
    return " ".join(words).replace("\0", ".").replace("\1", "-")
