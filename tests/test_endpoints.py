"""Real endpoints: what is sent to them, what they answer, and for which endpoints the ledger's answers count."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dnpo import connection
from dnpo.connection import address_of
from dnpo.connection.refusals import find_refusal, read_refusal
from dnpo.errors import JudgeError, SettingsError
from dnpo.judges.asked.ledger import VERSION, Answer, Ledger, Question
from dnpo.judges.asked.openai import OpenAI
from dnpo.records import Verdict
from dnpo.running.gate.judge import canary
from tests.commands import run_command
from tests.conftest import Report
from tests.judging import rows

Said = tuple[int, Any]  # status and body


@dataclass
class Place:
    """A server, with the requests that it has received."""

    base_url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)


@contextmanager
def saying(say: Callable[[dict[str, Any], int], Said]) -> Iterator[Place]:
    """A server that answers each request by ``say``, a function of the request's body and number."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                place.bodies.append(body)
                place.headers.append(dict(self.headers))
                status, content = say(body, len(place.bodies))
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None: ...

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    place = Place(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield place
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(
    content: Any, finish: str | None = "stop", *, top: Mapping[str, Any] | None = None, **message: Any
) -> Said:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 90, "completion_tokens": 3}
    return 200, {"id": "x", "model": "judge", "choices": [choice], "usage": usage, **(top or {})}


def judge_at(base_url: str, **settings: Any) -> OpenAI:
    given = {"model": "judge", "base_url": base_url, "timeout": 5.0, "deadline": 3.0, "max_unscored": 1.0}
    return OpenAI(**(given | settings))


def ask(judge: OpenAI, folder: Path, count: int = 1, report: Report | None = None) -> list[Verdict]:
    with Ledger(folder / "ledger.sqlite", "run") as ledger:
        return judge(*rows(count), ledger, report or Report())


class Notes(Report):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


# --- whose answers they are

NOBODY = "http://127.0.0.1:9/v1"


def test_answers_are_reused_only_at_the_same_address(tmp_path: Path) -> None:
    with saying(lambda body, number: completion("83")) as place:
        assert ask(judge_at(place.base_url), tmp_path)[0].score == 83.0
        elsewhere = ask(judge_at(NOBODY, deadline=1.5), tmp_path)[0]
        assert elsewhere.score is None
        assert "connection failed" in elsewhere.reason
        moved = judge_at(NOBODY, same_as=f"{place.base_url}/")
        assert ask(moved, tmp_path)[0].score == 83.0
        assert moved.identity() == judge_at(place.base_url).identity() != judge_at(NOBODY).identity()
        assert len(place.bodies) == 1


OTHERS: list[dict[str, Any]] = [
    *({"temperature": None}, {"max_tokens": 32}, {"structured": "off"}, {"version": "2"}, {"reasoning_effort": "low"}),
    *({"chat_template_kwargs": {"enable_thinking": False}}, {"extra_body": {"top_k": 1}}, {"pattern": r"(\d+)"}),
    *({"headers": {"X-Deployment": "DEPLOYMENT"}}, {"model": "judge-2"}),
]


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: next(iter(other)))
def test_a_change_in_anything_that_the_server_sees_makes_another_question(
    other: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPLOYMENT", "blue")
    with saying(lambda body, number: completion(str(number))) as place:
        found = [ask(judge_at(place.base_url, **settings), tmp_path)[0].score for settings in ({}, other, {}, other)]
    assert found == [1.0, 2.0, 1.0, 2.0]
    assert judge_at(place.base_url, **other).identity() != judge_at(place.base_url).identity()


def test_a_headers_value_makes_another_question_unless_it_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def setting(name: str, value: str) -> str:
        monkeypatch.setenv("VALUE", value)
        return judge_at(NOBODY, headers={name: "VALUE"}).setting

    assert setting("X-Deployment", "blue") != setting("X-Deployment", "green")
    assert setting("X-Api-Key", "planted-1") == setting("X-Api-Key", "planted-2")
    assert "planted" not in setting("X-Api-Key", "planted-1") + setting("X-Other", "planted-1")


def test_an_address_has_one_spelling() -> None:
    same = {"http://Host:80/v1", "http://host/v1/", "HTTP://host/v1"}
    assert {address_of(url) for url in same} == {"http://host/v1"}
    assert address_of("https://host:8443/v1") == "https://host:8443/v1"
    assert address_of("http://[::1]:8000/v1") == "http://[::1]:8000/v1"


# format 1, written before keys contained addresses
OLD = """
CREATE TABLE calls (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, model TEXT NOT NULL, template TEXT NOT NULL, "order" TEXT NOT NULL,
    content TEXT NOT NULL, value REAL NOT NULL, reply TEXT NOT NULL, tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL, cost REAL, latency REAL NOT NULL, attempts INTEGER NOT NULL, at TEXT NOT NULL,
    run TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE failures (
    key TEXT NOT NULL, judge TEXT NOT NULL, model TEXT NOT NULL, reason TEXT NOT NULL, reply TEXT NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL, at TEXT NOT NULL, run TEXT NOT NULL
);
CREATE INDEX failures_by_run ON failures (run);
CREATE INDEX calls_by_run ON calls (run);
CREATE TABLE hits (
    run TEXT NOT NULL, judge TEXT NOT NULL, model TEXT NOT NULL, month TEXT NOT NULL, hits INTEGER NOT NULL,
    PRIMARY KEY (run, judge, model, month)
) WITHOUT ROWID;
CREATE TABLE claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE batches (
    id TEXT NOT NULL, endpoint TEXT NOT NULL, questions TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (endpoint, id)
) WITHOUT ROWID;
CREATE TABLE pace (endpoint TEXT PRIMARY KEY, requests REAL NOT NULL, tokens REAL NOT NULL) WITHOUT ROWID;
PRAGMA user_version=1;
"""


def test_old_answers_are_used_if_asked_for(tmp_path: Path) -> None:
    (question,) = judge_at(NOBODY).make_questions(*rows(1))[0]
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.executescript(OLD)
        about = (question.judge, question.model)
        db.execute(
            "INSERT INTO calls VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (question.old_key, *about, "t", "", "c", 71.0, "71", 9, 1, 0.5, 0.1, 1, "2026-01-01T00:00:00+00:00", "run"),
        )
        db.execute("INSERT INTO failures VALUES (?,?,?,'r','',1,1,0.25,'2026-01-01','run')", (question.old_key, *about))
    db.close()
    notes = Notes()
    assert ask(judge_at(NOBODY, deadline=0.5), tmp_path, report=notes)[0].score is None
    assert "judge.read_old_ledger=true" in notes.said[0]
    old = judge_at(NOBODY, read_old_ledger=True)
    assert ask(old, tmp_path)[0].score == 71.0
    assert old.identity() != judge_at(NOBODY).identity()
    with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        assert ledger.sum_costs() == 0.75
        assert old.forecast(*rows(1), ledger, set()).new == 0
        assert ledger._db.execute("PRAGMA user_version").fetchone() == (VERSION,)


@pytest.mark.parametrize("change", [{"model": "judge-2026"}, {"system_fingerprint": "fp_2"}])
def test_a_server_that_reports_another_model_is_noticed(change: dict[str, str], tmp_path: Path) -> None:
    before = {"model": "judge-2025", "system_fingerprint": "fp_1"}
    top = dict(before)
    with saying(lambda body, number: completion("83", top=top)) as place:
        judge, notes = judge_at(place.base_url), Notes()
        ask(judge, tmp_path, 5, notes)
        with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
            assert canary(judge, ledger).level == "pass"
        assert not notes.said
        top |= change
        ask(judge, tmp_path, 9, notes)
        (said,) = notes.said
        for word in (*before.values(), *change.values(), "judge.version"):
            assert word in said
        top["model"] = "judge-2027"
        with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
            finding = canary(judge, ledger)
        assert (finding.level, "judge-2027" in finding.text) == ("warn", True)
        shown = run_command(tmp_path, "dnpo.ledger").stdout
        for word in (place.base_url, *before.values(), *change.values(), "judge-2027"):
            assert word in shown
        assert "judge.version" in finding.setting


def test_the_check_names_other_addresses_of_the_same_judge(tmp_path: Path) -> None:
    with saying(lambda body, number: completion("83")) as one, saying(lambda body, number: completion("83")) as two:
        ask(judge_at(one.base_url), tmp_path)
        with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
            assert "answers from" not in canary(judge_at(two.base_url, same_as=one.base_url), ledger).text
            assert "answers from" not in canary(judge_at(two.base_url, version="2"), ledger).text
            assert f"answers from {one.base_url}" in canary(judge_at(two.base_url), ledger).text


# --- what is sent


def test_required_headers_are_sent_and_their_values_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "planted-5e1f")
    settings: dict[str, Any] = {
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
        "extra_body": {"top_k": 1, "response_format": {"type": "json_object"}},
        "headers": {"X-Key": "MY_KEY"},
        "structured": "off",
    }
    with saying(lambda body, number: (500, {"detail": "planted-5e1f"}) if number == 1 else completion("83")) as place:
        assert ask(judge_at(place.base_url, **settings), tmp_path)[0].score == 83.0
        body, headers = place.bodies[-1], place.headers[-1]
    assert body["reasoning_effort"] == "low"
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert (body["top_k"], body["response_format"]) == (1, {"type": "json_object"})
    assert {name.lower(): value for name, value in headers.items()}["x-key"] == "planted-5e1f"
    assert b"planted" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"extra_body": {"temperature": 1}}, "extra_body.temperature: .*judge.temperature"),
        ({"extra_body": {"stream": True}}, "extra_body.stream"),
        ({"extra_body": {"messages": []}}, "extra_body.messages"),
        ({"extra_body": {"response_format": {}}}, "extra_body.response_format: .*judge.structured=off"),
        ({"pattern": "(8"}, "pattern=.*not a regular expression"),
        ({"pattern": "score"}, "pattern=score: has 0 groups; expected one"),
        ({"pattern": "(a)(b)"}, "has 2 groups"),
        ({"pattern": "(a)", "reading": "logprobs"}, "pattern: .*reading=logprobs"),
        ({"base_url": "http://host:port/v1"}, "base_url=http://host:port/v1: expected an address"),
        ({"same_as": "https://me:planted@host/v1"}, "same_as: has a user name, password"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        OpenAI(**({"model": "judge"} | settings))
    assert "planted" not in str(caught.value)


def test_a_header_needs_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    judge = judge_at(NOBODY, headers={"X-Key": "MY_KEY"})
    assert "judge.headers.X-Key" in str(judge.accepts([]))
    monkeypatch.setenv("MY_KEY", "Bearer abc")
    assert judge.accepts([]) is None


# --- what is read

FORMS: dict[str, Said] = {
    **{finish: completion("85", finish) for finish in ("eos", "eos_token", "end_turn", "STOP", "COMPLETE")},
    "no finish_reason": completion("85", None),
    **{f"finish_reason {finish}": completion("85", finish) for finish in ("unknown", "100257", "<|eot_id|>", "done")},
    "thought": completion("<think>17?</think>85"),
    "thought beside": completion("85", reasoning_content="17?"),
    "parts": completion([{"type": "text", "text": "85"}]),
    "parts with a thought": completion([{"type": "thinking", "thinking": "17?"}, {"type": "text", "text": "85"}]),
    "extra key": completion('{"score": 85, "reason": "so"}'),
    **{
        text: completion(text)
        for text in ("85.0", "85/100", "**85**", "Rating: [[85]]", "The grade of the answer is 85.")
    },
}
UNREADABLE: dict[str, tuple[Said, str]] = {
    "denial": (completion("I'd not give it 85"), "judge.pattern"),
    "cut": (completion("8", "length"), "judge.max_tokens"),
    "MAX_TOKENS": (completion("8", "MAX_TOKENS"), "judge.max_tokens"),
    "only a thought": (completion(None, reasoning_content="I say 85"), "judge.chat_template_kwargs"),
    "open thought": (completion("<think>85"), "judge.max_tokens"),
    "two parts": (completion([{"type": "text", "text": "8"}, {"type": "text", "text": "5"}]), "judge.pattern"),
    "a tool": (completion([{"type": "tool_use", "text": "85"}]), "judge"),
    "safety": (completion("85", "SAFETY"), "judge"),
    "temperature": ((400, {"error": {"message": "'temperature' does not support 0"}}), "judge.temperature=null"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_real_endpoints_are_read_at_once(form: str, tmp_path: Path) -> None:
    with saying(lambda body, number: FORMS[form]) as place:
        assert ask(judge_at(place.base_url), tmp_path)[0].score == 85.0
        assert len(place.bodies) == 1


@pytest.mark.parametrize("form", UNREADABLE)
def test_other_forms_are_not_scores_and_the_check_shows_them_and_a_remedy(form: str, tmp_path: Path) -> None:
    said, mends = UNREADABLE[form]
    with saying(lambda body, number: said) as place, Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        finding = canary(judge_at(place.base_url, max_replies=1), ledger)
    assert finding.level == "stop"
    assert mends in finding.setting
    text = said[1]["choices"][0]["message"]["content"] if said[0] == 200 else None
    if isinstance(text, str):
        assert repr(text) in finding.text


def test_a_pattern_reads_unusual_forms(tmp_path: Path) -> None:
    replies = [
        "Final: 85. It breaks rule 7.",
        "Final: 85, no, Final: 60",
        "none",
        "<think>Final: 20</think>Final: 30",
        "40",
    ]
    with saying(lambda body, number: completion(replies[number - 1])) as place:
        judge = judge_at(place.base_url, pattern=r"Final: (\d+)", max_replies=1, concurrency=1)
        verdicts = ask(judge, tmp_path, 5)
    assert [v.score for v in verdicts] == [85.0, None, None, 30.0, 40.0]
    assert "different values" in verdicts[1].reason


REFUSED = {
    "OpenAI": (400, {"error": {"message": "Unsupported parameter: 'response_format'", "param": "response_format"}}),
    "FastAPI": (422, {"detail": [{"loc": ["body", "response_format"], "msg": "Extra inputs are not permitted"}]}),
    "words": (400, {"message": "This model does not support structured outputs."}),
    "Google": (400, [{"error": {"code": 400, "message": 'Unknown name "json_schema"', "status": "INVALID_ARGUMENT"}}]),
    "another type": (400, {"error": {"message": "Input should be 'text' or 'json_object'"}}),
    "no mode": (400, {"error": {"message": "json mode is not available for this model"}}),
    "OpenRouter": (404, {"error": {"message": "No endpoints found that support structured_outputs", "code": 404}}),
    "behind": (
        400,
        {"error": {"message": "Provider returned error", "metadata": {"raw": '{"detail": "no guided_json"}'}}},
    ),
}


@pytest.mark.parametrize("server", REFUSED)
def test_a_server_without_schemas_is_asked_without_one_and_this_is_reported(server: str, tmp_path: Path) -> None:
    with saying(lambda body, _: REFUSED[server] if "response_format" in body else completion("85")) as place:
        judge, notes = judge_at(place.base_url, concurrency=1), Notes()
        assert [v.score for v in ask(judge, tmp_path, 3, notes)] == [85.0] * 3
        assert len(place.bodies) == 4
        assert any("without a JSON schema" in said for said in notes.said)


# --- refusals

TEXTS: dict[str, tuple[int, Any, str]] = {
    "OpenAI": (400, {"error": {"message": "the text", "code": None}}, "the text"),
    "FastAPI": (400, {"detail": "the text"}, "the text"),
    "FastAPI list": (422, {"detail": [{"loc": ["body", "n"], "msg": "the text"}]}, "body.n: the text"),
    "Google": (400, [{"error": {"code": 400, "message": "the text", "status": "X"}}], "the text"),
    "Ollama": (400, {"error": "the text"}, "the text"),
    "old vLLM": (400, {"object": "error", "message": "the text"}, "the text"),
    "Cloudflare": (400, {"success": False, "errors": [{"code": 7003, "message": "the text"}]}, "the text"),
    "a page": (400, b"<html><head><title>the text</title></head>", "the text"),
    "plain": (400, b"the text", "the text"),
}


@pytest.mark.parametrize("server", TEXTS)
def test_the_text_of_a_refusal_comes_from_its_body(server: str, tmp_path: Path) -> None:
    status, body, text = TEXTS[server]
    with saying(lambda *_: (status, body)) as place:
        assert ask(judge_at(place.base_url), tmp_path)[0].reason == f"HTTP {status}: {text}"


QUOTA = {
    "402": (402, {"error": {"message": "Insufficient Balance"}}),
    "402 alone": (402, b""),
    "OpenAI": (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}),
    "FastAPI": (429, {"detail": "You exceeded your current quota, please check your plan and billing details."}),
    "Google": (
        429,
        [{"error": {"code": 429, "message": "You exceeded your current quota.", "status": "RESOURCE_EXHAUSTED"}}],
    ),
    "Anthropic": (400, {"error": {"type": "invalid_request_error", "message": "Your credit balance is too low."}}),
    "in a reply": (200, {"error": {"message": "Insufficient credits", "code": 402}}),
}


@pytest.mark.parametrize("server", QUOTA)
def test_an_empty_account_ends_the_run_even_after_answers(server: str, tmp_path: Path) -> None:
    with saying(lambda _, number: completion("85") if number < 4 else QUOTA[server]) as place:
        with pytest.raises(JudgeError, match="no credit left"):
            ask(judge_at(place.base_url, concurrency=1), tmp_path, 50)
        assert len(place.bodies) == 4


def test_a_quota_per_minute_is_waited_for_and_one_per_day_is_not() -> None:
    def google(what: str) -> bytes:
        violation = {"violations": [{"quotaId": f"GenerateRequests{what}PerProject"}]}
        details = [violation, {"retryDelay": "34s"}]
        message = "You exceeded your current quota, please check your plan and billing details."
        return json.dumps([{"error": {"code": 429, "message": message, "details": details}}]).encode()

    minute, day = (read_refusal(429, {}, google(what)) for what in ("PerMinute", "PerDay"))
    assert (minute.is_about_money, minute.wait) == (False, 34.0)
    assert day.is_about_money


FLAGGED = [
    (403, {"detail": "flagged by moderation"}),
    (403, {"error": {"message": "Your input was flagged. No credits were charged.", "code": 403}}),
    (200, {"error": {"message": "PERMISSION_DENIED", "code": 403}}),
    (404, {"error": {"message": "no provider takes this prompt"}}),
]


@pytest.mark.parametrize("flagged", FLAGGED, ids=str)
def test_a_flagged_question_fails_alone(flagged: Said, tmp_path: Path) -> None:
    def say(body: dict[str, Any], number: int) -> Said:
        return flagged if "Question 7?" in str(body["messages"]) else completion("85")

    with saying(say) as place:
        for _ in range(2):  # a rerun asks for this one alone, and continues too
            verdicts = ask(judge_at(place.base_url, concurrency=4), tmp_path, 20)
            assert [v.score for v in verdicts] == [None if v.id == "7" else 85.0 for v in verdicts]
        assert f"HTTP {403 if flagged[0] == 200 else flagged[0]}" in verdicts[7].reason
        assert len(place.bodies) == 21


def test_a_rejected_key_ends_the_run_after_a_few_questions(tmp_path: Path) -> None:
    with saying(lambda *_: (403, {"detail": "Forbidden"})) as place:
        with pytest.raises(JudgeError, match=r"does not accept the key in OPENAI_API_KEY \(HTTP 403: Forbidden\)"):
            ask(judge_at(place.base_url, concurrency=2), tmp_path, 100)
        assert len(place.bodies) <= 7


def test_an_error_with_status_200_is_asked_again_later_and_not_at_once(tmp_path: Path) -> None:
    times: list[float] = []

    def say(body: dict[str, Any], number: int) -> Said:
        import time

        times.append(time.monotonic())
        return (200, {"error": {"message": "busy"}}) if number < 3 else completion("85")

    with saying(say) as place:
        assert ask(judge_at(place.base_url, deadline=20.0), tmp_path)[0].score == 85.0
    assert times[2] - times[0] > 0.7
    assert find_refusal(b'{"choices": [{"message": {"content": "85"}}], "error": null}') is None
    assert find_refusal(b"[[[") is None


OVERLOADED: dict[str, Said] = {
    "Ollama": (200, {"error": "model overloaded"}),
    "Anthropic": (200, {"error": {"type": "overloaded_error", "message": "Overloaded"}}),
    "type alone": (200, {"error": {"type": "overloaded_error"}}),
    "Moonshot": (200, {"error": {"type": "engine_overloaded_error", "message": "wait"}}),
    "TGI": (200, {"error": "Model is currently loading", "estimated_time": 0.01}),
    "a list": (200, [{"error": {"message": "Service temporarily unavailable"}}]),
    "in a choice": (200, {"choices": [{"error": {"message": "Upstream is at capacity"}, "message": None}]}),
    "a name of its own": (200, {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}, "choices": None}),
    "a message": (200, {"code": 1305, "message": "Too many requests, try again later"}),
    "a page": (200, b"<html><head><title>503 Service Temporarily Unavailable</title></head>"),
    "a line": (200, b"upstream connect error"),
    "another status": (400, {"error": {"type": "overloaded_error", "message": "Overloaded"}}),
}


@pytest.mark.parametrize("server", OVERLOADED)
def test_an_overload_is_waited_for_under_any_status(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than ``max_replies``, the limit for unreadable replies."""
    monkeypatch.setattr(connection, "FIRST_PAUSE", 1e-4)
    with saying(lambda _, number: OVERLOADED[server] if number < 8 else completion("85")) as place:
        assert ask(judge_at(place.base_url, deadline=20.0), tmp_path)[0].score == 85.0


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({"error": "Insufficient credits"}, 402),
        ({"error": "Invalid API key"}, 401),
        ({"error": "Rate limit reached, see your billing page"}, 429),
        ({"error": {"message": "The model is overloaded", "type": "invalid_request_error"}}, 400),
        ({"error": "Your input was flagged: it says that we are overloaded"}, 0),
        ({"error": "something went wrong"}, 0),
    ],
)
def test_the_status_of_an_error_with_status_200(said: Any, status: int) -> None:
    found = find_refusal(json.dumps(said).encode())
    assert found is not None
    assert found.status == status
    assert found.is_overload == ("is overloaded" in found.text)


@pytest.mark.parametrize("said", [{"ok": True}, {"error": None}, [], "words", None, {"object": "list", "data": []}])
def test_an_error_without_content_is_not_a_refusal(said: Any) -> None:
    assert find_refusal(json.dumps(said).encode()) is None


def test_the_seconds_that_an_error_with_status_200_asks_to_wait() -> None:
    bodies = [{"error": "loading", "estimated_time": 20.5}, {"error": {"message": "busy", "retry_after": 7}}]
    assert [found.wait for body in bodies if (found := find_refusal(json.dumps(body).encode()))] == [20.5, 7.0]
    found = find_refusal(b'{"error": "busy"}', {"retry-after": "3"})
    assert found is not None
    assert found.wait == 3.0


# --- what is spent


def test_adding_up_a_runs_costs_takes_constant_time(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        for number in range(300):
            question = Question.make("j", "m", "t", "", [{"role": "user", "content": str(number)}])
            ledger.record(question, Answer(1.0, cost=0.5))
            ledger.record(question, Answer(2.0, cost=9.0))  # already there: no further cost
            ledger.note_cost(question, Answer(None, cost=0.25))
        assert ledger.sum_costs() == 225.0
        plan = ledger._db.execute("EXPLAIN QUERY PLAN SELECT cost FROM spent WHERE run = 'run'").fetchall()
        assert [row[3] for row in plan] == ["SEARCH spent USING PRIMARY KEY (run=?)"]
    with Ledger(tmp_path / "ledger.sqlite", "other") as ledger:
        assert ledger.sum_costs() == 0.0


def test_the_check_says_at_once_that_no_server_is_there(tmp_path: Path) -> None:
    began = time.monotonic()
    with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        finding = canary(judge_at("http://127.0.0.1:9/v1", deadline=20.0), ledger)
    assert time.monotonic() - began < 10, "it does not try again until the deadline"
    assert finding.level == "stop"
    assert "the connection failed" in finding.text
    assert "judge.base_url" in finding.setting
