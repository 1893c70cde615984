"""An OpenAI-compatible endpoint: the request for a question, and how its reply is read.

It knows nothing of judges. The key comes from the environment and goes nowhere but into the request.
"""

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from dnpo.judges.asked.ledger import Answer, Question
from dnpo.judges.asked.prices import Price, tokens_about
from dnpo.judges.asked.questions import (
    Mode,
    Reading,
    read_expected_score,
    read_expected_winner,
    read_score,
    read_winner,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

SCHEMAS: dict[Mode, dict[str, Any]] = {
    "score": {"score": {"type": "integer", "description": "a whole number from 0 to 100"}},
    "pairwise": {"better": {"type": "string", "enum": ["A", "B", "TIE"]}},
}


class Endpoint:
    """One model at one address, and what the server has refused so far.

    Args:
        model: its name there.
        base_url: up to and with ``/v1``.
        key_from: environment variable with the key.
        timeout: seconds of one attempt.
        mode: what questions ask for.
        reading: ``text``, or ``logprobs`` for expected values over the likeliest tokens.
        structured: whether to ask for JSON by a schema, for as long as the server takes that.
        temperature: of the model; None leaves it to the server.
        max_tokens: of a reply.
        tariff: what tokens cost; None where that is not known.

    Attributes:
        limit_name: the parameter by which the server limits a reply's tokens.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        key_from: str,
        *,
        timeout: float,
        mode: Mode,
        reading: Reading,
        structured: bool,
        temperature: float | None,
        max_tokens: int,
        tariff: Price | None,
    ) -> None:
        self.model, self.base_url, self.key_from, self.timeout = model, base_url, key_from, timeout
        self.mode, self.reading, self.structured = mode, reading, structured
        self.temperature, self.max_tokens, self.tariff = temperature, max_tokens, tariff
        self.limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"

    def client(self) -> "AsyncOpenAI":
        """A client for one event loop, without automatic retries."""
        from openai import AsyncOpenAI

        key = os.environ.get(self.key_from) or "none"
        return AsyncOpenAI(api_key=key, base_url=self.base_url, max_retries=0, timeout=self.timeout)

    def body(self, question: Question) -> dict[str, Any]:
        """The body of the request for a question."""
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

    def give_way(self, message: str, body: Mapping[str, Any]) -> bool:
        """Stop sending the parameter that the server's message refuses; false if none that was sent is named."""
        if "response_format" in body and ("response_format" in message or "json_schema" in message):
            self.structured = False
            return True
        if "max_tokens" in body and "max_completion_tokens" in message:
            self.limit_name = "max_completion_tokens"
            return True
        return False

    def read(self, raw: bytes, question: Question, *, batch: bool = False) -> Answer:
        """Read a server's reply; an unreadable one gives an answer without a value, with the reason.

        Args:
            raw: the body of the reply.
            question: its tokens are estimated if the server does not count them.
            batch: whether the reply came from the batch API, at its price.
        """
        try:
            reply = json.loads(raw)
            choice = reply["choices"][0]
            text = choice["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return Answer(None, reply=self.clean(raw[:500].decode("utf-8", "replace")), reason="a broken reply")
        counted = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
        tokens_in = _whole(counted.get("prompt_tokens"), tokens_about(question))
        tokens_out = _whole(counted.get("completion_tokens"), self.max_tokens)
        cost = None if self.tariff is None else self.tariff.of(tokens_in, tokens_out, batch)
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
            raise ValueError("the server gives no log-probabilities; set judge.reading=text") from None
        return read_expected_score(tokens) if self.mode == "score" else read_expected_winner(tokens)

    def price(self, question: Question, *, batch: bool = False) -> float | None:
        """The estimated cost of a question in US dollars; None if the price is not known."""
        return None if self.tariff is None else self.tariff.of(tokens_about(question), self.max_tokens, batch)

    def clean(self, text: str) -> str:
        """A server's text without the key, which servers repeat in their errors; 2,000 characters at most."""
        key = os.environ.get(self.key_from, "")
        return (text.replace(key, "[key]") if len(key) > 3 else text)[:2000]


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else otherwise
