"""A judge behind any OpenAI-compatible endpoint, asked many questions at once.

Every question is sent until it is answered or its deadline has passed; a reply is an answer only if it can be read
without guessing. Answers go into the ledger one by one as they arrive, so nothing that was paid for is lost, whatever
happens next. The settings are here; requests and replies are in ``endpoint.py``, many questions at once in
``asking.py``, the batch API in ``batch.py``.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal
from urllib.parse import urlsplit

from dnpo.errors import SettingsError
from dnpo.judges import Canary
from dnpo.judges.asked.asking import Limits, ask_one_by_one
from dnpo.judges.asked.batch import ask_in_batches
from dnpo.judges.asked.endpoint import Endpoint
from dnpo.judges.asked.ledger import Ledger, Question
from dnpo.judges.asked.prices import Price, price_of
from dnpo.judges.asked.questions import Prompted, Reading
from dnpo.records import Prompt
from dnpo.settings import Count, Finite, Positive, neutral
from dnpo.store import Report

OPENAI = "https://api.openai.com/v1"
CANARY_SECONDS = 30.0  # a run need not wait longer to learn that nobody answers


@dataclass(frozen=True, kw_only=True)
class OpenAI(Prompted):
    """A model behind an OpenAI-compatible endpoint (DNPO paper, section 5.1: a score from 0 to 100).

    Args:
        model: its name at the endpoint.
        base_url: up to and with ``/v1``.
        key_from: environment variable with the key. Other endpoints than OpenAI's may need none.
        mode: ``score``, or ``pairwise``: the generated against the human response, in both orders.
        reading: ``text``, or ``logprobs``: expected values over the likeliest tokens, where the server gives them.
        structured: ``auto`` asks for JSON by a schema and goes without where the server refuses; ``off`` never asks.
        template: a file with the question; null takes the shipped one for the mode.
        temperature: of the judge; null leaves it to the server.
        max_tokens: of a reply.
        concurrency: questions in flight at most.
        requests_per_minute, tokens_per_minute: ceilings over all runs that share the ledger; null for none.
        timeout: seconds of one attempt.
        deadline: seconds from the first attempt at a question to the last.
        max_replies: unreadable replies to one question, at most, before it fails.
        batch: ask through the provider's batch API, within a day at a lower price.
        batch_poll: seconds between two looks at a batch.
        max_cost: US dollars that a run (or a sweep as a whole) may spend; null for no limit.
        prices: a file with prices; null takes the shipped one.
        max_unscored: share of responses that may stay without a score.

    Raises:
        SettingsError: an address with a secret in it, a template or table of prices that cannot be read, or a limit on
            the cost of a model whose price is not known.
    """

    model: str
    base_url: str = neutral(OPENAI)
    key_from: str = neutral("OPENAI_API_KEY")
    reading: Reading = "text"
    structured: Literal["auto", "off"] = neutral("auto")
    temperature: Finite | None = 0.0
    max_tokens: Count = neutral(16)
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
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"base_url={self.base_url}: expected an address such as {OPENAI}")
        if parts.username or parts.password or parts.query:
            raise SettingsError(
                f"base_url: has a name, password or query in it ({parts.scheme}://…@{parts.hostname}); settings are "
                "written down, so give the plain address, and the key in the environment (judge.key_from)"
            )
        if self._tariff is None and self.max_cost is not None:
            raise SettingsError(
                f"max_cost={self.max_cost:g}: there is no price for {self.model}, so no spend to hold against it; add "
                "it to a copy of the table and give that in judge.prices"
            )

    @property
    def kind(self) -> str:
        """``openai``, the temperature if it is not 0, the mode and the reading if it is not of text."""
        temperature = f" t={self.temperature:g}" if self.temperature else ""
        return f"openai{temperature} {self.mode}{'' if self.reading == 'text' else f' {self.reading}'}"

    @property
    def respondent(self) -> str:
        """The model by its name at the endpoint."""
        return self.model

    @cached_property
    def _tariff(self) -> Price | None:
        return price_of(self.model, self.prices)

    @cached_property
    def endpoint(self) -> Endpoint:
        """The endpoint, made once: what the server refused in the check before a run is not sent in the run."""
        return Endpoint(
            self.model,
            self.base_url,
            self.key_from,
            timeout=self.timeout,
            mode=self.mode,
            reading=self.reading,
            structured=self.structured == "auto" and self.reading == "text",
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            tariff=self._tariff,
        )

    @property
    def limits(self) -> Limits:
        """What asking one by one has to keep to."""
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
        """US dollars, by the table of prices and about as many tokens as the question has."""
        return self.endpoint.price(question, batch=self.batch)

    # --- before anything is asked

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Any prompt, if the key is set where one is needed, and can be sent."""
        key = os.environ.get(self.key_from, "")
        if not key.isascii() or not key.isprintable() or " " in key:
            return (
                f"judge=openai: what environment variable {self.key_from} holds is no key (it has blanks, line ends "
                "or letters beyond ASCII); export the key alone"
            )
        if self.base_url.rstrip("/") == OPENAI and not os.environ.get(self.key_from):
            return (
                f"judge=openai: the environment variable {self.key_from} is not set; export the key there "
                "(judge.key_from names another variable), or set judge.base_url to a server that needs none"
            )
        return None

    def canary(self, ledger: Ledger) -> Canary:
        """Ask one question that was never asked before, one by one even where the run will ask in batches."""
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {secrets.token_hex(4)}"  # never asked before
        prompt = Prompt("canary", [{"role": "user", "content": f"(check of {stamp}) Name the capital of France."}], "")
        question = (
            self._question(prompt, "Paris.")
            if self.mode == "score"
            else self._question(prompt, "Paris.", "Oslo.", "ab")
        )
        limits = replace(self.limits, deadline=min(self.deadline, CANARY_SECONDS))
        reasons = asyncio.run(ask_one_by_one(self.endpoint, limits, [question], ledger, None, 1))
        price = "no price known" if self._tariff is None else f"${ledger.cost_of(question.key):.5f}"
        if question.key in reasons:
            return Canary(
                False, f"{self.model} at {self.base_url} gave a right answer no score: {reasons[question.key]}"
            )
        value = ledger.answers([question.key])[question.key]
        return Canary(True, f"{self.model} at {self.base_url} says {value:g} to a right answer ({price} a question)")

    # --- asking

    def ask(self, questions: Sequence[Question], ledger: Ledger, report: Report, total: int) -> dict[str, str]:
        """Ask one by one, or in batches.

        Raises:
            JudgeError: the endpoint cannot be used at all, ``max_cost`` is reached, or too many calls have failed. What
                was answered is in the ledger.
        """
        if self.batch:
            return asyncio.run(
                ask_in_batches(
                    self.endpoint, questions, ledger, report, seconds=self.batch_poll, max_cost=self.max_cost
                )
            )
        return asyncio.run(ask_one_by_one(self.endpoint, self.limits, questions, ledger, report, total))
