"""Read a server's refusal: its text, its kind, and how long to wait.

Servers put the text in many places: ``error.message`` (OpenAI), ``detail`` (FastAPI), a list with an ``error``
(Google), ``error`` as a text (Ollama, TGI), or ``message`` alone. Some refusals come with status 200.
"""

import email.utils
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

_WHERE_TEXT_IS = (
    *("error", "errors", "detail", "message", "Message", "msg", "error_msg", "error_message", "error_description"),
    *("status_msg", "base_resp", "raw"),
)
_MONEY = re.compile(
    r"insufficient[_ ](?:quota|credit|fund|balance)|credit balance|out of credits?|billing|spend(?:ing)? limit"
    r"|(?:no|not enough|requires? more) credits?(?! were)|payment (?:is )?required"
    r"|exceeded your (?:current|monthly) (?:quota|budget|spend)",
    re.IGNORECASE,
)
_FLAGGED = re.compile(r"flagged|moderat|content.?(?:policy|filter|management)|safety|usage polic", re.IGNORECASE)
_PER_DAY = re.compile(r"per.?day|daily", re.IGNORECASE)
_DELAY = re.compile(r"\"(?:retryDelay|retry_after|estimated_time)\":\s*\"?([0-9]+(?:\.[0-9]+)?)s?\"?\s*[,}\]]")
_OVERLOADED = re.compile(r"over.?load|(?:over|at|exceed\w*) (?:\w+ )?capacity|server.?busy", re.IGNORECASE)
_MEANS = {  # in a reply with status 200: the status that a code stands for
    401: ("invalid_api_key", "unauthenticated", "unauthorized", "authentication_error"),
    402: ("payment_required", "insufficient_quota", "insufficient_balance"),
    403: ("permission_denied", "forbidden", "permission_error"),
    404: ("not_found", "model_not_found", "not_found_error"),
    400: ("invalid_argument", "invalid_request_error", "bad_request"),
    429: ("rate_limit_exceeded", "rate_limit_error", "resource_exhausted", "too_many_requests"),
    503: ("unavailable", "overloaded", "overloaded_error", "server_error", "internal", "internal_error", "timeout"),
}
_SAYS = {  # the same for words, if there is no known code; the first match counts
    429: re.compile(r"rate.?limit|too.?many.?(?:\w+.?)?requests|throttl|resource.?exhausted", re.IGNORECASE),
    503: re.compile(
        _OVERLOADED.pattern + r"|unavailable|\bbusy\b|no (?:worker|capacity|instance|available)|capacity|timed? ?-?out|"
        r"(?:try|retry)(?:ing)? (?:again|later|in)|temporar|(?:still|currently|is|being) (?:re)?(?:loading|starting)|"
        r"warming up|cold.?start|queue (?:is )?full|maintenance|internal (?:server )?error|bad gateway|upstream",
        re.IGNORECASE,
    ),
    402: _MONEY,
    401: re.compile(r"(?:invalid|incorrect|missing|expired|no) (?:api.?key|token|credential)|unauthori[sz]ed", re.I),
}


AGAIN = {408, 409, 425, 429}  # and 5xx: the same request may be answered later


@dataclass(frozen=True)
class Refusal:
    """A server's refusal.

    Attributes:
        status: the HTTP status, or the one that the body gives; 0 if there is neither.
        text: the text in the body, on one line; "" if there is none.
        codes: its ``code``, ``type``, ``status`` and ``param``, in which servers name the problem.
        wait: seconds that the server asks to wait.
    """

    status: int
    text: str
    codes: str = ""
    wait: float | None = None

    @property
    def words(self) -> str:
        """The text and all codes."""
        return f"{self.text} {self.codes}"

    @property
    def is_about_money(self) -> bool:
        """Whether the server answers nothing until the account has credit."""
        if self.status == 402 or "insufficient_quota" in self.codes:
            return True
        if self.status not in (400, 403, 429) or _FLAGGED.search(self.words):
            return False
        soon = self.wait is not None and not _PER_DAY.search(self.words)
        return not soon and _MONEY.search(self.words) is not None

    @property
    def passes(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status in AGAIN or self.status >= 500 or self.is_overload

    @property
    def is_overload(self) -> bool:
        """Whether the server is overloaded, under any status: the same question can be answered later."""
        return not _FLAGGED.search(self.words) and _OVERLOADED.search(self.words) is not None


def read_refusal(status: int, headers: Mapping[str, str], body: bytes) -> Refusal:
    """The refusal of a reply whose status is not 200."""
    found = _parse(body)
    delay = _DELAY.search(body.decode("utf-8", "replace"))
    wait = retry_after(headers)
    wait = float(delay.group(1)) if wait is None and delay else wait
    return Refusal(status, "; ".join(dict.fromkeys(_texts(found)))[:2000], " ".join(_codes(found)), wait)


def find_refusal(body: bytes, headers: Mapping[str, str] | None = None) -> Refusal | None:
    """The refusal in a reply whose status is 200; None if it holds none."""
    found = _parse(body)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if isinstance(found, str):  # a page or a line of text is a refusal only if it has the words of one
        refusal = read_refusal(0, headers or {}, found.encode())
        status = _status_of("", refusal.text)
        return replace(refusal, status=status) if status else None
    if not isinstance(found, dict):
        return None
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if choices and not choice.get("error"):
        return None
    content: Any = {"error": choice["error"]} if choice else found
    if not any(content.get(name) for name in _WHERE_TEXT_IS) and content.get("object") != "error":
        return None
    refusal = read_refusal(0, headers or {}, json.dumps(content).encode())
    return replace(refusal, status=_status_of(refusal.codes, refusal.text))


def _status_of(codes: str, text: str) -> int:
    """The status that the codes stand for, or else the words; 0 if none is known."""
    for code in codes.split():
        if re.fullmatch("[45][0-9][0-9]", code):
            return int(code)
    for code in codes.split():
        for status, names in _MEANS.items():
            if code.casefold() in names:
                return status
    words = f"{codes} {text}"
    if _FLAGGED.search(words):
        return 0
    return next((status for status, pattern in _SAYS.items() if pattern.search(words)), 0)


def _parse(body: bytes) -> Any:
    text = body.decode("utf-8", "replace").strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return title.group(1) if title else text[:500]


def _texts(content: Any, depth: int = 0) -> Iterator[str]:
    """The texts in a body, outer ones first."""
    if depth > 6:
        return
    if isinstance(content, str) and content.strip():
        inner = _parse(content.encode()) if content.lstrip().startswith(("{", "[")) else None
        yield from _texts(inner, depth + 1) if isinstance(inner, dict | list) else [" ".join(content.split())]
    elif isinstance(content, list):
        for each in content[:5]:
            yield from _texts(each, depth + 1)
    elif isinstance(content, dict):
        where = content.get("loc")  # FastAPI's name of the part of the request
        lead = f"{'.'.join(map(str, where))}: " if isinstance(where, list) else ""
        for name in _WHERE_TEXT_IS:
            for text in _texts(content.get(name), depth + 1):
                yield lead + text
        yield from _texts(content.get("metadata"), depth + 1)


def _codes(content: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(content, list) and depth < 8:
        for each in content[:5]:
            yield from _codes(each, depth + 1)
    elif isinstance(content, dict) and depth < 8:
        for name in ("code", "status", "status_code", "type", "error_type", "param", "quotaId"):
            if isinstance(content.get(name), str | int) and not isinstance(content[name], bool):
                yield str(content[name])
        for name in ("error", "errors", "detail", "details", "violations", "base_resp"):
            yield from _codes(content.get(name), depth + 1)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, from ``retry-after-ms`` or ``Retry-After`` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        given = headers.get(name)
        seconds: float
        if given is None:
            continue
        try:
            seconds = float(given) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
            except ValueError:
                continue
        if 0 < seconds < float("inf"):  # a time in the past does not say how long to wait
            return seconds
    return None
