"""The judge by API, through the real client, against a server that goes wrong on purpose."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dnpo.connection.refusals import retry_after
from dnpo.errors import JudgeError, SettingsError
from dnpo.judges import judge_responses
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.asked.openai import OpenAI
from dnpo.records import HUMAN, Prompt, Response, Verdict
from tests.conftest import Report
from tests.judge_server import Handle, expected, is_hopeless, judge_server
from tests.judging import rows

KEY = "sk-planted-4c1d9e8b7a6f5e4d"


def judge_of(server: Handle, **settings: Any) -> OpenAI:
    given = {"model": "judge", "base_url": server.base_url, "timeout": 5.0, "concurrency": 32, "max_unscored": 1.0}
    return OpenAI(**(given | settings))


def contents(judge: OpenAI, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[str]:
    """The last message to the server for each response."""
    return [judge.wording.messages(p.messages, r.text)[-1]["content"] for p, r in zip(prompts, responses, strict=True)]


def right(judge: OpenAI, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
    return [float(expected(content)) for content in contents(judge, prompts, responses)]


def ask(judge: OpenAI, folder: Path, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Verdict]:
    with Ledger(folder / "ledger.sqlite", "run") as ledger:
        return judge(prompts, responses, ledger, Report())


# --- questions and replies


@pytest.mark.parametrize("structured", ["on", "ignore", "reject"])
def test_scores_equal_the_servers_with_or_without_schemas(structured: str, tmp_path: Path) -> None:
    prompts, responses = rows(60)
    with judge_server(structured=structured, key=KEY) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_KEY", KEY)
        judge = judge_of(server, key_from="JUDGE_KEY")
        said = ask(judge, tmp_path, prompts, responses)
        assert [v.score for v in said] == right(judge, prompts, responses)
        assert [(v.id, v.source) for v in said] == [(r.id, r.source) for r in responses]
        stats = server.stats()
        assert stats["answered"] == 60
        if structured == "reject":
            assert 0 < stats["refused"] <= 32  # only calls in flight when the first was refused
        assert stats["attempts"] == 60


def test_a_parameter_with_another_name_at_the_server_is_renamed(tmp_path: Path) -> None:
    prompts, responses = rows(20)
    with judge_server(reject="max_tokens") as server:
        judge = judge_of(server, concurrency=4)
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            verdicts = judge(prompts, responses, ledger, Report())
        if judge.endpoint.limit_name == "max_tokens":  # the server's message names no other parameter
            assert all("HTTP 400" in v.reason for v in verdicts)
        else:
            assert [v.score for v in verdicts] == right(judge, prompts, responses)


def test_expected_values_from_log_probabilities(tmp_path: Path) -> None:
    from tests.judge_server import distribution

    prompts, responses = rows(30)
    with judge_server(logprobs="on") as server:
        judge = judge_of(server, reading="logprobs")
        verdicts = ask(judge, tmp_path, prompts, responses)
        for verdict, content in zip(verdicts, contents(judge, prompts, responses), strict=True):
            likeliest = sorted(distribution(content), key=lambda pair: -pair[1])[:20]
            top = [(int(t), p) for t, p in likeliest if t.strip().isdecimal() and int(t) <= 100]
            mean = sum(n * p for n, p in top) / sum(p for _, p in top)
            assert verdict.score == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(("logprobs", "reason"), [("off", "judge.reading=text"), ("split", "several tokens")])
def test_unusable_log_probabilities_give_no_scores(logprobs: str, reason: str, tmp_path: Path) -> None:
    prompts, responses = rows(6)
    with judge_server(logprobs=logprobs) as server:
        verdicts = ask(judge_of(server, reading="logprobs", max_replies=1), tmp_path, prompts, responses)
    unscored = [v for v in verdicts if v.score is None]
    assert unscored
    assert all(reason in v.reason for v in unscored)


def test_pairs_are_compared_in_both_orders(tmp_path: Path) -> None:
    prompts = [Prompt(str(i), [{"role": "user", "content": f"Q{i}"}], f"human [worth {i}]") for i in range(20)]
    human = [Response(p.id, HUMAN, p.human, [], 0, "eos") for p in prompts]
    new = [Response(p.id, "policy@0", "new [worth 10]", [], 0, "eos") for p in prompts]
    plain = [Response(p.id, "policy@1", f"plain {p.id}", [], 0, "eos") for p in prompts]
    with judge_server() as server:
        judge = judge_of(server, mode="pairwise")
        verdicts = ask(judge, tmp_path, prompts, [*human, *new])
        assert [v.score for v in verdicts[:20]] == [50.0] * 20
        assert [v.score for v in verdicts[20:]] == [100.0] * 10 + [50.0] + [0.0] * 9
        assert {v.disagreement for v in verdicts[20:]} == {0.0}
        assert server.stats()["answered"] == 40
        # without marks one in sixteen gets A in both orders: 50 points on average, and 100 between the orders
        apart = [v for v in ask(judge, tmp_path, prompts, [*human, *plain])[20:] if v.disagreement]
        assert all((v.score, v.disagreement) == (50.0, 100.0) for v in apart)


# --- what goes wrong


def check_mix(count: int, folder: Path, **options: Any) -> None:
    prompts, responses = rows(count)
    given: dict[str, Any] = {"faults": "mix", "slow": 4, "retry_after": 0.2, "flood": 2, "hopeless": 0.02}
    with judge_server(**(given | options)) as server:
        judge = judge_of(server, timeout=4.0, max_replies=4, concurrency=64)
        verdicts = ask(judge, folder, prompts, responses)
        truth = right(judge, prompts, responses)
        never = [is_hopeless(content, 0.02) for content in contents(judge, prompts, responses)]
        stats = server.stats()
        assert stats["bugs"] == 0
        wrong = [(v, t) for v, t, no in zip(verdicts, truth, never, strict=True) if v.score != (None if no else t)]
        assert not wrong, wrong[:5]
        assert all(v.reason for v, no in zip(verdicts, never, strict=True) if no)
        assert stats["answered"] == count - sum(never)
        assert stats["paid_twice"] == 0
        assert stats["max_concurrent"] <= 64
        # again: only the unanswered questions are asked
        server.change(faults="none")
        again = ask(judge, folder, prompts, responses)
        assert [v.score for v in again] == [v.score for v in verdicts]
        assert server.stats()["answered"] == stats["answered"]
        # four times each, but a 403 is final
        assert sum(never) <= server.stats()["attempts"] - stats["attempts"] <= 4 * sum(never)


@pytest.mark.long
@pytest.mark.parametrize(("structured", "count", "latency"), [("on", 400, 0.01), ("ignore", 1_200, 0.02)])
def test_every_proper_answer_is_taken_and_none_invented(
    structured: str, count: int, latency: float, tmp_path: Path
) -> None:
    """The larger count exceeds the numbers in flight, queued or written at once; ``benchmarks.judge`` makes 10,000."""
    check_mix(count, tmp_path, latency=latency, forms="mixed", structured=structured)


def test_the_servers_wait_time_is_obeyed(tmp_path: Path) -> None:
    prompts, responses = rows(12)
    with judge_server(faults={"429_seconds": 0.4, "429_ms": 0.4}, retry_after=0.8, max_faults=2) as server:
        judge = judge_of(server)
        assert [v.score for v in ask(judge, tmp_path, prompts, responses)] == right(judge, prompts, responses)
        log = sorted(server.requests(), key=lambda line: line["time"])
    last: dict[str, float] = {}
    waits = []
    for line in log:
        if line["question"] in last:
            waits.append(line["time"] - line["seconds"] - last[line["question"]])
        last[line["question"]] = line["time"]
    assert len(waits) >= 8
    assert min(waits) >= 0.39  # it asks for half to three halves of 0.8 s


def test_retry_after_is_read_in_all_its_forms() -> None:
    from email.utils import formatdate

    assert retry_after({"retry-after": "2"}) == 2.0
    assert retry_after({"retry-after": "0.25"}) == 0.25
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    later = retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert later is not None
    assert 28 <= later <= 31
    for nonsense in ("soon", "nan", "inf", "", "0", "-3", formatdate(time.time() - 30, usegmt=True)):
        assert retry_after({"retry-after": nonsense}) is None
    assert retry_after({}) is None


def test_the_ceiling_on_requests_holds_in_every_window(tmp_path: Path) -> None:
    prompts, responses = rows(30)
    with judge_server() as server:
        judge = judge_of(server, requests_per_minute=1200)
        ask(judge, tmp_path, prompts, responses)
        starts = sorted(line["time"] - line["seconds"] for line in server.requests())
    gaps = [b - a for a, b in pairwise(starts)]
    assert starts[-1] - starts[0] >= 29 * 0.05 - 0.05
    assert sum(gap < 0.02 for gap in gaps) <= 5  # evenly spaced, not in bursts


def test_the_ceiling_on_tokens_holds(tmp_path: Path) -> None:
    prompts, responses = rows(24)
    with judge_server() as server:
        judge = judge_of(server, tokens_per_minute=200_000, structured="off")
        started = time.monotonic()
        ask(judge, tmp_path, prompts, responses)
        seconds = time.monotonic() - started
        assert server.stats()["tokens_in"] / max(seconds, 1e-9) * 60 <= 200_000
    with judge_server() as server, pytest.raises(SettingsError, match="tokens_per_minute=20: the longest question"):
        ask(judge_of(server, tokens_per_minute=20), tmp_path / "other", prompts, responses)


@pytest.mark.parametrize(
    ("options", "settings", "says"),
    [
        ({"key": "sk-right"}, {}, "does not accept the key in OPENAI_API_KEY"),
        ({"faults": {"quota": 1.0}}, {}, "has no credit left"),
        ({}, {"base_url": "{}/nowhere"}, "not found"),
    ],
)
def test_errors_that_no_retry_can_fix_end_the_run_at_once(
    options: dict[str, Any], settings: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts, responses = rows(200)
    with judge_server(**options) as server:
        given = {name: value.format(server.base_url) for name, value in settings.items()}
        with pytest.raises(JudgeError, match=says) as caught:
            ask(judge_of(server, concurrency=8, **given), tmp_path, prompts, responses)
        assert KEY not in str(caught.value)
        assert server.stats()["attempts"] <= 8


def test_a_question_has_a_deadline(tmp_path: Path) -> None:
    prompts, responses = rows(3)
    with judge_server(faults={"dribble": 1.0}, max_faults=1000) as server:
        started = time.monotonic()
        verdicts = ask(judge_of(server, timeout=0.4, deadline=1.5), tmp_path, prompts, responses)
        assert time.monotonic() - started < 5
        assert [v.score for v in verdicts] == [None] * 3
        assert all("given up after judge.deadline=1.5 s" in v.reason for v in verdicts)


def test_an_unreachable_server_fails_the_rows_and_not_the_run(tmp_path: Path) -> None:
    prompts, responses = rows(3)
    judge = OpenAI(model="judge", base_url="http://127.0.0.1:9/v1", deadline=0.8, max_unscored=1.0)
    verdicts = ask(judge, tmp_path, prompts, responses)
    assert all(v.score is None and "the connection failed" in v.reason for v in verdicts)


def test_too_many_failures_end_it_early_and_a_rerun_asks_for_the_rest(tmp_path: Path) -> None:
    prompts, responses = rows(100)
    with judge_server(hopeless=0.3) as server:
        judge = judge_of(server, max_unscored=0.02, max_replies=1, concurrency=4)
        with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
            with pytest.raises(JudgeError, match=r"more than judge\.max_unscored=0\.02 allows") as caught:
                judge_responses(judge, prompts, responses, ledger, Report())
            assert "run the same command again" in str(caught.value)
            first = server.stats()
            assert first["attempts"] < 60  # it does not pay for calls that can no longer succeed
            server.change(hopeless=0.0)
            verdicts = judge_responses(judge, prompts, responses, ledger, Report())
        assert [v.score for v in verdicts] == right(judge, prompts, responses)
        assert server.stats()["answered"] == 100
        assert server.stats()["attempts"] - first["attempts"] == 100 - first["answered"]


# --- money


def prices(folder: Path) -> str:
    path = folder / "prices.yaml"
    path.write_text("judge: {input: 1.0, output: 2.0, batch: 0.5}\n")
    return str(path)


def test_recorded_costs_equal_the_servers_count(tmp_path: Path) -> None:
    prompts, responses = rows(50)
    with judge_server(faults={"two_numbers": 0.3}, max_faults=1) as server:
        judge, report = judge_of(server, prices=prices(tmp_path)), Report()
        with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
            judge(prompts, responses, ledger, report)
            stats = server.stats()
            paid = sum(line["tokens_in"] for line in ledger.rows()), sum(line["tokens_out"] for line in ledger.rows())
            assert stats["attempts"] > 50  # unusable replies are paid for, and counted
            assert ledger.sum_costs() == pytest.approx((paid[0] * 1.0 + paid[1] * 2.0) / 1e6)
            assert report.words == f"${ledger.sum_costs():,.2f}"
            assert paid[0] >= stats["tokens_in"]
            (row,) = ledger.rows()
            assert (row["calls"], row["failed"]) == (50, stats["attempts"] - 50)


def test_the_limit_on_cost_is_never_passed_and_nothing_is_lost(tmp_path: Path) -> None:
    prompts, responses = rows(120)
    with judge_server(latency=0.01) as server:
        judge = judge_of(server, prices=prices(tmp_path), max_cost=0.02, concurrency=8)
        with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
            with pytest.raises(JudgeError, match=r"judge\.max_cost=0\.02: \$0\.0"):
                judge(prompts, responses, ledger, Report())
            assert 0.015 < ledger.sum_costs() <= 0.02
            answered = server.stats()["answered"]
            keys = [q.key for some in judge.make_questions(prompts, responses) for q in some]
            assert len(ledger.answers(keys)) == answered
        richer = judge_of(server, prices=prices(tmp_path), max_cost=1.0)
        assert [v.score for v in ask(richer, tmp_path, prompts, responses)] == right(richer, prompts, responses)
        assert server.stats()["attempts"] == 120
    with pytest.raises(SettingsError, match="max_cost=1: there is no price for judge"):
        judge_of(server, max_cost=1.0)


def test_the_forecast_is_the_real_cost_or_a_little_more(tmp_path: Path) -> None:
    prompts, responses = rows(40)
    with judge_server() as server, Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        judge = judge_of(server, prices=prices(tmp_path))
        assert judge.forecast(prompts, responses[:10], ledger, set()).new == 10
        judge(prompts, responses[:10], ledger, Report())
        spent = ledger.sum_costs()
        seen: set[str] = set()
        found = judge.forecast(prompts, [*responses, *responses], ledger, seen)
        assert (found.calls, found.new) == (40, 30)
        assert judge.forecast(prompts, responses, ledger, seen).calls == 0
        judge(prompts, responses, ledger, Report())
        assert found.cost is not None
        assert ledger.sum_costs() - spent <= found.cost <= 2 * (ledger.sum_costs() - spent)


# --- settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"base_url": "judge.example"}, "base_url=judge.example: expected an address"),
        ({"base_url": f"https://me:{KEY}@judge.example/v1"}, "has a user name, password or query in it"),
        ({"template": "nowhere.yaml"}, "judge.template=nowhere.yaml"),
        ({"prices": "nowhere.yaml"}, "judge.prices=nowhere.yaml"),
    ],
)
def test_wrong_settings_are_named_and_secrets_are_not(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        OpenAI(**({"model": "judge"} | settings))
    assert KEY not in str(caught.value)


def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "OPENAI_API_KEY is not set" in str(OpenAI(model="gpt-4o-mini").accepts([]))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert OpenAI(model="gpt-4o-mini").accepts([]) is None
    for broken in (f"{KEY}\n", f"Bearer {KEY}", f"{KEY}é"):
        monkeypatch.setenv("OPENAI_API_KEY", broken)
        said = str(OpenAI(model="gpt-4o-mini").accepts([]))
        assert "is not a key" in said
        assert KEY not in said


def test_the_canary_is_a_real_call(tmp_path: Path) -> None:
    with judge_server() as server, Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        for mode in ("score", "pairwise"):
            canary = judge_of(server, mode=mode, prices=prices(tmp_path)).canary(ledger)
            assert canary.scored
            assert "$0.00" in canary.text
        assert server.stats()["answered"] == 2
        server.change(hopeless=1.0)
        scored, refusal = True, ""
        try:
            scored = judge_of(server).canary(ledger).scored
        except JudgeError as error:  # the drawn fault stops the run at once
            scored, refusal = False, str(error)
        assert not scored
        assert not refusal or "HTTP 403" in refusal


def test_only_what_changes_an_answer_is_in_the_identity() -> None:
    base = OpenAI(model="judge").identity()
    same = OpenAI(model="judge", concurrency=2, max_cost=None, batch=True, timeout=3.0, requests_per_minute=7)
    assert same.identity() == base
    for other in ({"model": "other"}, {"mode": "pairwise"}, {"reading": "logprobs"}, {"temperature": 1.0}):
        assert OpenAI(**({"model": "judge"} | other)).identity() != base


# --- several at once, and sudden ends


def test_two_runs_at_once_ask_every_question_once(tmp_path: Path) -> None:
    prompts, responses = rows(200)
    found: dict[int, list[Verdict]] = {}
    with judge_server(latency=0.02) as server:
        judge = judge_of(server)
        wanted = right(judge, prompts, responses)

        def one(number: int) -> None:
            found[number] = ask(judge_of(server, concurrency=8), tmp_path, prompts, responses)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [[v.score for v in found[number]] for number in range(3)] == [wanted] * 3
        stats = server.stats()
        assert (stats["attempts"], stats["answered"]) == (200, 200)


def judging(server: Handle, folder: Path, count: int) -> subprocess.Popen[str]:
    here = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "tests.judging", server.base_url, str(folder), str(count)]
    return subprocess.Popen(
        command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.long
def test_recorded_answers_are_not_asked_again_after_a_kill(tmp_path: Path) -> None:
    """A reply in transit at that moment is lost: at most one for each slot."""
    draw, lost = random.Random(0), 0
    with judge_server(latency=0.05) as server, Ledger(tmp_path / "ledger.sqlite") as ledger:
        keep: set[str] = set()
        for _ in range(3):
            before = len(server.requests())
            process = judging(server, tmp_path, 600)
            while len(server.requests()) < before + 8:  # it is asking
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            time.sleep(draw.uniform(0.05, 0.4))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            keys = {row[0] for row in ledger._db.execute("SELECT key FROM calls")}
            assert keep <= keys
            keep = keys
            time.sleep(0.2)  # the server has finished its requests
            stats = server.stats()
            assert stats["delivered"] - len(keys) - lost <= 8
            lost = stats["delivered"] - len(keys)
        assert len(keep) < 600, "the kills came too late to show anything"
        last = judging(server, tmp_path, 600)
        out, err = last.communicate(timeout=120)
        assert out == "scored 600\n", err
        stats = server.stats()
        assert stats["answered"] == 600
        # every recorded answer was asked once: answers paid twice were not recorded the first time
        assert stats["delivered"] - 600 <= lost


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupt_waits_for_calls_in_flight(number: signal.Signals, tmp_path: Path) -> None:
    with judge_server(latency=0.4) as server:
        process = judging(server, tmp_path, 400)
        while server.stats()["attempts"] < 10:
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert f"{number.name}: replies on their way are paid for, so the run waits up to 10 s for them" in err
        assert process.returncode == 128 + number, err
        stats = server.stats()
        with Ledger(tmp_path / "ledger.sqlite") as ledger:
            (row,) = ledger.rows()
            assert row["calls"] == stats["delivered"] == stats["attempts"] < 400


def test_an_interrupt_is_answered_at_once_and_a_second_one_ends_the_wait(tmp_path: Path) -> None:
    with judge_server(latency=60) as server:
        process = judging(server, tmp_path, 400)
        assert process.stderr is not None
        while server.stats()["attempts"] < 8:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        while "Ctrl-C again ends it at once" not in process.stderr.readline():
            assert process.poll() is None
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert time.monotonic() - sent < 5, "it would have waited 10 seconds"


# --- batches


def test_a_batch_is_collected_at_its_price(tmp_path: Path) -> None:
    prompts, responses = rows(50)
    with judge_server() as server:
        judge = judge_of(server, batch=True, batch_poll=0.1, prices=prices(tmp_path))
        with Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
            report = Report()
            verdicts = judge(prompts, responses, ledger, report)
            assert [v.score for v in verdicts] == right(judge, prompts, responses)
            (row,) = ledger.rows()
            assert ledger.sum_costs() == pytest.approx((row["tokens_in"] + 2 * row["tokens_out"]) / 2e6)
        assert server.stats()["batches"] == 1
        assert any("submitted: 50 questions" in note for note in report.notes)
        # single calls give the same answers
        plain = ask(judge_of(server), tmp_path, prompts, responses)
        assert [v.score for v in plain] == right(judge, prompts, responses)
        assert server.stats()["attempts"] == 50  # the lines of the batch


@pytest.mark.parametrize("fate", ["expired", "failed"])
def test_a_failed_batch_is_reported_and_submitted_again(fate: str, tmp_path: Path) -> None:
    prompts, responses = rows(20)
    with judge_server(batch_fate=fate) as server:
        judge = judge_of(server, batch=True, batch_poll=0.1)
        if fate == "failed":
            with pytest.raises(JudgeError, match="failed"):
                ask(judge, tmp_path, prompts, responses)
        else:
            verdicts = ask(judge, tmp_path, prompts, responses)
            assert any(v.score is None and "expired" in v.reason for v in verdicts)
        server.change(batch_fate="completed")
        assert [v.score for v in ask(judge, tmp_path, prompts, responses)] == right(judge, prompts, responses)
        assert server.stats()["batches"] == 2


def test_a_batch_is_found_again_after_a_sudden_end(tmp_path: Path) -> None:
    """Whether the run was killed before or after it wrote down the batch's id."""
    prompts, responses = rows(30)
    for forget in (False, True):
        folder = tmp_path / str(forget)
        with judge_server(batch_seconds=1.0) as server:
            judge = judge_of(server, batch=True, batch_poll=0.1)
            with Ledger(folder / "ledger.sqlite", "run") as ledger:

                class Killed(Report):
                    def status(self, text: str) -> None:
                        raise KeyboardInterrupt

                with pytest.raises(KeyboardInterrupt):
                    judge(prompts, responses, ledger, Killed())
                if forget:
                    ledger._write("DELETE FROM batches", ())
            verdicts = ask(judge, folder, prompts, responses)
            assert [v.score for v in verdicts] == right(judge, prompts, responses)
            assert server.stats()["batches"] == 1


def test_failed_questions_of_a_batch_are_asked_again_by_a_rerun(tmp_path: Path) -> None:
    prompts, responses = rows(10)
    with judge_server(hopeless=1.0) as server:
        judge = judge_of(server, batch=True, batch_poll=0.1)
        assert all(v.score is None for v in ask(judge, tmp_path, prompts, responses))
        server.change(hopeless=0.0)
        assert [v.score for v in ask(judge, tmp_path, prompts, responses)] == right(judge, prompts, responses)
        assert server.stats()["batches"] == 2


def test_a_batch_the_server_has_forgotten_is_submitted_again(tmp_path: Path) -> None:
    prompts, responses = rows(10)
    with judge_server() as server, Ledger(tmp_path / "ledger.sqlite", "run") as ledger:
        judge = judge_of(server, batch=True, batch_poll=0.1)
        questions = [q for some in judge.make_questions(prompts, responses) for q in some]
        ledger.remember_batch(server.base_url, "batch_gone", questions)
        report = Report()
        assert [v.score for v in judge(prompts, responses, ledger, report)] == right(judge, prompts, responses)
        assert any("batch_gone is no longer known there" in note for note in report.notes)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": 1' + b"0" * 30 + b"}}",
        b'{"choices": [{"message": "7"}]}',
        b'{"choices": [{"message": {"content": ["7"]}}]}',
        b"null",
        b"",
    ],
)
def test_odd_bodies_do_no_harm(body: bytes, tmp_path: Path) -> None:
    judge = OpenAI(model="judge")
    prompts, responses = rows(1)
    question = judge.make_questions(prompts, responses)[0][0]
    answer = judge.endpoint.read(body, question)
    assert answer.value == (7.0 if b"usage" in body else None)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.record(question, answer)


def test_lines_that_failed_in_a_batch_have_no_score(tmp_path: Path) -> None:
    prompts, responses = rows(60)
    with judge_server(faults={"500": 0.2, "refusal": 0.2}) as server:
        judge = judge_of(server, batch=True, batch_poll=0.1)
        verdicts = ask(judge, tmp_path, prompts, responses)
        truth = right(judge, prompts, responses)
        missing = [v for v in verdicts if v.score is None]
        assert all(v.score in (None, t) for v, t in zip(verdicts, truth, strict=True))
        assert 5 < len(missing) < 50
        assert Counter(v.reason.split(":")[0] for v in missing).keys() <= {"HTTP 500", "no number in the reply"}


def test_a_flaky_batch_api_submits_nothing_twice(tmp_path: Path) -> None:
    prompts, responses = rows(30)
    with judge_server(api_faults=0.3, seed=3) as server:
        judge = judge_of(server, batch=True, batch_poll=0.05)
        verdicts = ask(judge, tmp_path, prompts, responses)
        assert [v.score for v in verdicts] == right(judge, prompts, responses)
        assert server.stats()["batches"] == 1


def test_the_ledger_holds_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if the server repeats the key in an error."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompts, responses = rows(8, text=f"my key is {KEY}")
    with judge_server(key="sk-other") as server, pytest.raises(JudgeError) as caught:
        ask(judge_of(server), tmp_path, prompts[:4], responses[:4])
    assert KEY not in str(caught.value)
    raw = json.dumps({"choices": [{"message": {"content": f"Your key {KEY} is nice"}, "finish_reason": "stop"}]})
    judge = OpenAI(model="judge")
    question = judge.make_questions(prompts, responses)[0][0]
    answer = judge.endpoint.read(raw.encode(), question)
    assert answer.value is None
    assert answer.reply == "Your key [key] is nice"
    assert b"sk-planted" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
