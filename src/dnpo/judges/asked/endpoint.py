"""An OpenAI-compatible endpoint: make the request for a question, and read the reply.

It does not depend on judges. Keys come from the environment and are used in requests only.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dnpo.connection import Connection
from dnpo.connection.refusals import find_refusal
from dnpo.judges.asked.ledger import Answer, Question
from dnpo.judges.asked.prices import Price, tokens_about
from dnpo.judges.asked.questions import Reading
from dnpo.judges.asked.reading import Mode, read_expected_score, read_expected_winner, read_score, read_winner

SCHEMAS: dict[Mode, dict[str, Any]] = {
    "score": {"score": {"type": "integer", "description": "a whole number from 0 to 100"}},
    "pairwise": {"better": {"type": "string", "enum": ["A", "B", "TIE"]}},
}
# Servers' words for why a reply ended (lower case): complete, cut, or stopped for another reason.
ENDED = {"stop", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "stop_token", "complete", "completed"}
BROKEN = re.compile(
    r"filter|safety|recitation|block|prohibit|spii|error|fail|abort|cancel|refus|tool|function|interrupt|time|limit|max"
)
CUT = {"length", "max_tokens", "max_output_tokens", "model_length", "token_limit"}
_SCHEMA_REFUSED = re.compile(
    r"response_?format|json[_ ]?(?:schema|object|mode|output)|structured[_ ]?outputs?|guided|grammar", re.IGNORECASE
)
_SECRET_HEADER = re.compile(r"auth|key|token|secret|cookie|passw|signature", re.IGNORECASE)


class Endpoint(Connection):
    """One model at one address, with the parameters that the server has refused so far.

    Args:
        model: its name at this address.
        base_url: the address, including ``/v1``.
        key_from: environment variable with the key.
        headers: further headers, each with the environment variable that holds its value.
        timeout: seconds of one attempt.
        mode: ``score`` or ``pairwise``.
        reading: ``text``, or ``logprobs`` for expected values over the likeliest tokens.
        pattern: finds the value in a reply; None: only the usual forms are read.
        structured: whether to ask for JSON by a schema, unless the server refuses it.
        temperature: temperature of the model; None leaves it to the server.
        max_tokens: maximum number of tokens of a reply.
        extra: further fields of the body of every request.
        tariff: the price of tokens; None if it is not known.

    Attributes:
        limit_name: the parameter by which the server limits a reply's tokens.
        has_answered: whether it has answered anything so far.
        concessions: how requests differ from the settings, because the server refuses a parameter.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        key_from: str,
        *,
        headers: Mapping[str, str],
        timeout: float,
        mode: Mode,
        reading: Reading,
        pattern: re.Pattern[str] | None,
        structured: bool,
        temperature: float | None,
        max_tokens: int,
        extra: Mapping[str, Any],
        tariff: Price | None,
    ) -> None:
        super().__init__(base_url, key_from, headers=headers, timeout=timeout)
        self.model, self.extra, self.pattern = model, extra, pattern
        self.mode, self.reading = mode, reading
        self.wants_schema = self.structured = structured
        self.temperature, self.max_tokens, self.tariff = temperature, max_tokens, tariff
        self.limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
        self.has_answered = False
        self.concessions: list[str] = []

    def settings(self) -> dict[str, Any]:
        """The settings that determine an answer, besides model and messages: everything sent, and how replies are read.

        Headers that look like secrets are included by name only, others with a hash of the value.
        """
        body = {"max_tokens": self.max_tokens, "temperature": self.temperature, **self.extra}
        shown = {
            name.lower(): "secret" if _SECRET_HEADER.search(name) else _short_hash(os.environ.get(variable, ""))
            for name, variable in self.headers.items()
        }
        found = {"body": body, "headers": shown, "structured": self.wants_schema}
        return found | {"pattern": self.pattern.pattern if self.pattern else ""}

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
        return {**body, **self.extra}

    def give_way(self, message: str, body: Mapping[str, Any]) -> bool:
        """Stop sending the parameter that the server's message names; false if it names no parameter that was sent."""
        if "response_format" in body and "response_format" not in self.extra and _SCHEMA_REFUSED.search(message):
            self._concede("asks without a JSON schema (judge.structured)", self.structured)
            self.structured = False
            return True
        if "max_tokens" in body and "max_completion_tokens" in message:
            self._concede("sends max_completion_tokens instead of max_tokens", self.limit_name == "max_tokens")
            self.limit_name = "max_completion_tokens"
            return True
        return False

    def _concede(self, what: str, is_new: bool) -> None:
        if is_new:
            self.concessions.append(what)

    def read(self, raw: bytes, question: Question, *, batch: bool = False) -> Answer:
        """Read a server's reply. If it cannot be read, the answer has a reason and no value.

        Args:
            raw: the body of the reply.
            question: the question; its tokens are estimated if the server does not count them.
            batch: whether the reply came from the batch API, at its price.
        """
        try:
            reply = json.loads(raw)
            choice = reply["choices"][0]
            message = choice["message"]
            text = _text_of(message.get("content"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            refusal = find_refusal(raw)
            reason = f"an error with status 200: {self.clean(refusal.text)[:300]}" if refusal else "a broken reply"
            return Answer(None, reply=self.clean(raw[:500].decode("utf-8", "replace")), reason=reason)
        counted = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
        tokens_in = _whole(counted.get("prompt_tokens"), tokens_about(question))
        tokens_out = _whole(counted.get("completion_tokens"), self.max_tokens)
        cost = None if self.tariff is None else self.tariff.of(tokens_in, tokens_out, batch)
        value, reason = None, self._ended_badly(choice.get("finish_reason"), counted.get("completion_tokens"))
        shown = text if text is not None else str(message.get("refusal") or "")
        if not reason and not (text or "").strip():
            thought = next((name for name in ("reasoning_content", "reasoning") if message.get(name)), None)
            reason = f"a thought ({thought}) and no text after it" if thought else "a refusal, or no text"
        if not reason:
            try:
                value = self._value(text or "", choice)
            except ValueError as error:
                reason = str(error)
        self.has_answered = self.has_answered or value is not None
        served = " ".join(
            str(reply[name]) for name in ("model", "system_fingerprint") if isinstance(reply.get(name), str)
        )
        answer = Answer(
            value, self.clean(shown), tokens_in, tokens_out, cost, reason=reason, served=self.clean(served)[:200]
        )
        return answer

    def _ended_badly(self, finish: Any, tokens_out: Any) -> str:
        """Why a reply is incomplete; "" if the server reports no reason."""
        word = str(finish or "").casefold().removeprefix("finish_reason_")
        if word in CUT:
            return f"the reply was cut ({word}) at judge.max_tokens={self.max_tokens}"
        if word not in ENDED and BROKEN.search(word):
            return f"the reply ended by {self.clean(str(finish))[:100]}"
        if word not in ENDED:  # an unknown word: the reply is complete only if it did not use all its tokens
            full = isinstance(tokens_out, int) and tokens_out >= self.max_tokens
            return f"the reply may have been cut at judge.max_tokens={self.max_tokens}" if full else ""
        return ""

    def _value(self, text: str, choice: Mapping[str, Any]) -> float:
        if self.reading == "text":
            return read_score(text, self.pattern) if self.mode == "score" else read_winner(text, self.pattern)
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


def _text_of(content: Any) -> str | None:
    """The text of a message: its content, or the parts of its content that are text and not thoughts."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts: Sequence[Any] = [
        part for part in content if part.get("type") not in ("thinking", "redacted_thinking", "reasoning")
    ]
    if not parts or any(part.get("type") not in ("text", "output_text") for part in parts):
        return None
    # on separate lines, so that digits of two parts do not become one number
    return "\n".join(str(part["text"]) for part in parts)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _whole(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else otherwise
