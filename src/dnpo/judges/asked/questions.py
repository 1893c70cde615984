"""Language models as judges: rows → questions → answers → verdicts.

In mode ``score`` every response is a separate question, answered by a whole number from 0 to 100. In mode ``pairwise``
every generated response is compared with the human one, in both orders. Its score is 100 × the mean probability that it
is better; the difference between the orders is kept too. Questions are looked up in the ledger first, and only
unanswered ones are asked.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dnpo.errors import SettingsError
from dnpo.judges import Forecast, Judge, make_verdict
from dnpo.judges.asked.ledger import Ledger, Question
from dnpo.judges.asked.reading import Mode
from dnpo.records import HUMAN, Message, Prompt, Response, Verdict
from dnpo.settings import Fraction, neutral, place
from dnpo.store import Report

if TYPE_CHECKING:
    import jinja2

Reading = Literal["text", "logprobs"]
SHIPPED = Path(__file__).parent / "templates"
TRIAL = ("5028841971", "6939937510")  # two responses with texts that no template contains


class Template:
    """The text of a question, from a YAML file with ``version``, ``mode``, ``user`` and optionally ``system``.

    Raises:
        SettingsError: the file cannot be read, lacks something, or is for the other mode.
    """

    def __init__(self, path: Path, mode: Mode) -> None:
        import yaml

        def broken(problem: object) -> SettingsError:
            return SettingsError(
                f"judge.template={path}: {problem}; expected a YAML file with version, mode ({mode}), user and, if "
                f"there is one, system, as in {SHIPPED / f'{mode}.yaml'}"
            )

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:  # a date that does not exist is a ValueError
            raise broken(error) from error
        if not isinstance(content, dict):
            raise broken("it is not a mapping")
        for name in ("version", "mode", "user", *(["system"] if "system" in content else [])):
            if not isinstance(content.get(name), str) or not content[name].strip():
                raise broken(f"{name} is missing or not text")
        if unknown := set(content) - {"version", "mode", "user", "system"}:
            raise broken(f"unknown: {', '.join(sorted(map(str, unknown)))}")
        if content["mode"] != mode:
            raise broken(f"its mode is {content['mode']}")
        self.path, self.mode = path, mode
        self._texts = {role: content[role] for role in ("system", "user") if role in content}
        try:
            trials = [self.messages([{"role": "user", "content": "?"}], *TRIAL, answer) for answer in (None, "7")]
        except Exception as error:  # expressions in a template can raise anything
            raise broken(f"{type(error).__name__}: {error}") from error
        for text in TRIAL[: 2 if mode == "pairwise" else 1]:
            if not all(any(text in turn["content"] for turn in trial) for trial in trials):
                raise broken("it does not show what is to be judged ({{ response }}, or {{ first }} and {{ second }})")
        digest = hashlib.sha256("\0".join(content.get(r, "") for r in ("system", "user")).encode()).hexdigest()
        self.name = f"{content['version']}/{digest[:12]}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled template, which cannot be sent to another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_parts"}

    @cached_property
    def _parts(self) -> dict[str, "jinja2.Template"]:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        return {role: environment.from_string(text) for role, text in self._texts.items()}

    def messages(
        self, conversation: Sequence[Message], response: str, second: str = "", answer: str | None = None
    ) -> list[Message]:
        """The messages that ask about one response, or about two."""
        shown = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in conversation)
        texts = "\0".join([shown, response, second])
        mark = hashlib.sha256(texts.encode()).hexdigest()[:8]
        while mark in texts:
            mark = hashlib.sha256(mark.encode()).hexdigest()[:8]
        known: dict[str, Any] = {"conversation": shown, "mark": mark, "answer": answer}
        known |= {"response": response} if self.mode == "score" else {"first": response, "second": second}
        return [{"role": role, "content": part.render(known)} for role, part in self._parts.items()]


@dataclass(frozen=True, kw_only=True)
class Prompted(Judge):
    """Base class of judges that are language models; see the head of this file.

    Args:
        mode: ``score`` or ``pairwise``.
        template: a file with the question; None takes the shipped one for the mode.
        max_unscored: share of responses that may lack a score.

    Raises:
        SettingsError: the template cannot be used.
    """

    mode: Mode = "score"
    template: str | None = place(None)
    max_unscored: Fraction = neutral(0.02)

    @property
    def in_shards(self) -> bool:
        """False: all questions are asked at once, and the ledger keeps the replies."""
        return False

    def __post_init__(self) -> None:
        _ = self.wording  # refuse a bad template at once

    @property
    @abstractmethod
    def kind(self) -> str:
        """The kind of judge with the settings that can change an answer, as the ledger shows it."""

    @property
    @abstractmethod
    def respondent(self) -> str:
        """The model that is asked, as the ledger shows it."""

    @property
    def setting(self) -> str:
        """The settings that determine an answer, besides model and messages, as JSON; "" for none."""
        return ""

    @property
    def takes_old_answers(self) -> bool:
        """Whether to use answers that were recorded under keys that did not include all settings."""
        return False

    @cached_property
    def wording(self) -> Template:
        """The template, read once."""
        return Template(Path(self.template) if self.template else SHIPPED / f"{self.mode}.yaml", self.mode)

    def identity(self) -> Mapping[str, Any]:
        """The settings that decide the verdicts, without speed and price."""
        return {"judge": self.kind, "model": self.respondent, "template": self.wording.name}

    @abstractmethod
    def ask(self, questions: Sequence[Question], ledger: Ledger, report: Report, total: int) -> dict[str, str]:
        """Write answers into the ledger; return the reasons why questions have none, by key.

        Args:
            questions: different questions without an answer.
            total: number of all questions of the verdicts, including answered ones.
        """

    def price(self, question: Question) -> float | None:
        """The estimated cost of a question in US dollars; None if the price is not known."""
        return 0.0

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response, from answers in the ledger and new ones."""
        needed = self.make_questions(prompts, responses)
        questions = {q.key: q for some in needed for q in some}
        known = self.look_up(questions, ledger)
        if known:
            ledger.hit(questions[next(iter(known))], len(known))
        report.begin(len(questions), "questions", len(known))
        open_ = {key: q for key, q in questions.items() if key not in known}
        if old := {} if self.takes_old_answers else self._look_up_old(open_, ledger):
            report.note(
                f"{len(old):,} of these questions have answers that were recorded before keys included the judge's "
                "address and all settings; they are asked again. If it is the same judge, "
                "judge.read_old_ledger=true uses these answers"
            )
        reasons = self.ask(list(open_.values()), ledger, report, len(questions)) if open_ else {}
        values = self.look_up(questions, ledger)
        return [
            self._verdict(response, some, values, reasons) for response, some in zip(responses, needed, strict=True)
        ]

    def look_up(self, questions: Mapping[str, Question], ledger: Ledger) -> dict[str, float]:
        """The answers that the ledger has to these questions, by key."""
        found = ledger.answers(list(questions))
        if self.takes_old_answers:
            found |= self._look_up_old({key: q for key, q in questions.items() if key not in found}, ledger)
        return found

    def _look_up_old(self, questions: Mapping[str, Question], ledger: Ledger) -> dict[str, float]:
        """The answers under keys of the old form, by the present key."""
        new = {q.old_key: key for key, q in questions.items() if q.old_key != key}
        return {new[old]: value for old, value in ledger.answers(list(new)).items()}

    def forecast(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, seen: set[str]
    ) -> Forecast:
        """Count the questions that these verdicts need, and estimate the cost of those that are not in the ledger."""
        questions = {q.key: q for some in self.make_questions(prompts, responses) for q in some if q.key not in seen}
        seen |= set(questions)
        known = self.look_up(questions, ledger)
        costs = [self.price(q) for key, q in questions.items() if key not in known]
        priced = [cost for cost in costs if cost is not None]
        return Forecast(len(questions), len(costs), sum(priced) if len(priced) == len(costs) else None)

    def make_questions(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[list[Question]]:
        """The questions for each response's verdict: one, two, or none if there is nothing to ask."""
        by_id = {p.id: p for p in prompts}
        if self.mode == "score":
            return [[self._question(by_id[r.id], r.text)] for r in responses]
        human = {r.id: r.text for r in responses if r.source == HUMAN}
        return [
            list(self._comparison(by_id[r.id], human.get(r.id, by_id[r.id].human), r.text)) if r.source != HUMAN else []
            for r in responses
        ]

    def _comparison(self, prompt: Prompt, human: str, generated: str) -> Iterator[Question]:
        """The questions in both orders; none for a response that is identical to the human one."""
        if human == generated:
            return
        yield self._question(prompt, human, generated, "ab")
        yield self._question(prompt, generated, human, "ba")

    def _question(self, prompt: Prompt, response: str, second: str = "", order: str = "") -> Question:
        messages = self.wording.messages(prompt.messages, response, second, prompt.answer)
        return Question.make(self.kind, self.respondent, self.wording.name, order, messages, self.setting)

    def _verdict(
        self,
        response: Response,
        questions: Sequence[Question],
        values: Mapping[str, float],
        reasons: Mapping[str, str],
    ) -> Verdict:
        missing = [q for q in questions if q.key not in values]
        if missing:
            return make_verdict(response, None, reasons.get(missing[0].key, "not asked"))
        if self.mode == "score":
            return make_verdict(response, values[questions[0].key])
        if not questions:  # the human response compared with itself
            return make_verdict(response, 50.0)
        first, second = 100.0 - values[questions[0].key], values[questions[1].key]
        return make_verdict(response, (first + second) / 2, disagreement=abs(first - second))
