"""A judge behind any OpenAI-compatible endpoint, asked many questions at once.

Every question is sent until it is answered or its deadline has passed; a reply is an answer only if it can be read
without guessing. Answers go into the ledger one by one as they arrive, so nothing that was paid for is lost, whatever
happens next. The key comes from the environment and goes nowhere but into the request.
"""

import asyncio
import copy
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from dnpo.errors import SettingsError
from dnpo.judges import Canary
from dnpo.judges.asked.asking import Asking
from dnpo.judges.asked.ledger import Answer, Ledger, Question
from dnpo.judges.asked.prices import price_of, tokens_about
from dnpo.judges.asked.questions import (
    Mode,
    Prompted,
    Reading,
    expected_score,
    expected_winner,
    read_score,
    read_winner,
)
from dnpo.records import Prompt
from dnpo.settings import Count, Finite, Fraction, Positive
from dnpo.store import Report

OPENAI = "https://api.openai.com/v1"
CANARY_SECONDS = 30.0  # a run need not wait longer to learn that nobody answers
SCHEMAS: dict[Mode, dict[str, Any]] = {
    "score": {"score": {"type": "integer", "description": "a whole number from 0 to 100"}},
    "pairwise": {"better": {"type": "string", "enum": ["A", "B", "TIE"]}},
}


class OpenAI(Prompted):
    """A model behind an OpenAI-compatible endpoint (DNPO paper, section 5.1: a score from 0 to 100).

    Args:
        model: its name at the endpoint.
        base_url: up to and with ``/v1``.
        key_from: environment variable with the key. Other endpoints than OpenAI's may need none.
        mode: ``score``, or ``pairwise``: the generated against the human response, in both orders.
        reading: ``text``, or ``logprobs``: expected values over the likeliest tokens, where the server tells them.
        structured: ``auto`` asks for JSON by a schema and goes without where the server refuses; ``off`` never asks.
        template: a file with the question; null takes the shipped one for the mode.
        temperature: of the judge; null leaves it to the server.
        max_tokens: of a reply.
        concurrency: questions in flight at most.
        requests_per_minute, tokens_per_minute: ceilings over all runs that share the ledger; null for none.
        timeout: seconds of one attempt.
        deadline: seconds from the first attempt at a question to the last.
        max_replies: replies at most that are paid for one question, while none of them can be read.
        batch: ask through the provider's batch API, within a day at a lower price.
        batch_poll: seconds between two looks at a batch.
        max_cost: US dollars that a run (or a sweep as a whole) may spend; null for no limit.
        prices: a file with prices; null takes the shipped one.
        max_unscored: share of responses that may stay without a score.
    """

    def __init__(
        self,
        *,
        model: str,
        base_url: str = OPENAI,
        key_from: str = "OPENAI_API_KEY",
        mode: Mode = "score",
        reading: Reading = "text",
        structured: Literal["auto", "off"] = "auto",
        template: str | None = None,
        temperature: Finite | None = 0.0,
        max_tokens: Count = 16,
        concurrency: Count = 16,
        requests_per_minute: Count | None = None,
        tokens_per_minute: Count | None = None,
        timeout: Positive = 60.0,
        deadline: Positive = 600.0,
        max_replies: Count = 3,
        batch: bool = False,
        batch_poll: Positive = 30.0,
        max_cost: Positive | None = None,
        prices: str | None = None,
        max_unscored: Fraction = 0.02,
    ) -> None:
        kind = "openai" + (f" t={temperature:g}" if temperature else "")
        super().__init__(kind, model, mode, reading, template, max_unscored)
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"base_url={base_url}: expected an address such as {OPENAI}")
        if parts.username or parts.password or parts.query:
            raise SettingsError(
                f"base_url: has a name, password or query in it ({parts.scheme}://…@{parts.hostname}); settings are "
                "written down, so give the plain address, and the key in the environment (judge.key_from)"
            )
        self.base_url, self.key_from = base_url, key_from
        self.temperature, self.max_tokens = temperature, max_tokens
        self.concurrency, self.timeout, self.deadline, self.max_replies = concurrency, timeout, deadline, max_replies
        self.requests_per_minute, self.tokens_per_minute = requests_per_minute, tokens_per_minute
        self.batch, self.batch_poll, self.max_cost = batch, batch_poll, max_cost
        self.prices = price_of(model, prices)
        if max_cost is not None and self.prices is None:
            raise SettingsError(
                f"max_cost={max_cost:g}: there is no price for {model}, so no spend to hold against it; add it to a "
                "copy of the table and give that in judge.prices"
            )
        self.structured = structured == "auto" and reading == "text"
        self.limit_name = "max_tokens"

    # --- the request and its reply

    def body(self, question: Question) -> dict[str, Any]:
        """What is sent for one question."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": question.messages,
            self.limit_name: self.max_tokens,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.structured:
            properties = SCHEMAS[self.mode]
            schema = {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            }
            form = {"name": "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if self.reading == "logprobs":
            body |= {"logprobs": True, "top_logprobs": 20}
        return body

    def read(self, raw: bytes, question: Question) -> Answer:
        """What a server's reply says; without a value, and with the reason, where it says nothing to rely on."""
        try:
            reply = json.loads(raw)
            choice = reply["choices"][0]
            text = choice["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return Answer(None, reply=self.clean(raw[:500].decode("utf-8", "replace")), reason="a broken reply")
        counted = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
        tokens_in = _whole(counted.get("prompt_tokens"), tokens_about(question))
        tokens_out = _whole(counted.get("completion_tokens"), self.max_tokens)
        cost = None if self.prices is None else self.prices.of(tokens_in, tokens_out, self.batch)
        value, reason = None, ""
        shown = text if isinstance(text, str) else str(choice["message"].get("refusal") or "")
        if choice.get("finish_reason") not in ("stop", None):
            reason = f"the reply ended by {self.clean(str(choice['finish_reason']))[:100]}"
        elif not isinstance(text, str):
            reason = "a refusal, or no text"
        else:
            try:
                value = self._value(text, choice)
            except ValueError as error:
                reason = str(error)
        return Answer(value, self.clean(shown), tokens_in, tokens_out, cost, reason=reason)

    def _value(self, text: str, choice: Mapping[str, Any]) -> float:
        if self.reading == "text":
            return read_score(text) if self.mode == "score" else read_winner(text)
        try:
            tokens = [
                {str(t["token"]): float(t["logprob"]) for t in [token, *token["top_logprobs"]]}
                for token in choice["logprobs"]["content"]
            ]
        except (LookupError, TypeError, ValueError, OverflowError):
            raise ValueError("the server tells no log-probabilities; set judge.reading=text") from None
        return expected_score(tokens) if self.mode == "score" else expected_winner(tokens)

    def price(self, question: Question) -> float | None:
        """See :class:`~dnpo.judges.asked.questions.Prompted`."""
        if self.prices is None:
            return None
        return self.prices.of(tokens_about(question), self.max_tokens, self.batch)

    def clean(self, text: str) -> str:
        """Without the key: servers repeat it in their errors."""
        key = os.environ.get(self.key_from, "")
        return (text.replace(key, "[key]") if len(key) > 3 else text)[:2000]

    # --- before anything is asked

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """There is a key, where one is needed, and it can be sent."""
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
        """See :class:`~dnpo.judges.Judge`."""
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {secrets.token_hex(4)}"  # never asked before
        prompt = Prompt("canary", [{"role": "user", "content": f"(check of {stamp}) Name the capital of France."}], "")
        question = (
            self._question(prompt, "Paris.")
            if self.mode == "score"
            else self._question(prompt, "Paris.", "Oslo.", "ab")
        )
        patience = copy.copy(self)
        patience.deadline, patience.batch = min(self.deadline, CANARY_SECONDS), False
        asking = Asking(patience, [question], ledger, None, 1)
        reasons = asyncio.run(asking.all())
        self.structured, self.limit_name = patience.structured, patience.limit_name
        price = "no price known" if self.prices is None else f"${ledger.cost_of(question.key):.5f}"
        if question.key in reasons:
            return Canary(
                False, f"{self.model} at {self.base_url} gave a right answer no score: {reasons[question.key]}"
            )
        value = ledger.answers([question.key])[question.key]
        return Canary(True, f"{self.model} at {self.base_url} says {value:g} to a right answer ({price} a question)")

    # --- asking

    def ask(self, questions: Sequence[Question], ledger: Ledger, report: Report, total: int) -> dict[str, str]:
        """See :class:`~dnpo.judges.asked.questions.Prompted`.

        Raises:
            JudgeError: the endpoint cannot be used at all, ``max_cost`` is reached, or too many calls have failed. What
                was answered is in the ledger.
        """
        if self.batch:
            from dnpo.judges.asked.batch import ask_in_batches

            return asyncio.run(ask_in_batches(self, questions, ledger, report))
        return asyncio.run(Asking(self, questions, ledger, report, total).all())

    def client(self) -> Any:
        """A client for one event loop. It never tries again by itself."""
        from openai import AsyncOpenAI

        key = os.environ.get(self.key_from) or "none"
        return AsyncOpenAI(api_key=key, base_url=self.base_url, max_retries=0, timeout=self.timeout)

    def give_way(self, message: str, body: Mapping[str, Any]) -> bool:
        """Do without what the server refuses by name; false if nothing of the kind was sent."""
        if "response_format" in body and ("response_format" in message or "json_schema" in message):
            self.structured = False
            return True
        if "max_tokens" in body and "max_completion_tokens" in message:
            self.limit_name = "max_completion_tokens"
            return True
        return False


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else otherwise
