"""A judge behind an OpenAI-compatible endpoint, which is asked many questions in parallel.

Every question is sent until it is answered or its deadline has passed. A reply is an answer only if it is unambiguous.
Answers are written to the ledger as they arrive, so no paid answer is lost. The settings are here; requests and replies
are in ``endpoint.py``, parallel questions in ``asking.py``, the batch API in ``batch.py``.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from dnpo import interrupts
from dnpo.connection import address_of, check_address, find_bad_key
from dnpo.errors import SettingsError
from dnpo.judges import Canary
from dnpo.judges.asked.asking import LATE, Limits, ask_one_by_one, tell_swap
from dnpo.judges.asked.batch import ask_in_batches
from dnpo.judges.asked.endpoint import Endpoint
from dnpo.judges.asked.ledger import Ledger, Question
from dnpo.judges.asked.prices import Price, price_of
from dnpo.judges.asked.questions import Prompted, Reading
from dnpo.records import Prompt
from dnpo.settings import Count, Finite, Positive, neutral, place
from dnpo.store import Report

OPENAI = "https://api.openai.com/v1"
ENDING = f"replies on their way are paid for, so the run waits up to {LATE} s for them"
CANARY_SECONDS = 30.0  # after this time without an answer the check fails
SHOWN = 300  # characters of a reply
# Fields that extra_body cannot set: they are part of the question, or have a setting.
TAKEN = {
    **dict.fromkeys(("messages", "model", "n", "stream", "stream_options"), "dnpo sets it itself"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "give judge.max_tokens"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "give judge.reading=logprobs"),
    **{name: f"give judge.{name}" for name in ("temperature", "reasoning_effort", "chat_template_kwargs")},
}


@dataclass(frozen=True, kw_only=True)
class OpenAI(Prompted):
    """A model behind an OpenAI-compatible endpoint (DNPO paper, section 5.1: a score from 0 to 100).

    Args:
        model: its name at the endpoint.
        base_url: the address, including ``/v1``.
        key_from: environment variable with the key. Endpoints other than OpenAI's may need no key.
        same_as: another address of the same judge, such as its server's earlier one. Answers and stages from
            either address are used for both.
        version: any text. Change it when the weights behind an address change, so that earlier answers are not used.
        read_old_ledger: use answers that were recorded before keys included addresses and all settings.
        mode: ``score``, or ``pairwise``: the generated against the human response, in both orders.
        reading: ``text``, or ``logprobs``: expected values over the likeliest tokens, if the server gives their
            log-probabilities.
        structured: ``auto`` asks for JSON by a schema, unless the server refuses it; ``off`` never asks for it.
        pattern: a regular expression for replies of an unusual form; its one group is the score (or A, B or TIE).
        template: a file with the question; null takes the shipped one for the mode.
        temperature: temperature of the judge; null leaves it to the server.
        max_tokens: maximum number of tokens in a reply.
        reasoning_effort: how long the judge thinks, if the server has this parameter; null does not send it.
        chat_template_kwargs: arguments of the chat template, if the server accepts them (vLLM, SGLang).
        extra_body: further fields of the body of every request.
        headers: further headers, each with the environment variable that holds its value.
        concurrency: maximum number of questions in flight.
        requests_per_minute: limit for all runs that share the ledger together; null for none.
        tokens_per_minute: the same for the tokens of questions and replies.
        timeout: seconds of one attempt.
        deadline: seconds from the first attempt at a question to the last.
        max_replies: maximum number of unreadable replies to a question before it fails.
        batch: ask by the provider's batch API, within a day at a lower price.
        batch_poll: seconds between checks of a batch.
        max_cost: US dollars that a run (or a sweep as a whole) may spend; null for no limit.
        prices: a file with prices; null takes the shipped one.
        max_unscored: share of responses that may lack a score.

    Raises:
        SettingsError: the address has a secret in it, the pattern is not valid, the template or the table of prices
            cannot be read, or ``max_cost`` limits a model whose price is not known.
    """

    model: str
    base_url: str = place(OPENAI)
    key_from: str = neutral("OPENAI_API_KEY")
    same_as: str | None = place(None)
    version: str | None = None
    read_old_ledger: bool = False
    reading: Reading = "text"
    structured: Literal["auto", "off"] = "auto"
    pattern: str | None = None
    temperature: Finite | None = 0.0
    max_tokens: Count = 16
    reasoning_effort: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    extra_body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] | None = place(None)
    concurrency: Count = neutral(16)
    requests_per_minute: Count | None = neutral(None)
    tokens_per_minute: Count | None = neutral(None)
    timeout: Positive = neutral(60.0)
    deadline: Positive = neutral(600.0)
    max_replies: Count = neutral(3)
    batch: bool = neutral(False)
    batch_poll: Positive = neutral(30.0)
    max_cost: Positive | None = neutral(None)
    prices: str | None = neutral(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("base_url", "same_as"):
            if getattr(self, name) is not None:
                check_address(name, getattr(self, name), "judge", OPENAI)
        if self._pattern is not None and self.reading != "text":
            raise SettingsError("pattern: reads the text of a reply, which reading=logprobs does not use; leave it out")
        for name in self.extra_body or {}:
            if name in TAKEN or (name == "response_format" and self.structured == "auto"):
                advice = TAKEN.get(name, "add judge.structured=off")
                raise SettingsError(f"extra_body.{name}: cannot be given here; {advice}")
        if self._tariff is None and self.max_cost is not None:
            raise SettingsError(
                f"max_cost={self.max_cost:g}: there is no price for {self.model}, so its cost cannot be limited; add "
                "it to a copy of the table and give that in judge.prices"
            )

    @property
    def only_compares(self) -> bool:
        """Whether it is asked for preferences over the human response."""
        return self.mode == "pairwise"

    @property
    def spends_freely(self) -> bool:
        """Whether its model has a price, and ``max_cost`` is not given."""
        return self._tariff is not None and self.max_cost is None

    @property
    def kind(self) -> str:
        """``openai``, the temperature unless it is 0, the mode, and the reading unless it is ``text``."""
        temperature = f" t={self.temperature:g}" if self.temperature else ""
        return f"openai{temperature} {self.mode}{'' if self.reading == 'text' else f' {self.reading}'}"

    @property
    def respondent(self) -> str:
        """The model by its name at the endpoint."""
        return self.model

    @cached_property
    def setting(self) -> str:
        """The settings that determine an answer, as JSON: address and everything sent, without model and messages."""
        address = address_of(self.same_as or self.base_url)
        return json.dumps(
            {"address": address, "version": self.version or "", **self.endpoint.settings()},
            ensure_ascii=False,
            sort_keys=True,
        )

    @property
    def takes_old_answers(self) -> bool:
        """Whether to use answers that were recorded before keys included addresses and all settings."""
        return self.read_old_ledger

    def identity(self) -> Mapping[str, Any]:
        """The settings that decide the verdicts, including the address, without secrets."""
        old = {"old ledger": True} if self.read_old_ledger else {}
        return {**super().identity(), "setting": json.loads(self.setting), **old}

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        if self.pattern is None:
            return None
        try:
            found = re.compile(self.pattern)
        except re.error as error:
            raise SettingsError(f"pattern={self.pattern}: is not a regular expression ({error})") from None
        if found.groups != 1:
            raise SettingsError(
                f"pattern={self.pattern}: has {found.groups} groups; expected one, around the value, as in "
                r"'Score: (\d+)' ((?:…) is not a group)"
            )
        return found

    @cached_property
    def _tariff(self) -> Price | None:
        return price_of(self.model, self.prices)

    @cached_property
    def endpoint(self) -> Endpoint:
        """The endpoint. It is created once, so that a parameter refused in the check is not sent in the run."""
        return Endpoint(
            self.model,
            self.base_url,
            self.key_from,
            headers=self.headers or {},
            timeout=self.timeout,
            mode=self.mode,
            reading=self.reading,
            pattern=self._pattern,
            structured=self.structured == "auto" and self.reading == "text",
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            extra=self._extra,
            tariff=self._tariff,
        )

    @property
    def _extra(self) -> dict[str, Any]:
        named = {"reasoning_effort": self.reasoning_effort, "chat_template_kwargs": self.chat_template_kwargs}
        return {**{name: value for name, value in named.items() if value is not None}, **(self.extra_body or {})}

    @property
    def limits(self) -> Limits:
        """The limits on asking one by one."""
        return Limits(
            concurrency=self.concurrency,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            timeout=self.timeout,
            deadline=self.deadline,
            max_replies=self.max_replies,
            max_cost=self.max_cost,
            max_unscored=self.max_unscored,
        )

    def price(self, question: Question) -> float | None:
        """The estimated cost of a question in US dollars, by the table of prices."""
        return self.endpoint.price(question, batch=self.batch)

    # --- before anything is asked

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Accept any prompt, unless the endpoint needs a key that is not set or cannot be sent."""
        problem = find_bad_key("judge", "judge=openai", self.key_from, self.headers or {})
        if problem is not None:
            return problem
        if self.base_url.rstrip("/") == OPENAI and not os.environ.get(self.key_from):
            return (
                f"judge=openai: the environment variable {self.key_from} is not set; export the key there "
                "(judge.key_from names another variable), or set judge.base_url to a server that needs none"
            )
        return None

    def canary(self, ledger: Ledger) -> Canary:
        """Ask a new question, directly even if the run uses batches."""
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {secrets.token_hex(4)}"  # never asked before
        prompt = Prompt("canary", [{"role": "user", "content": f"(check of {stamp}) Name the capital of France."}], "")
        question = (
            self._question(prompt, "Paris.")
            if self.mode == "score"
            else self._question(prompt, "Paris.", "Oslo.", "ab")
        )
        limits = replace(self.limits, deadline=min(self.deadline, CANARY_SECONDS), reconnects=False)
        before = ledger.served(question)
        reasons = interrupts.run(ask_one_by_one(self.endpoint, limits, [question], ledger, None, 1), ENDING)
        reply = ledger.reply(question.key)
        shown = f"reply {reply[:SHOWN]!r}" if reply else "no reply"
        where = f"{self.model} at {self.base_url}"
        if question.key in reasons:
            reason = reasons[question.key]
            text = f"{where} gave no score to a right answer: {reason} ({shown})"
            return Canary(False, text, advise(reason, self.max_tokens))
        price = "no price known" if self._tariff is None else f"${ledger.cost_of(question.key):.5f} a question"
        value = ledger.answers([question.key])[question.key]
        asked = "".join(f"; dnpo {each}, as the server refuses a parameter" for each in self.endpoint.concessions)
        new = [served for served in ledger.served(question) if served not in before]
        warning = tell_swap(self.endpoint, before[-1], new[-1]) if before and new else ""
        elsewhere = self._elsewhere(question, ledger)
        text = f"{where} scores a right answer with {value:g} points ({shown}; {price}){asked}{elsewhere}"
        return Canary(True, text, warning=warning)

    def _elsewhere(self, question: Question, ledger: Ledger) -> str:
        """The other addresses from which the ledger has answers of this judge to the same kind of questions."""
        own = json.loads(self.setting)
        found = [json.loads(setting) for setting in ledger.settings(question)]
        others = sorted(each["address"] for each in found if {**each, "address": own["address"]} == own)
        if set(others) <= {own["address"]}:
            return ""
        named = ", ".join(address for address in others if address != own["address"])
        return f"; the ledger also has answers from {named}: if it is the same judge, judge.same_as takes them"

    # --- asking

    def ask(self, questions: Sequence[Question], ledger: Ledger, report: Report, total: int) -> dict[str, str]:
        """Ask one by one, or in batches.

        Raises:
            JudgeError: the endpoint cannot be used at all, ``max_cost`` is reached, or too many calls have failed. The
                ledger has the answers so far.
        """
        if self.batch:
            asked = ask_in_batches(
                self.endpoint, questions, ledger, report, seconds=self.batch_poll, max_cost=self.max_cost
            )
            return interrupts.run(asked, "batches go on at the server")
        return interrupts.run(ask_one_by_one(self.endpoint, self.limits, questions, ledger, report, total), ENDING)


def advise(reason: str, max_tokens: int) -> str:
    """The settings to change after a reply without a score."""
    if "thought" in reason or "cut" in reason:
        return (
            f"judge.max_tokens (it is {max_tokens}), or let it think less: judge.reasoning_effort=…, "
            "judge.chat_template_kwargs='{enable_thinking: false}'"
        )
    if "log-probabilit" in reason or "several tokens" in reason:
        return "judge.reading=text"
    if reason.startswith("HTTP 4"):
        named = [f"judge.{name}" for name in ("temperature", "max_tokens", "reasoning_effort") if name in reason]
        named = ["judge.temperature=null" if name == "judge.temperature" else name for name in named]
        return ", ".join([*named, "judge.extra_body, judge.headers or judge.structured=off"])
    if "in the reply" in reason or "judge.pattern" in reason:
        return "judge.pattern='…(\\d+)…', judge.template or judge.structured"
    if reason.startswith("the connection failed"):
        return "judge.base_url, or start the server there"
    if "connection" in reason or "no reply" in reason or "deadline" in reason:
        return "judge.base_url, judge.timeout or judge.deadline"
    return "the judge's settings: its address, its model, its question"
