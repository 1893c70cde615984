"""An OpenAI-compatible server that makes errors on purpose, and counts requests.

    python tests/judge_server.py --port 0 --faults mix --latency 0.1 --seed 0 --log FILE      prints {"port": N}

    with judge_server(faults={"reset": 0.1}, latency=0.01) as server:      # in a separate process
        ... AsyncOpenAI(base_url=server.base_url, api_key="any") ...
        server.stats()["paid_twice"], server.requests(), server.change(faults="none")

The answer to a question is a function of its text (`expected`). The fault of an attempt is drawn from the seed, the
question and the number of the attempt, so a run is repeatable for any order of requests. HTTP is implemented here on
asyncio's transports, because many faults are below HTTP: resets, and bodies that never end.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from itertools import accumulate, count
from pathlib import Path
from typing import Any, BinaryIO

# Rates of `--faults mix`, by fault. Faults that hang until the client's deadline are rarer, since each takes so long.
MIX = {
    # refused temporarily
    "429_seconds": 0.02,  # Retry-After: 0.512
    "429_date": 0.01,  # Retry-After: Sat, 21 Nov 2026 10:00:00 GMT
    "429_ms": 0.02,  # retry-after-ms: 512
    "429": 0.02,
    "500": 0.02,
    "502": 0.02,  # with a page of HTML, as gateways do
    "503": 0.02,  # half of them with Retry-After
    "408": 0.02,
    "409": 0.02,
    # below HTTP
    "reset": 0.02,  # before any byte
    "cut_body": 0.02,  # fewer bytes than Content-Length says; alternately a reset and a close
    "slow": 0.03,  # a correct answer, after --slow times the latency
    "silent": 0.01,  # never a byte
    "dribble": 0.01,  # 200, then a blank every 50 ms for ever: a timeout between bytes never fires
    "flood": 0.01,  # 200, then --flood megabytes as fast as they go
    # no completion
    "truncated": 0.02,  # JSON that stops in the middle, with the right Content-Length
    "not_completion": 0.02,  # valid JSON, such as {"ok": true} or []
    "html": 0.02,  # a page with status 200
    "empty_choices": 0.02,
    "error_200": 0.02,  # {"error": …}, as gateways send it
    # no verdict
    "null_content": 0.02,  # refusal is set
    "refusal": 0.02,
    "two_numbers": 0.02,
    "out_of_range": 0.02,
    "fraction": 0.02,
    "length": 0.02,  # a number cut short
    "content_filter": 0.02,
    "denial": 0.02,  # a sentence with one number, which is no grade
    "thought": 0.02,  # a number in a thought that does not end, or in a reply that is only a thought
}
# Permanent, so only on request: 429 insufficient_quota, 402, and 403 for one question
NEVER = ("quota", "402", "403")
HOPELESS = (
    "null_content", "refusal", "two_numbers", "out_of_range", "fraction", "length", "content_filter", "empty_choices",
    "denial", "thought", "403",
)  # fmt: skip
HANGING = ("silent", "dribble", "flood")
PAGE = b"<!doctype html><html><head><title>Bad gateway</title></head><body><h1>Bad gateway</h1>502</body></html>"


# --- answers: functions that tests call too ----------------------------------------------------------------

_PAIR = re.compile(r"<answer A([^>]*)>\n?(.*?)\n?</answer A\1>.*?<answer B\1>\n?(.*?)\n?</answer B\1>", re.DOTALL)
_PIECES = re.compile(r" ?\w+|.", re.DOTALL)  # approximate tokens of a text
_MARK = re.compile(r"\[worth (\d{1,3})\]")


def question(content: str) -> str:
    """The name of a question in the log and in stats: a hash of the last user message."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def worth(text: str) -> int:
    """A number 0-100: from the last ``[worth 83]`` in the text, or else a hash of the text."""
    marks = _MARK.findall(text) if "[worth " in text else []
    if marks:
        return min(int(marks[-1]), 100)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % 101


def expected(content: str) -> int:
    """The correct answer to a question: 0-100; for a comparison 100 for A, 0 for B and 50 for a tie.

    Two answers are compared by their worth. One pair in sixteen gets A in both orders, like judges that prefer the
    first answer; never a pair with marks.
    """
    both = _PAIR.search(content) if "<answer A" in content else None
    if both is None:
        return worth(content)
    first, second = both.group(2), both.group(3)
    if first == second:
        return 50
    marked = _MARK.search(first) and _MARK.search(second)
    if not marked and uniform(*sorted((first, second))) < 1 / 16:
        return 100
    return 50 + 50 * ((worth(first) > worth(second)) - (worth(first) < worth(second)))


def uniform(*parts: object) -> float:
    """A number in [0, 1) that is determined by these parts."""
    return draws(*parts)[0]


def draws(*parts: object) -> tuple[float, ...]:
    """Four independent numbers in [0, 1) that are determined by these parts."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return tuple(n / 2**64 for n in struct.unpack(">4Q", digest))


def is_hopeless(content: str, share: float, seed: int = 0) -> bool:
    """Whether a server with ``--hopeless share`` and this seed never answers this question correctly."""
    return _hopeless(question(content), share, seed)


def _hopeless(key: str, share: float, seed: int) -> bool:
    return share > 0 and uniform(seed, "hopeless", key) < share


def count_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """The value of ``usage.prompt_tokens``: one token for four characters, and a few for the frame of messages."""
    return 3 + sum(4 + math.ceil(len(_text(m.get("content"))) / 4) for m in messages)


def distribution(content: str) -> list[tuple[str, float]]:
    """Tokens with their probabilities at the position of the verdict, most probable first; the sum is 0.99.

    As with real judges, several tokens mean the same verdict (``83`` and `` 83``), and some tokens are not verdicts
    (``The``, ``140``).
    """
    value, spread = expected(content), 0.5 + 0.3 * uniform("spread", question(content))
    if "<answer A" in content:
        first, second, third = {100: ("A", "B", "TIE"), 0: ("B", "A", "TIE"), 50: ("TIE", "A", "B")}[value]
        tokens = [(first, spread), (f" {first}", 0.1), (second, (0.87 - spread) * 0.75)]
        tokens += [(third, (0.87 - spread) * 0.25), ("The", 0.02)]
    else:
        near = [n for n in (value - 1, value + 1, value + 2, value - 5) if 0 <= n <= 100]
        tokens = [(str(value), spread), (f" {value}", 0.1), ("The", 0.02), ("140", 0.01)]
        tokens += [(str(n), (0.86 - spread) / len(near) * (1 + 0.01 * (i - (len(near) - 1) / 2)))
                   for i, n in enumerate(near)]  # fmt: skip
    return sorted(tokens, key=lambda pair: -pair[1])


def _text(content: object) -> str:
    if isinstance(content, list):  # parts, as for pictures
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


# --- requests ---------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A request that is always refused."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, error(message, "invalid_request_error", param, code)


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(slots=True)
class Request:
    """One HTTP request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body, which must be a JSON object."""
        try:
            found = json.loads(self.body)
        except ValueError:
            raise Refused(400, "We could not parse the JSON body of your request.") from None
        if not isinstance(found, dict):
            raise Refused(400, "The body of your request is no JSON object.")
        return found


@dataclass(slots=True)
class Reply:
    """One HTTP reply."""

    status: int
    body: bytes
    headers: str = ""
    type: str = "application/json"
    wait: float = 0.0  # seconds of its Retry-After

    def head(self, length: int | None = None) -> bytes:
        """Status line and headers; a wrong length is a fault."""
        size = len(self.body) if length is None else length
        framing = "transfer-encoding: chunked" if size < 0 else f"content-length: {size}"
        return (f"{_status(self.status)}content-type: {self.type}\r\n{self.headers}{framing}\r\n\r\n").encode()


@lru_cache
def _status(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


def as_json(status: int, body: object, headers: str = "", wait: float = 0.0) -> Reply:
    return Reply(status, json.dumps(body).encode(), headers, wait=wait)


class Ask:
    """The parameters of a chat completion that are used here."""

    __slots__ = ("compares", "content", "field", "key", "limit", "model", "prompt_tokens", "tokens", "top")

    def __init__(self, body: Mapping[str, Any], structured: str, logprobs: str) -> None:
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise Refused(400, "Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
        said = [_text(m.get("content")) for m in messages if m.get("role") == "user"]
        if not said:
            raise Refused(400, "There is no message from the user.", "messages", "invalid_value")
        if not isinstance(body.get("model"), str):
            raise Refused(400, "you must provide a model parameter", "model", "missing_required_parameter")
        if body.get("stream"):
            raise Refused(400, "Streaming is not supported here.", "stream", "unsupported_value")
        top = body.get("top_logprobs") or 0
        if top > 20 or (top and not body.get("logprobs")):
            raise Refused(400, "Invalid value for 'top_logprobs'.", "top_logprobs", "invalid_value")
        self.content, self.model = said[-1], sys.intern(body["model"])
        self.key, self.compares = question(self.content), "<answer A" in self.content
        self.prompt_tokens = count_tokens(messages)
        self.limit = body.get("max_completion_tokens") or body.get("max_tokens") or 10**9
        self.top: int | None = top if logprobs != "off" and body.get("logprobs") else None
        wanted = body.get("response_format") or {}
        self.field = None
        if structured == "on" and wanted.get("type") == "json_schema":
            properties = wanted.get("json_schema", {}).get("schema", {}).get("properties") or {}
            self.field = next(iter(properties), "better" if self.compares else "score")
        value = expected(self.content)
        verdict = {100: "A", 0: "B", 50: "TIE"}[value] if self.compares else str(value)
        self.tokens = list(verdict) if logprobs == "split" and not self.compares else [verdict]
        if self.field is not None:
            quote = '"' if self.compares else ""
            self.tokens = ['{"', self.field, f'":{quote}', *self.tokens, f"{quote}}}"]


@dataclass(slots=True)
class Known:
    """The state of one question."""

    attempts: int = 0
    ok: int = 0  # correct answers begun
    delivered: int = 0  # correct answers whose last byte was written to a client that was still connected
    not_before: float = 0.0  # time of the next attempt that the last Retry-After allows


class Window:
    """Requests and tokens within a window of seconds, and their maxima so far.

    Kept in bins of 10 ms, so that memory does not depend on the load. A bin is dropped as soon as its beginning is too
    old, so the reported numbers are never too large.
    """

    def __init__(self, seconds: float) -> None:
        self.bins: deque[list[int]] = deque()
        self.length = int(seconds * 100)
        self.requests = self.tokens = self.max_requests = self.max_tokens = 0

    def add(self, now: float, tokens: int) -> None:
        tick = int(now * 100)
        while self.bins and self.bins[0][0] <= tick - self.length:
            _, requests, spent = self.bins.popleft()
            self.requests, self.tokens = self.requests - requests, self.tokens - spent
        if not self.bins or self.bins[-1][0] != tick:
            self.bins.append([tick, 0, 0])
        self.bins[-1][1] += 1
        self.bins[-1][2] += tokens
        self.requests, self.tokens = self.requests + 1, self.tokens + tokens
        self.max_requests = max(self.max_requests, self.requests)
        self.max_tokens = max(self.max_tokens, self.tokens)


@dataclass(slots=True)
class Batch:
    """A batch in progress, with the provider's facts about it."""

    shape: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


# --- the server -------------------------------------------------------------------------------------------------------


class Server:
    """Answers, faults and counters; connections only transport them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.log: BinaryIO | None = open(options.log, "wb") if options.log else None  # noqa: SIM115
        self.started = time.monotonic()
        self.known: dict[tuple[str, bool, str], Known] = {}
        self.minute, self.second = Window(60), Window(1)
        self.faults: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.count: Counter[str] = Counter()
        self.busy = 0.0
        self.running: dict[object, float] = {}
        self.first = self.last = 0.0
        self.connections: set[Connection] = set()
        self.files: dict[str, dict[str, Any]] = {}
        self.batches: dict[str, Batch] = {}
        self.numbers = count()
        self.api_calls = 0
        self.settle()

    def settle(self) -> None:
        """Prepare everything that depends on the options."""
        rates = parse_faults(self.options.faults)
        self.names, self.bounds = list(rates), list(accumulate(rates.values()))
        self.rejected = {name for name in self.options.reject.split(",") if name}
        if self.options.structured == "reject":
            self.rejected.add("response_format")

    # -- one attempt

    def ask(self, body: Mapping[str, Any]) -> Ask:
        """Read a request, or refuse it."""
        for name in sorted(self.rejected & set(body)):
            if name == "response_format" and (body[name] or {}).get("type") != "json_schema":
                continue
            message = f"Unsupported parameter: '{name}' is not supported with this model."
            raise Refused(400, message, name, "unsupported_parameter")
        return Ask(body, self.options.structured, self.options.logprobs)

    def know(self, ask: Ask) -> Known:
        """The state of the question. Each model and each reading has a separate state."""
        key = (ask.model, ask.top is not None, ask.key)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = Known()
            self.count["hopeless"] += _hopeless(ask.key, self.options.hopeless, self.options.seed)
        return found

    def fault(self, ask: Ask, attempt: int) -> tuple[str, tuple[float, ...]]:
        """The fault of the attempt ("ok" for none), with random numbers for further draws."""
        drawn = draws(self.options.seed, ask.model, ask.key, attempt)
        fault = "ok"
        if attempt <= self.options.max_faults and self.bounds and drawn[0] < self.bounds[-1]:
            fault = self.names[bisect_right(self.bounds, drawn[0])]
        if fault in ("ok", "slow") and _hopeless(ask.key, self.options.hopeless, self.options.seed):
            fault = HOPELESS[int(drawn[2] * len(HOPELESS))]
        if fault == "ok" and len(ask.tokens) > ask.limit:
            fault = "limit"  # not a fault of the server: the request leaves no room for the answer
        return fault, drawn

    async def chat(self, connection: "Connection", request: Request) -> None:
        """One attempt at a question, from the whole request to the last byte of the reply."""
        try:
            ask = self.ask(request.json())
        except Refused as refused:
            self.count["refused"] += 1
            self.write_log("", 0, "refused", refused.status, 0.0, False)
            return await connection.send(as_json(refused.status, refused.body))
        now = time.monotonic()
        known = self.know(ask)
        known.attempts += 1
        attempt = known.attempts
        fault, drawn = self.fault(ask, attempt)
        proper = fault in ("ok", "slow")
        reply = self.reply(ask, fault, drawn)
        tokens = ask.prompt_tokens + len(ask.tokens)
        self.minute.add(now, tokens)
        self.second.add(now, tokens)
        self.count["attempts"] += 1
        self.count["early"] += now < known.not_before
        self.running[connection] = now
        self.first = self.first or now
        self.count["max_concurrent"] = max(self.count["max_concurrent"], len(self.running))
        cut = True
        try:
            wait = self.options.latency * (0.5 + drawn[3])
            if wait := wait * self.options.slow if fault == "slow" else wait:
                await asyncio.sleep(wait)
            if proper:
                known.ok += 1
                self.count["ok"] += 1
            known.not_before = time.monotonic() + reply.wait - 0.002 if reply.wait else 0.0
            await self.play(connection, fault, reply, drawn)
            cut = proper and connection.transport.is_closing()
        except asyncio.CancelledError:  # the client has gone
            pass
        finally:
            self.last = time.monotonic()
            seconds = self.last - self.running.pop(connection)
            self.busy += seconds
            self.faults[fault] += 1
            status = 0 if fault in ("reset", "silent") else reply.status
            self.statuses[status] += 1
            self.count["cut"] += cut
            if proper and not cut:
                self.deliver(known, ask)
            self.write_log(ask.key, attempt, fault, status, seconds, cut, ask.model)

    def deliver(self, known: Known, ask: Ask) -> None:
        """Count a correct answer as delivered."""
        self.count["delivered"] += 1
        self.count["answered"] += known.delivered == 0
        self.count["paid_twice"] += known.delivered > 0
        self.count["tokens_in"] += ask.prompt_tokens
        self.count["tokens_out"] += len(ask.tokens)
        known.delivered += 1

    async def play(self, connection: "Connection", fault: str, reply: Reply, drawn: Sequence[float]) -> None:
        """Write the reply, or apply the fault to the connection."""
        if fault == "reset":
            connection.reset()
        elif fault == "cut_body":
            connection.write(reply.head(len(reply.body) + 100) + reply.body[: len(reply.body) // 2])
            await asyncio.sleep(0.005)  # a reset discards data that the client has not read
            connection.reset() if drawn[1] < 0.5 else connection.transport.close()
        elif fault == "silent":
            await asyncio.get_running_loop().create_future()
        elif fault == "dribble":
            connection.write(reply.head(-1))
            while True:
                connection.write(b"1\r\n \r\n")
                await connection.flush()
                await asyncio.sleep(0.05)
        elif fault == "flood":
            connection.write(reply.head(-1) + b'8\r\n{"id": "\r\n')
            garbage = b"10000\r\n" + b"x" * 65536 + b"\r\n"
            for _ in range(self.options.flood * 16):
                connection.write(garbage)
                await connection.flush()
                await asyncio.sleep(0)  # lets other tasks run, and shows if the client has disconnected
            connection.reset()
        else:
            await connection.send(reply)

    # -- replies

    def logprobs(self, ask: Ask, tokens: Sequence[str], proper: bool) -> dict[str, Any]:
        """``logprobs`` of a choice: `distribution` at a correct verdict; elsewhere the token is nearly certain."""
        top = ask.top or 0
        entries = []
        for token in tokens:
            if proper and self.options.logprobs == "split" and token.isdigit():
                others = [str((int(token) + step) % 10) for step in (1, 9, 2)]
                found = [(token, 0.7), *zip(others, (0.15, 0.1, 0.04), strict=True)]
            elif proper and (token.isdigit() or token in ("A", "B", "TIE")):
                found = distribution(ask.content)
            else:
                found = [(token, 0.9999)]
            shown = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in found]
            entries.append(shown[0] | {"top_logprobs": shown[:top]})
        return {"content": entries, "refusal": None}

    def completion(
        self, ask: Ask, content: str | None, finish: str = "stop", refusal: str | None = None,
        tokens: Sequence[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A chat completion in OpenAI's format; an incorrect answer comes without ``tokens``."""
        said = _PIECES.findall(content or refusal or "") if tokens is None else tokens
        logprobs = self.logprobs(ask, said, tokens is not None) if content and ask.top is not None else None
        spent = len(said)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal, "annotations": []}
        return {
            "id": f"chatcmpl-{self.count['attempts']}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": ask.model,
            "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}],
            "usage": {
                "prompt_tokens": ask.prompt_tokens,
                "completion_tokens": spent,
                "total_tokens": ask.prompt_tokens + spent,
            },
            "service_tier": "default",
            "system_fingerprint": "fp_test",
        }

    def reply(self, ask: Ask, fault: str, drawn: Sequence[float]) -> Reply:
        """The reply that is sent, or would be sent without the fault."""
        if fault[0].isdigit() or fault == "quota":
            return self.refusal_for_now(fault, drawn)
        if fault == "error_200":
            return as_json(200, _ERRORS[int(drawn[1] * len(_ERRORS))])
        if fault == "html":
            return Reply(200, PAGE, type="text/html")
        if fault == "not_completion":
            found: tuple[object, ...] = (
                {"ok": True},
                {"error": None},
                [],
                "busy",
                None,
                {"object": "list", "data": []},
            )
            return as_json(200, found[int(drawn[1] * len(found))])
        cut = fault == "limit"
        tokens = ask.tokens[: ask.limit]
        body = self.completion(ask, "".join(tokens), "length" if cut else "stop", tokens=tokens)
        if fault == "truncated":
            whole = json.dumps(body).encode()
            return Reply(200, whole[: int(len(whole) * (0.2 + 0.7 * drawn[1]))])
        if fault == "empty_choices":
            body["choices"] = []
        elif fault == "null_content":
            body = self.completion(ask, None, refusal="I'm sorry, I can't help with that.")
        elif fault == "content_filter":
            body = self.completion(ask, "", "content_filter")
        elif fault == "length":
            before = 3 if ask.field else 0
            part = "".join(ask.tokens[:before]) + ask.tokens[before][:1]  # "8" of "83" could be taken for a score
            body = self.completion(ask, part, "length")
        elif fault == "thought":
            body = self.completion(ask, None if drawn[2] < 0.5 else f"<think>It is worth {drawn[1]:.2f}, so 85")
            if drawn[2] < 0.5:
                body["choices"][0]["message"]["reasoning_content"] = "I would say 85"
        elif fault in ("refusal", "two_numbers", "out_of_range", "fraction", "denial"):
            texts = _IMPROPER[fault, ask.compares]
            text = texts[int(drawn[1] * len(texts))]
            if ask.field and fault in ("out_of_range", "fraction"):
                text = json.dumps({ask.field: _IMPROPER_VALUES[fault, ask.compares]})
            body = self.completion(ask, text)
        elif fault in ("ok", "slow") and self.options.forms == "mixed" and ask.top is None:
            reshape(body, drawn[1])
        return as_json(200, body)

    def refusal_for_now(self, fault: str, drawn: Sequence[float]) -> Reply:
        """Errors with an error status."""
        wait = round(self.options.retry_after * (0.5 + drawn[1]), 3)
        name, _, form = fault.partition("_")
        if fault == "quota":
            text = "You exceeded your current quota, please check your plan and billing details."
            return as_json(429, error(text, "insufficient_quota", code="insufficient_quota"))
        if name == "429":
            headers = ""
            if form == "seconds":
                headers = f"retry-after: {wait}\r\n"
            elif form == "ms":
                headers = f"retry-after-ms: {round(wait * 1000)}\r\n"
            elif form == "date":
                until = math.ceil(time.time() + self.options.latency + wait)
                headers, wait = f"retry-after: {formatdate(until, usegmt=True)}\r\n", until - time.time()
                wait -= self.options.latency * (0.5 + drawn[3])  # counted from the time of sending
            text = "Rate limit reached for requests per min (RPM). Please try again later."
            return as_json(429, error(text, "requests", code="rate_limit_exceeded"), headers, wait if form else 0.0)
        if name == "402":
            return as_json(402, {"error": {"message": "Insufficient Balance", "code": 402}})
        if name == "403":
            return as_json(403, {"detail": "This prompt was flagged by our moderation."})
        if name == "502":
            return Reply(502, PAGE, type="text/html")
        if name == "503" and drawn[2] < 0.5:
            text = "The server is overloaded."
            return as_json(503, error(text, "server_error"), f"retry-after: {wait}\r\n", wait)
        return as_json(int(name), error("The server had an error while processing your request.", "server_error"))

    # -- everything else

    async def handle(self, connection: "Connection", request: Request) -> None:
        """Answer any other request."""
        route = request.path.rstrip("/")
        if route in ("/stats", "/settings") or route.startswith("/questions/"):
            return await connection.send(self.about(request, route))
        key = self.options.key
        if key and request.headers.get("authorization") != f"Bearer {key}":
            self.count["unauthorised"] += 1
            text = "Incorrect API key provided. You can find your API key on your account's page."
            return await connection.send(as_json(401, error(text, "invalid_request_error", code="invalid_api_key")))
        if (request.method, route) == ("POST", "/v1/chat/completions"):
            return await self.chat(connection, request)
        if (request.method, route) == ("GET", "/v1/models"):
            models = [{"id": self.options.model, "object": "model", "created": 0, "owned_by": "test"}]
            return await connection.send(as_json(200, {"object": "list", "data": models}))
        lost = False
        if self.options.api_faults and route.startswith(("/v1/files", "/v1/batches")):
            self.api_calls += 1
            drawn = uniform(self.options.seed, "api", self.api_calls)
            lost = drawn < self.options.api_faults / 2  # done, but the reply is lost
            if not lost and drawn < self.options.api_faults:
                self.faults["api_503"] += 1
                return await connection.send(as_json(503, error("The server is overloaded.", "server_error")))
        try:
            reply = self.batch_api(request, route.removeprefix("/v1").split("/")[1:])
        except Refused as refused:
            reply = as_json(refused.status, refused.body)
        if lost:
            self.faults["api_lost"] += 1
            return connection.reset()
        await connection.send(reply)

    def about(self, request: Request, route: str) -> Reply:
        """Requests of tests about the server."""
        if route.startswith("/questions/"):
            all_ = [k for (_, _, key), k in self.known.items() if key == route.rpartition("/")[2]]
            return as_json(200, {name: sum(getattr(k, name) for k in all_) for name in ("attempts", "ok", "delivered")})
        if route == "/settings":
            vars(self.options).update(request.json())
            self.settle()
            return as_json(200, vars(self.options))
        if self.log:
            self.log.flush()
        now = time.monotonic()
        names = ("attempts", "ok", "delivered", "answered", "paid_twice", "hopeless", "cut", "early", "refused",
                 "unauthorised", "max_concurrent", "max_connections", "tokens_in", "tokens_out", "batches",
                 "batch_ok", "batch_failed", "bugs")  # fmt: skip
        return as_json(200, {name: self.count[name] for name in names} | {
            "questions": len(self.known),
            "faults": dict(self.faults),
            "statuses": {str(status): n for status, n in self.statuses.items()},
            "concurrent": len(self.running),
            "connections": len(self.connections) - 1,  # without the connection of this request
            "max_requests_minute": self.minute.max_requests,
            "max_tokens_minute": self.minute.max_tokens,
            "max_requests_second": self.second.max_requests,
            "max_tokens_second": self.second.max_tokens,
            "busy": self.busy + sum(now - start for start in self.running.values()),
            "wall": (now if self.running else self.last) - self.first,
            "uptime": now - self.started,
            "cpu": time.process_time(),
            "max_rss_mb": most_memory(),
        })  # fmt: skip

    def write_log(
        self, key: str, attempt: int, fault: str, status: int, seconds: float, cut: bool, model: str = ""
    ) -> None:
        """Log a line for an attempt that has ended."""
        if self.log:
            line = {"time": round(time.time(), 4), "question": key, "attempt": attempt, "fault": fault,
                    "status": status, "seconds": round(seconds, 4), "cut": cut, "model": model}  # fmt: skip
            self.log.write(json.dumps(line).encode() + b"\n")

    # -- batches

    def batch_api(self, request: Request, route: list[str]) -> Reply:
        """Files and batches, which exist as long as the server."""
        match request.method, route:
            case "POST", ["files"]:
                fields = multipart(request)
                if "file" not in fields or "purpose" not in fields:
                    raise Refused(400, "Missing required parameter: 'file' or 'purpose'.", "file")
                name, content = fields["file"]
                return as_json(200, self.keep(content, name, fields["purpose"][1].decode()))
            case "GET", ["files", name]:
                return as_json(200, self.file(name))
            case "GET", ["files", name, "content"]:
                self.file(name)
                return Reply(200, (self.folder / name).read_bytes(), type="application/octet-stream")
            case "DELETE", ["files", name]:
                del self.files[self.file(name)["id"]]
                return as_json(200, {"id": name, "object": "file", "deleted": True})
            case "POST", ["batches"]:
                return as_json(200, self.start_batch(request.json()))
            case "GET", ["batches"]:
                names = list(reversed(self.batches))  # the newest first
                after = request.query.get("after")
                if after is not None:
                    names = names[names.index(self.batch(after).shape["id"]) + 1 :]
                shown = names[: int(request.query.get("limit", 20))]
                ends = {"first_id": shown[0], "last_id": shown[-1]} if shown else {"first_id": None, "last_id": None}
                data = [self.batches[name].shape for name in shown]
                return as_json(200, {"object": "list", "data": data, "has_more": len(shown) < len(names)} | ends)
            case "GET", ["batches", name]:
                return as_json(200, self.batch(name).shape)
            case "POST", ["batches", name, "cancel"]:
                batch = self.batch(name)
                if batch.shape["status"] not in ("validating", "in_progress", "cancelling"):
                    text = f"Cannot cancel a batch with status '{batch.shape['status']}'."
                    raise Refused(409, text, code="invalid_batch_status")
                batch.cancelled = True
                batch.shape |= {"status": "cancelling", "cancelling_at": int(time.time())}
                return as_json(200, batch.shape)
        raise Refused(404, f"Invalid URL ({request.method} {request.path})")

    def keep(self, content: bytes, name: str, purpose: str) -> dict[str, Any]:
        """A new file. Contents are on disk: batches are large."""
        made: dict[str, Any] = {"id": f"file-{next(self.numbers):06d}", "object": "file", "bytes": len(content)}
        made |= {"created_at": int(time.time()), "filename": name, "purpose": purpose, "status": "processed"}
        (self.folder / made["id"]).write_bytes(content)
        self.files[made["id"]] = made
        return made

    def file(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            raise Refused(404, f"No such File object: {name}", "id")
        return self.files[name]

    def batch(self, name: str) -> Batch:
        if name not in self.batches:
            raise Refused(404, f"No batch found with id '{name}'.")
        return self.batches[name]

    def start_batch(self, body: Mapping[str, Any]) -> dict[str, Any]:
        for name in ("input_file_id", "endpoint", "completion_window"):
            if not body.get(name):
                raise Refused(400, f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
        self.file(body["input_file_id"])
        now = int(time.time())
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        shape: dict[str, Any] = {"id": f"batch_{len(self.batches):06d}", "object": "batch", "status": "validating"}
        shape |= {name: body[name] for name in ("input_file_id", "endpoint", "completion_window")}
        shape |= {"created_at": now, "expires_at": now + 86400} | {f"{name}_at": None for name in times}
        shape |= {"errors": None, "output_file_id": None, "error_file_id": None, "metadata": body.get("metadata")}
        shape |= {"request_counts": {"total": 0, "completed": 0, "failed": 0}}
        batch = self.batches[shape["id"]] = Batch(shape)
        batch.task = asyncio.get_running_loop().create_task(self.run_batch(batch))
        self.count["batches"] += 1
        return shape

    async def run_batch(self, batch: Batch) -> None:
        """A batch's life: a tenth validating, eight tenths in progress, a tenth finalizing."""
        shape, seconds = batch.shape, self.options.batch_seconds

        def enter(status: str) -> None:
            shape.update({"status": status, f"{status}_at": int(time.time())})

        problems = self.validate(batch)
        await asyncio.sleep(seconds / 10)
        if self.options.batch_fate == "failed":
            problems = [("token_limit_exceeded", "Enqueued token limit reached for this organization.", None)]
        if problems:
            data = [{"code": c, "message": m, "line": n, "param": None} for c, m, n in problems]
            shape["errors"] = {"object": "list", "data": data}
            enter("failed")
            return
        counts = shape["request_counts"]
        counts["total"] = len(batch.lines)
        if not batch.cancelled:
            enter("in_progress")
        output: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        # The API guarantees no order, so the lines are shuffled.
        order = sorted(range(len(batch.lines)), key=lambda i: uniform(self.options.seed, shape["id"], i))
        reach = len(order) // 2 if self.options.batch_fate == "expired" else len(order)
        for place, index in enumerate(order[:reach]):
            if place % max(len(order) // 20, 1) == 0:
                await asyncio.sleep(seconds * 0.8 / 20)
            if batch.cancelled:
                reach = place
                break
            line = self.run_line(batch.lines[index], f"{shape['id']}_{index}")
            failed = line["response"]["status_code"] != 200
            counts["failed" if failed else "completed"] += 1
            self.count["batch_failed" if failed else "batch_ok"] += 1
            (errors if failed else output).append(line)
        code = "batch_cancelled" if batch.cancelled else "batch_expired"
        for index in order[reach:]:
            problem = {"code": code, "message": "This request was not executed."}
            errors.append({"id": f"batch_req_{shape['id']}_{index}", "custom_id": batch.lines[index]["custom_id"],
                           "response": None, "error": problem})  # fmt: skip
            counts["failed"] += 1
        if not batch.cancelled:
            enter("finalizing")
        await asyncio.sleep(seconds / 10)
        for kind, lines in (("output", output), ("error", errors)):
            if lines:
                content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                shape[f"{kind}_file_id"] = self.keep(content, f"{shape['id']}_{kind}.jsonl", "batch_output")["id"]
        batch.lines = []
        fate = "expired" if self.options.batch_fate == "expired" else "completed"
        enter("cancelled" if batch.cancelled else fate)

    def validate(self, batch: Batch) -> list[tuple[str, str, int | None]]:
        """Read a batch's lines; return the problems, as code, message and line."""
        problems: list[tuple[str, str, int | None]] = []
        seen: set[str] = set()
        content = (self.folder / batch.shape["input_file_id"]).read_bytes()
        for number, text in enumerate(content.splitlines(), start=1):
            try:
                line = json.loads(text)
                name = line["custom_id"]
                wrong = line["method"] != "POST" or line["url"] != batch.shape["endpoint"]
                line["body"]["messages"]
            except (ValueError, KeyError, TypeError):
                problems.append(("invalid_json_line", "This line is not parseable as a request.", number))
                continue
            if wrong:
                problems.append(("invalid_url", "method or url is not the batch's.", number))
            if name in seen:
                problems.append(("duplicate_custom_id", f"The custom_id '{name}' is used twice.", number))
            seen.add(name)
            batch.lines.append(line)
        return problems or ([] if batch.lines else [("empty_file", "The input file is empty.", None)])

    def run_line(self, line: Mapping[str, Any], name: str) -> dict[str, Any]:
        """One line of a batch. Faults below HTTP become a 500 here, and slow ones only take longer."""
        try:
            ask = self.ask(line["body"])
        except Refused as refused:
            status, body = refused.status, refused.body
        else:
            known = self.know(ask)
            known.attempts += 1
            self.count["attempts"] += 1
            fault, drawn = self.fault(ask, known.attempts)
            self.faults[fault] += 1
            if fault in (*HANGING, "reset", "cut_body", "truncated", "not_completion", "html", "502"):
                fault = "500"
            reply = self.reply(ask, fault, drawn)
            status, body = reply.status, json.loads(reply.body)
            self.write_log(ask.key, known.attempts, fault, status, 0.0, False, ask.model)
            if fault in ("ok", "slow"):
                known.ok += 1
                self.count["ok"] += 1
                self.deliver(known, ask)
        response = {"status_code": status, "request_id": f"req_{name}", "body": body}
        return {"id": f"batch_req_{name}", "custom_id": line["custom_id"], "response": response, "error": None}


# Replies without a verdict, by fault and for scores or comparisons; then the same as JSON values.
_IMPROPER: dict[tuple[str, bool], list[str]] = {
    ("refusal", False): ["I'm sorry, I can't rate this.", "As a language model I have no opinions."],
    ("refusal", True): ["I'm sorry, I can't compare these.", "As a language model I have no opinions."],
    ("two_numbers", False): ["Between 60 and 70", "60-70", "Relevance: 80, clarity: 70", "80 90"],
    ("two_numbers", True): ["A or B", "A and B are alike", "A\nB", "Not A but B"],
    ("out_of_range", False): ["Score: 140", "-5", "101", "Score: -5", "1000"],
    ("out_of_range", True): ["C", "Answer C", "1", "AB"],
    ("fraction", False): ["17/20", "7.5", "7,5", "Score: 8/10"],
    ("fraction", True): ["A/B", "A, slightly", "60% A", "0.6"],
    ("denial", False): ["I'd not give it 85", "85 would be too much", "The score is not 85.", "It breaks rule 7"],
    ("denial", True): ["Answer A is not better", "I would not say A", "A is what most would say, wrongly", "Why A?"],
}
_ERRORS: list[object] = [
    {"error": {"message": "Rate limit exceeded", "code": 429}},
    {"error": {"message": "The model is overloaded.", "status": "UNAVAILABLE"}},
    [{"error": {"message": "The service is unavailable.", "code": 503}}],
    {"error": "no worker is free", "error_type": "overloaded"},
    {"error": "something went wrong"},
]


def reshape(body: dict[str, Any], drawn: float) -> None:
    """Give a correct answer one of the forms that endpoints use."""
    choice, forms = body["choices"][0], 12
    message, plain = choice["message"], choice["message"]["content"]
    form = int(drawn * forms)
    compares = plain in ("A", "B", "TIE")
    if plain.startswith("{"):
        message["content"] = plain[:-1] + ', "reason": "It says so, twice."}' if form < 8 else f"```json\n{plain}\n```"
    elif form == 0:
        message["content"] = f"<think>\nFirst I thought 17, then A or B.\n</think>\n\n{plain}"
    elif form == 1:
        message["content"] = f"Perhaps 17?</think>{plain}"
    elif form == 2:
        message["reasoning_content"] = "First I thought 17, then A or B."
    elif form == 3:
        thought = {"type": "thinking", "thinking": [{"type": "text", "text": "17?"}]}
        message["content"] = [thought, {"type": "text", "text": plain}]
    elif form == 4:
        message["content"] = json.dumps(
            {"better" if compares else "score": plain if compares else int(plain), "why": "so"}
        )
    elif form == 5:
        message["content"] = f"The better answer is {plain}." if compares else f"The grade of the answer is {plain}."
    elif form == 6:
        message["content"] = f"Verdict: [[{plain}]]" if compares else f"Rating: [[{plain}]]"
    elif form == 7 and not compares:
        message["content"] = f"{plain}/100"
    elif form == 8 and plain not in ("A", "B", "TIE", "1"):
        message["content"] = f"{plain}.0"
    elif form == 9:
        message["content"] = f"**{plain}**"
    choice["finish_reason"] = ("stop", "eos", "eos_token", "end_turn", "STOP", None)[int(drawn * forms * 6) % 6]


_IMPROPER_VALUES: dict[tuple[str, bool], object] = {
    ("out_of_range", False): 140, ("out_of_range", True): "C", ("fraction", False): 7.5, ("fraction", True): 0.6,
}  # fmt: skip


def most_memory() -> float | None:
    """The peak memory of this process in megabytes. (getrusage would include its parent.)"""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def multipart(request: Request) -> dict[str, tuple[str, bytes]]:
    """The fields of a form, each with its file name ("" for none) and its content."""
    found = re.search(r"boundary=\"?([^\";]+)", request.headers.get("content-type", ""))
    if found is None:
        raise Refused(400, "This is no multipart/form-data.")
    fields = {}
    for part in request.body.split(b"--" + found.group(1).encode())[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        names = dict(re.findall(r"; (\w+)=\"([^\"]*)\"", head.decode()))
        fields[names.get("name", "")] = (names.get("filename", ""), content.removesuffix(b"\r\n"))
    return fields


def parse_faults(given: str | Mapping[str, float]) -> dict[str, float]:
    """Rates by fault: from ``mix``, ``none``, or JSON such as ``{"reset": 0.1}``.

    ``{"mix": 0.1}`` is the whole table, with rates that sum to 0.1; single faults next to it replace the table's.
    """
    if given in ("none", ""):
        return {}
    wanted = {"mix": sum(MIX.values())} if given == "mix" else json.loads(given) if isinstance(given, str) else given
    wanted = dict(wanted)
    scale = wanted.pop("mix", 0.0) / sum(MIX.values())
    rates = {name: rate * scale for name, rate in MIX.items() if scale} | wanted
    if unknown := set(rates) - {*MIX, *NEVER}:
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}")
    if sum(rates.values()) > 1 + 1e-9:
        raise ValueError(f"rates of faults add up to {sum(rates.values()):g}, more than 1")
    return rates


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """A client's connection: one request at a time, kept alive between requests.

    When the client disconnects, the task that serves its request is cancelled, so concurrency counts only waiting
    clients.
    """

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = bytearray()
        self.head: Request | None = None
        self.length = 0
        self.task: asyncio.Task[None] | None = None
        self.paused = False
        self.resumed: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # so that flushed means that the kernel has all data
        self.server.connections.add(self)
        most = self.server.count["max_connections"]
        self.server.count["max_connections"] = max(most, len(self.server.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.task is None:
            self.next()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.resumed is not None and not self.resumed.done():
            self.resumed.set_result(None)

    def next(self) -> None:
        """Begin with the next request, if it has arrived completely."""
        if self.head is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self.buffer) > 65536:
                    self.transport.close()
                return
            lines = self.buffer[:end].decode("latin-1").split("\r\n")
            del self.buffer[: end + 4]
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
            method, target, _ = [*lines[0].split(" ", 2), "", ""][:3]
            path, _, query = target.partition("?")
            pairs = dict(part.partition("=")[::2] for part in query.split("&")) if query else {}
            self.head = Request(method, path, pairs, headers, b"")
            self.length = int(headers.get("content-length", 0))
            if "transfer-encoding" in headers:  # our clients send no chunks
                self.write(as_json(411, error("Content-Length is required.", "invalid_request_error")).head(0))
                return self.transport.close()
        if len(self.buffer) >= self.length:
            request, self.head = self.head, None
            request.body = bytes(self.buffer[: self.length])
            del self.buffer[: self.length]
            self.task = asyncio.get_running_loop().create_task(self.serve(request))

    async def serve(self, request: Request) -> None:
        try:
            await self.server.handle(self, request)
        except asyncio.CancelledError:
            pass
        except Exception:  # a bug in this file must not look like a fault
            self.server.count["bugs"] += 1
            traceback.print_exc()
            self.transport.abort()
        finally:
            self.task = None
        if request.headers.get("connection", "").lower() == "close":
            self.transport.close()
        elif not self.transport.is_closing():
            self.next()

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    async def flush(self) -> None:
        """Wait until the kernel has all written data."""
        while self.paused:
            self.resumed = asyncio.get_running_loop().create_future()
            await self.resumed

    async def send(self, reply: Reply) -> None:
        self.write(reply.head() + reply.body)
        if self.paused:
            await self.flush()

    def reset(self) -> None:
        """Close the connection with RST."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="An OpenAI-compatible server that goes wrong on purpose.")
    add = made.add_argument
    add("--port", type=int, default=0)
    add("--faults", default="none", help='mix, none, or rates as JSON: {"reset": 0.1}, {"mix": 0.1, "slow": 0}')
    add("--max-faults", type=int, default=3, help="attempts at one question that may meet a fault")
    add("--hopeless", type=float, default=0.0, help="share of questions that never get a proper answer")
    add("--latency", type=float, default=0.0, help="mean seconds to a reply; it varies from half to three halves")
    add("--slow", type=float, default=8.0, help="times the latency that a slow reply takes")
    add("--retry-after", type=float, default=0.5, help="mean seconds in Retry-After")
    add("--flood", type=int, default=16, help="megabytes of a flood")
    add("--seed", type=int, default=0)
    add("--key", default="", help="what Authorization must carry")
    add("--model", default="judge", help="what /v1/models lists")
    add("--structured", choices=("on", "ignore", "reject"), default="on")
    add(
        "--forms", choices=("plain", "mixed"), default="plain", help="mixed: proper answers in the forms of all servers"
    )
    add("--logprobs", choices=("off", "on", "split"), default="off", help="split: every digit is a token")
    add("--reject", default="", help="request parameters that give a 400, such as temperature,seed")
    add("--batch-seconds", type=float, default=0.2)
    add("--batch-fate", choices=("completed", "expired", "failed"), default="completed")
    add("--api-faults", type=float, default=0.0, help="share of calls about files and batches that go wrong; half of "
        "them are obeyed, and only the reply is lost")  # fmt: skip
    add("--log", default="", help="a file: one JSON line for every attempt that is over")
    add("--tied", action="store_true", help="stop when the standard input ends")
    return made


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process is asked to stop."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    if options.tied:
        loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(0, 1024) else stop.set())
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options, Path(folder))
        listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", options.port, backlog=4096)
        print(json.dumps({"port": listening.sockets[0].getsockname()[1]}), flush=True)
        await stop.wait()
        listening.close()
        tasks = [c.task for c in server.connections if c.task] + [b.task for b in server.batches.values() if b.task]
        for connection in list(server.connections):
            connection.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if server.log:
            server.log.close()


# --- for tests --------------------------------------------------------------------------------------------------------


@dataclass
class Handle:
    """A test's handle of a running server."""

    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def base_url(self) -> str:
        """For ``AsyncOpenAI(base_url=…)``."""
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> dict[str, Any]:
        """Counters; see `Server.about`."""
        found: dict[str, Any] = self._call("/stats")
        return found

    def question(self, content: str) -> dict[str, int]:
        """Attempts, proper answers, and how many of those were delivered, for one question."""
        found: dict[str, int] = self._call(f"/questions/{question(content)}")
        return found

    def requests(self) -> list[dict[str, Any]]:
        """The log: every ended attempt, in the order of the ends."""
        self.stats()  # flushes the log
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]

    def change(self, **options: Any) -> None:
        """Change flags while it runs, named as in `parser`: ``change(faults="none", latency=0)``."""
        if "faults" in options:
            parse_faults(options["faults"])
        self._call("/settings", json.dumps(options).encode())

    def _call(self, path: str, body: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", body, timeout=30) as reply:
            return json.load(reply)


@contextmanager
def judge_server(**options: Any) -> Iterator[Handle]:
    """A server in a separate process, with flags as in `parser`: ``judge_server(faults="mix", max_faults=2)``."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"log": Path(folder) / "log.jsonl"} | options
        if not isinstance(given.get("faults", ""), str):
            given["faults"] = json.dumps(given["faults"])
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        command = [sys.executable, str(Path(__file__).resolve()), "--tied", *flags]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}")
                yield Handle(json.loads(line)["port"], Path(given["log"]), process)
            finally:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()


if __name__ == "__main__":
    chosen = parser().parse_args()
    parse_faults(chosen.faults)
    asyncio.run(serve(chosen))
