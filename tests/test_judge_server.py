"""The server for tests of the judge: it must fail exactly as set, and count correctly.

It is asked with the client that the judge uses, without that client's retries.
"""

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from tests.judge_server import (
    HANGING,
    HOPELESS,
    MIX,
    NEVER,
    Handle,
    Window,
    distribution,
    expected,
    is_hopeless,
    judge_server,
    parse_faults,
    question,
)

SCHEMA = {"name": "v", "schema": {"type": "object", "properties": {"score": {"type": "integer"}}}}


def compare(first: str, second: str) -> str:
    """A question with two answers, framed as the shipped template does."""
    return f"<answer A 12ab>\n{first}\n</answer A 12ab>\n<answer B 12ab>\n{second}\n</answer B 12ab>\nA or B?"


async def ask(client: AsyncOpenAI, content: str, deadline: float = 5, **more: Any) -> Any:
    """One attempt."""
    messages: Any = [{"role": "system", "content": "Grade."}, {"role": "user", "content": content}]
    async with asyncio.timeout(deadline):
        return await client.chat.completions.create(model="m", messages=messages, **more)


def run(server: Handle, work: Callable[[AsyncOpenAI], Awaitable[Any]], key: str = "any") -> Any:
    """Do some work with a client of the server."""

    async def inside() -> Any:
        async with AsyncOpenAI(base_url=server.base_url, api_key=key, max_retries=0) as client:
            return await work(client)

    return asyncio.run(inside())


def test_proper_answers() -> None:
    contents = [f"What is {n} worth?" for n in range(50)]

    async def work(client: AsyncOpenAI) -> list[Any]:
        return await asyncio.gather(*(ask(client, content) for content in contents))

    with judge_server(latency=0.02) as server:
        replies = run(server, work)
        stats, log = server.stats(), server.requests()
    assert [reply.choices[0].message.content for reply in replies] == [str(expected(c)) for c in contents]
    assert len({expected(c) for c in contents}) > 20
    assert all(r.choices[0].finish_reason == "stop" and r.choices[0].logprobs is None for r in replies)
    assert all(r.usage.total_tokens == r.usage.prompt_tokens + r.usage.completion_tokens > 10 for r in replies)
    for name in ("questions", "attempts", "ok", "delivered", "answered", "max_requests_minute"):
        assert stats[name] == 50, name
    assert stats["tokens_in"] + stats["tokens_out"] == stats["max_tokens_minute"]
    assert stats["tokens_in"] == sum(r.usage.prompt_tokens for r in replies)
    assert stats["paid_twice"] == stats["early"] == stats["cut"] == stats["bugs"] == stats["concurrent"] == 0
    assert 1 < stats["max_concurrent"] <= 50
    assert 50 * 0.01 < stats["busy"] <= 50 * stats["wall"]
    assert {line["question"] for line in log} == {question(c) for c in contents}
    assert all(line["fault"] == "ok" and line["status"] == 200 and line["seconds"] >= 0.01 for line in log)


def test_comparisons_are_consistent_for_most_pairs_and_for_all_with_marks() -> None:
    both = [(expected(compare(f"a{n}", f"b{n}")), expected(compare(f"b{n}", f"a{n}"))) for n in range(400)]
    biased = sum(one == other == 100 for one, other in both)
    assert 10 < biased < 45
    assert sum(one == 100 - other for one, other in both) == 400 - biased
    assert expected(compare("x [worth 70]", "y [worth 60]")) == 100
    assert expected(compare("x [worth 60]", "y [worth 70]")) == 0
    assert expected(compare("x [worth 60]", "y [worth 60]")) == 50
    assert expected("an answer [worth 83]") == 83
    with judge_server() as server:
        reply = run(server, lambda client: ask(client, compare("x [worth 60]", "y [worth 70]")))
    assert reply.choices[0].message.content == "B"


def test_structured_output() -> None:
    wanted: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}
    with judge_server(structured="on") as server:
        reply = run(server, lambda client: ask(client, "?", **wanted))
        assert json.loads(reply.choices[0].message.content) == {"score": expected("?")}
        server.change(structured="ignore")
        assert run(server, lambda client: ask(client, "?", **wanted)).choices[0].message.content == str(expected("?"))
        server.change(structured="reject")
        with pytest.raises(openai.BadRequestError) as refused:
            run(server, lambda client: ask(client, "?", **wanted))
        assert (refused.value.param, refused.value.code) == ("response_format", "unsupported_parameter")
        server.change(structured="on", reject="temperature")
        with pytest.raises(openai.BadRequestError) as refused:
            run(server, lambda client: ask(client, "?", temperature=0))
        assert refused.value.param == "temperature"
        assert server.stats()["refused"] == 2
        # A limit on tokens holds: JSON takes five.
        assert run(server, lambda client: ask(client, "?", max_tokens=4, **wanted)).choices[0].finish_reason == "length"
        assert server.question("?") == {"attempts": 3, "ok": 2, "delivered": 2}
        assert server.stats()["paid_twice"] == 1


def test_proper_answers_in_the_forms_of_all_servers() -> None:
    contents = [f"[worth {n}] {n % 7}" for n in range(101)]

    async def work(client: AsyncOpenAI) -> list[Any]:
        return await asyncio.gather(*(ask(client, content) for content in contents))

    with judge_server(forms="mixed") as server:
        replies = run(server, work)
        assert server.stats()["delivered"] == 101
    messages = [reply.choices[0].message for reply in replies]
    assert {reply.choices[0].finish_reason for reply in replies} == {
        "stop",
        "eos",
        "eos_token",
        "end_turn",
        "STOP",
        None,
    }
    assert {type(message.content) for message in messages} == {str, list}
    assert sum(str(message.content) == str(n) for n, message in enumerate(messages)) < 50
    assert all(str(n) in str(message.content) for n, message in enumerate(messages))


def test_logprobs() -> None:
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": 4}
    with judge_server(logprobs="on") as server:
        (entry,) = run(server, lambda client: ask(client, "?", **wanted)).choices[0].logprobs.content
        known = distribution("?")
        assert entry.token == known[0][0] == str(expected("?"))
        assert [(t.token, round(math.exp(t.logprob), 6)) for t in entry.top_logprobs] == [
            (t, round(p, 6)) for t, p in known[:4]
        ]
        assert sum(p for _, p in known) == pytest.approx(0.99)
        structured: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}
        entries = run(server, lambda client: ask(client, "?", **wanted, **structured)).choices[0].logprobs.content
        assert "".join(e.token for e in entries) == f'{{"score":{expected("?")}}}'
        (entry,) = (
            run(server, lambda c: ask(c, compare("[worth 1]", "[worth 2]"), **wanted)).choices[0].logprobs.content
        )
        assert entry.token == "B"
        # A reply without a verdict has tokens too; a number among them is unrelated to the question.
        server.change(faults={"two_numbers": 1.0})
        reply = run(server, lambda client: ask(client, "!", **wanted)).choices[0]
        assert "".join(e.token for e in reply.logprobs.content) == reply.message.content
        assert all(len(e.top_logprobs) == 1 for e in reply.logprobs.content)
        server.change(logprobs="split", faults="none")
        entries = run(server, lambda client: ask(client, "[worth 83]", **wanted)).choices[0].logprobs.content
        assert [e.token for e in entries] == ["8", "3"]
        server.change(logprobs="off")
        assert run(server, lambda client: ask(client, "?", **wanted)).choices[0].logprobs is None


def test_the_key_and_the_models() -> None:
    with judge_server(key="secret", model="some-judge") as server:
        with pytest.raises(openai.AuthenticationError) as refused:
            run(server, lambda client: ask(client, "?"), key="other")
        assert refused.value.code == "invalid_api_key"

        async def models(client: AsyncOpenAI) -> list[str]:
            return [model.id async for model in client.models.list()]

        assert run(server, models, key="secret") == ["some-judge"]
        assert server.stats()["unauthorised"] == 1


STATUS: dict[str, tuple[type[Exception], int]] = {
    "429_seconds": (openai.RateLimitError, 429),
    "429_date": (openai.RateLimitError, 429),
    "429_ms": (openai.RateLimitError, 429),
    "429": (openai.RateLimitError, 429),
    "quota": (openai.RateLimitError, 429),
    "500": (openai.InternalServerError, 500),
    "502": (openai.InternalServerError, 502),
    "503": (openai.InternalServerError, 503),
    "402": (openai.APIStatusError, 402),
    "403": (openai.PermissionDeniedError, 403),
    "408": (openai.APIStatusError, 408),
    "409": (openai.ConflictError, 409),
}
BELOW: dict[str, type[Exception]] = {
    "reset": openai.APIConnectionError,
    "cut_body": openai.APIConnectionError,
    "flood": openai.APIConnectionError,  # after the whole body; a client with a memory limit leaves before
    "silent": TimeoutError,
    "dribble": TimeoutError,
    "truncated": json.JSONDecodeError,
}


def first_choice(reply: Any) -> tuple[str, Any]:
    return reply.choices[0].finish_reason, reply.choices[0].message


BROKEN: dict[str, Callable[[Any], bool]] = {
    # The client turns valid JSON into an object without choices, or returns it as it is.
    "not_completion": lambda reply: getattr(reply, "choices", None) is None,
    "html": lambda reply: isinstance(reply, str) and "<html>" in reply,
    "empty_choices": lambda reply: reply.choices == [],
    "null_content": lambda reply: first_choice(reply)[1].content is None and bool(first_choice(reply)[1].refusal),
    "refusal": lambda reply: not any(c.isdigit() for c in first_choice(reply)[1].content),
    "two_numbers": lambda reply: first_choice(reply)[0] == "stop",
    "out_of_range": lambda reply: first_choice(reply)[0] == "stop",
    "fraction": lambda reply: first_choice(reply)[0] == "stop",
    "length": lambda reply: first_choice(reply)[0] == "length" and first_choice(reply)[1].content.isdigit(),
    "content_filter": lambda reply: first_choice(reply)[0] == "content_filter",
    "error_200": lambda reply: getattr(reply, "choices", None) is None,
    "denial": lambda reply: first_choice(reply)[0] == "stop",
    "thought": lambda reply: "85" in str(first_choice(reply)[1]) and "</think>" not in str(first_choice(reply)[1]),
}


def test_every_fault_is_as_named() -> None:
    assert {*STATUS, *BELOW, *BROKEN, "slow"} == {*MIX, *NEVER}
    texts: dict[str, set[str]] = {}
    with judge_server(max_faults=1000, flood=2, latency=0.005, slow=20) as server:

        async def attempt(client: AsyncOpenAI, fault: str, content: str) -> None:
            begun = time.monotonic()
            if fault in STATUS:
                kind, status = STATUS[fault]
                with pytest.raises(kind) as refused:
                    await ask(client, content)
                problem: Any = refused.value
                assert problem.status_code == status
                assert (problem.code == "insufficient_quota") == (fault == "quota")
                texts.setdefault(fault, set()).update({"retry-after", "retry-after-ms"} & set(problem.response.headers))
            elif fault in BELOW:
                with pytest.raises(BELOW[fault]):
                    await ask(client, content, 0.3 if fault in ("silent", "dribble") else 5)
            elif fault == "slow":
                assert (await ask(client, content)).choices[0].message.content == str(expected(content))
                assert time.monotonic() - begun >= 0.05
            else:
                reply = await ask(client, content)
                assert BROKEN[fault](reply), (fault, reply)
                if getattr(reply, "choices", None):
                    texts.setdefault(fault, set()).add(str(reply.choices[0].message.content))

        async def work(client: AsyncOpenAI) -> None:
            for fault in (*MIX, *NEVER):
                await asyncio.to_thread(server.change, faults={fault: 1.0})
                for n in range(2 if fault in HANGING else 10):
                    await attempt(client, fault, f"{fault} {n}")

        run(server, work)
        stats, log = server.stats(), server.requests()
    assert texts["429_seconds"] == texts["429_date"] == {"retry-after"} == texts["503"]
    assert texts["429_ms"] == {"retry-after-ms"}
    assert not texts["429"]
    assert not texts["quota"]
    assert not texts["500"]
    assert {"Between 60 and 70"} < texts["two_numbers"]
    assert {"Score: 140", "-5"} < texts["out_of_range"]
    assert {"17/20", "7.5"} < texts["fraction"]
    assert stats["faults"] == {fault: 2 if fault in HANGING else 10 for fault in (*MIX, *NEVER)}
    assert stats["delivered"] == stats["ok"] == 10  # the slow ones
    assert stats["cut"] == 4  # silent and dribble, by the client
    assert stats["bugs"] == 0
    assert [line["fault"] for line in log if line["cut"]] == ["silent"] * 2 + ["dribble"] * 2
    assert {line["status"] for line in log if line["fault"] in ("reset", "silent")} == {0}


def test_a_dribble_never_ends_and_a_flood_is_as_long_as_is_asked() -> None:
    """Read at the socket: bytes keep arriving, so no timeout between bytes fires."""

    async def read(seconds: float) -> int:
        total = 0
        body = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
        async with httpx2.AsyncClient(timeout=0.4) as client:
            try:
                async with (
                    asyncio.timeout(seconds),
                    client.stream("POST", f"{server.base_url}/chat/completions", json=body) as reply,
                ):
                    async for piece in reply.aiter_raw():
                        total += len(piece)
            except (TimeoutError, httpx2.TransportError):
                pass
        return total

    with judge_server(faults={"dribble": 1}, max_faults=1000, flood=8) as server:
        assert 5 <= asyncio.run(read(0.9)) <= 19
        server.change(faults={"flood": 1})
        assert asyncio.run(read(10)) > 4 * 2**20
        server.change(flood=10**6)
        asyncio.run(read(0.5))  # it ends with the client
        stats = server.stats()
    assert stats["concurrent"] == stats["bugs"] == 0
    assert (stats["faults"], stats["cut"]) == ({"dribble": 1, "flood": 2}, 2)
    assert stats["max_rss_mb"] is None or stats["max_rss_mb"] < 60


def test_every_question_is_answered_after_the_set_number_of_faults_except_hopeless_ones() -> None:
    contents = [f"q{n}" for n in range(80)]
    hopeless = {c for c in contents if is_hopeless(c, 0.1, seed=5)}
    assert 2 < len(hopeless) < 20
    got: dict[str, list[str]] = {}

    async def work(client: AsyncOpenAI) -> None:
        places = asyncio.Semaphore(20)

        async def four(content: str) -> None:
            for _ in range(4):
                async with places:
                    try:
                        reply = await ask(client, content, 1.5)
                        got.setdefault(content, []).append(reply.choices[0].message.content)
                    except Exception:
                        continue

        await asyncio.gather(*map(four, contents))

    def go() -> tuple[dict[str, Any], list[str]]:
        with judge_server(faults="mix", hopeless=0.1, seed=5, flood=1, max_faults=3) as server:
            run(server, work)
            stats, log = server.stats(), server.requests()
        return stats, sorted(f"{line['question']} {line['attempt']} {line['fault']}" for line in log)

    stats, first = go()
    assert stats["attempts"] == 320
    assert stats["bugs"] == 0
    assert stats["hopeless"] == len(hopeless)
    assert stats["answered"] == 80 - len(hopeless)
    assert stats["paid_twice"] == stats["delivered"] - stats["answered"] > 0
    assert len(stats["faults"]) > 15
    for content in contents:
        assert (got[content][-1] == str(expected(content))) == (content not in hopeless), content
    faulty = {line.split()[2] for line in first if line.split()[0] in {question(c) for c in hopeless}}
    assert faulty & set(HOPELESS)
    assert not faulty & {"ok", "slow"}
    assert go()[1] == first  # the same seed, the same faults, in whatever order they came


def test_a_proper_answer_to_a_client_that_has_gone_is_not_delivered() -> None:
    async def leave(client: AsyncOpenAI) -> None:
        with pytest.raises(TimeoutError):
            await ask(client, "?", 0.4)

    with judge_server(latency=3) as server:
        run(server, leave)
        assert server.question("?") == {"attempts": 1, "ok": 0, "delivered": 0}
        assert server.stats()["cut"] == 1
        assert server.stats()["concurrent"] == 0
        server.change(latency=0)
        run(server, lambda client: ask(client, "?"))
        assert server.question("?") == {"attempts": 2, "ok": 1, "delivered": 1}
        assert server.stats()["paid_twice"] == 0


def test_a_retry_before_retry_after_is_counted() -> None:
    async def twice(client: AsyncOpenAI, wait: float) -> None:
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(client, f"{wait}")
        await asyncio.sleep(wait * float(refused.value.response.headers["retry-after"]))
        await ask(client, f"{wait}")

    with judge_server(faults={"429_seconds": 1.0}, max_faults=1, retry_after=0.4) as server:
        run(server, lambda client: twice(client, 1.0))
        assert server.stats()["early"] == 0
        run(server, lambda client: twice(client, 0.1))
        assert server.stats()["early"] == 1


def test_windows_slide() -> None:
    window = Window(60)
    for second, tokens in [(0.0, 5), (30.0, 7), (59.9, 1), (60.0, 2), (90.0, 1), (300.0, 4)]:
        window.add(1000 + second, tokens)
    assert (window.max_requests, window.max_tokens) == (3, 13)  # at 59.9; from 60.0 on the first has left
    assert (window.requests, window.tokens, len(window.bins)) == (1, 4, 1)


def test_rates() -> None:
    assert parse_faults("none") == {}
    assert parse_faults("mix") == pytest.approx(MIX)
    tenth = parse_faults('{"mix": 0.1, "slow": 0, "quota": 0.2}')
    assert sum(tenth.values()) == pytest.approx(0.3 - 0.1 * MIX["slow"] / sum(MIX.values()))
    assert parse_faults({"reset": 0.1}) == {"reset": 0.1}
    with pytest.raises(ValueError, match="resett"):
        parse_faults({"resett": 0.1})
    with pytest.raises(ValueError, match="more than 1"):
        parse_faults({"reset": 0.6, "500": 0.6})


# --- batches ----------------------------------------------------------------------------------------------------------


def lines(contents: list[str]) -> bytes:
    """The input file of a batch."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"id-{content}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "m", "messages": [{"role": "user", "content": content}]},
            }
        ).encode()
        + b"\n"
        for content in contents
    )


async def submit(client: AsyncOpenAI, content: bytes, **metadata: str) -> Any:
    file = await client.files.create(file=("input.jsonl", content), purpose="batch")
    assert (file.bytes, file.purpose, file.filename) == (len(content), "batch", "input.jsonl")
    return await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
    )


async def finish(client: AsyncOpenAI, name: str) -> tuple[Any, list[str]]:
    """Wait for a batch; return it and the states it had."""
    states: list[str] = []
    async with asyncio.timeout(10):
        while True:
            batch = await client.batches.retrieve(name)
            if batch.status not in states:
                states.append(batch.status)
            if batch.status in ("completed", "failed", "expired", "cancelled"):
                return batch, states
            await asyncio.sleep(0.01)


async def read(client: AsyncOpenAI, name: str | None) -> dict[str, Any]:
    """A batch's file, by custom_id."""
    if name is None:
        return {}
    found = [json.loads(line) for line in (await client.files.content(name)).text.splitlines()]
    return {line["custom_id"]: line for line in found}


def test_a_batch() -> None:
    contents = [f"question {n}\r\n--with an odd end\r\n" for n in range(60)]

    async def work(client: AsyncOpenAI) -> None:
        made = await submit(client, lines(contents), digest="12ab")
        assert made.status == "validating"
        assert made.metadata == {"digest": "12ab"}
        batch, states = await finish(client, made.id)
        order = ["validating", "in_progress", "finalizing", "completed"]
        assert states == [state for state in order if state in states]  # a slow machine may miss some
        assert {"in_progress", "completed"} <= set(states)
        done, failed = await read(client, batch.output_file_id), await read(client, batch.error_file_id)
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (60, len(done), len(failed))
        assert done.keys() | failed.keys() == {f"id-{c}" for c in contents}
        assert not done.keys() & failed.keys()
        assert 5 < len(failed) < 55
        assert list(done) != [f"id-{c}" for c in contents if f"id-{c}" in done]  # in no order
        for name, line in done.items():
            reply = line["response"]["body"]["choices"][0]["message"]["content"]
            assert reply == str(expected(name.removeprefix("id-")))
        assert {line["response"]["status_code"] for line in failed.values()} == {500, 429}
        assert all("message" in line["response"]["body"]["error"] for line in failed.values())
        # The rest again, past their faults.
        again, _ = await finish(client, (await submit(client, lines([c for c in contents if f"id-{c}" in failed]))).id)
        assert (again.error_file_id, again.request_counts.completed) == (None, len(failed))

    with judge_server(faults={"429": 0.2, "reset": 0.2}, max_faults=1, batch_seconds=0.4) as server:
        run(server, work)
        stats = server.stats()
    assert stats["batches"] == 2
    assert stats["batch_ok"] == stats["answered"] == stats["delivered"] == 60
    assert stats["batch_failed"] == stats["attempts"] - 60
    assert stats["paid_twice"] == stats["bugs"] == 0


def test_batches_that_are_not_completed() -> None:
    contents = [f"q{n}" for n in range(40)]

    async def work(client: AsyncOpenAI) -> None:
        broken, states = await finish(client, (await submit(client, lines(["a", "a"]) + b"{\n")).id)
        assert broken.status == "failed"
        assert states[0] == "validating"
        assert [(e.code, e.line) for e in broken.errors.data] == [("duplicate_custom_id", 2), ("invalid_json_line", 3)]
        made = await submit(client, lines(contents))
        while (await client.batches.retrieve(made.id)).status == "validating":
            await asyncio.sleep(0.01)
        assert (await client.batches.cancel(made.id)).status == "cancelling"
        cancelled, _ = await finish(client, made.id)
        done, left = await read(client, cancelled.output_file_id), await read(client, cancelled.error_file_id)
        assert cancelled.status == "cancelled"
        assert len(done) < 40
        assert len(done) + len(left) == 40
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(made.id)
        await asyncio.to_thread(server.change, batch_fate="expired", batch_seconds=0.05)
        expired, _ = await finish(client, (await submit(client, lines(contents))).id)
        left = await read(client, expired.error_file_id)
        assert expired.status == "expired"
        assert expired.request_counts.completed == len(left) == 20
        assert all(x["response"] is None and x["error"]["code"] == "batch_expired" for x in left.values())
        await asyncio.to_thread(server.change, batch_fate="failed")
        failed, _ = await finish(client, (await submit(client, lines(contents))).id)
        assert failed.status == "failed"
        assert failed.errors.data[0].code == "token_limit_exceeded"
        # The newest first, page by page.
        assert [b.id async for b in client.batches.list(limit=3)] == [failed.id, expired.id, made.id, broken.id]
        page = await client.batches.list(after=expired.id, limit=1)
        assert [b.id for b in page.data] == [made.id]
        assert page.has_more
        await client.files.delete(expired.output_file_id)
        with pytest.raises(openai.NotFoundError):
            await client.files.content(expired.output_file_id)

    with judge_server(batch_seconds=2) as server:
        run(server, work)
        assert server.stats()["bugs"] == 0


def test_calls_about_batches_fail_too_and_some_take_effect_all_the_same() -> None:
    async def work(client: AsyncOpenAI) -> tuple[int, int, int]:
        made = lost = refused = 0
        for n in range(40):
            try:
                await submit(client, lines(["q"]), n=str(n))
                made += 1
            except openai.APIConnectionError:
                lost += 1
            except openai.InternalServerError:
                refused += 1
        return made, lost, refused

    with judge_server(api_faults=0.4) as server:
        made, lost, refused = run(server, work)
        stats = server.stats()
    assert made < stats["batches"] <= made + lost  # the reply to an upload may be lost as well
    assert refused == stats["faults"]["api_503"]
    assert lost == stats["faults"]["api_lost"]
