"""Whole runs with a judge by API: killed in the middle, side by side, and with a key that must be found nowhere."""

import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from dnpo.judges.asked.ledger import Ledger
from tests.commands import SMOKE, TINY, Process, succeed, summary
from tests.judge_server import Handle, judge_server

pytestmark = pytest.mark.long
SMALL = (*SMOKE, *TINY)
SECRET = "sk-planted-0f9b2c7d41e8a653"


def judge(server: Handle, *more: str) -> list[str]:
    return ["judge=openai", "judge.model=judge", f"judge.base_url={server.base_url}", "judge.concurrency=4", *more]


def keys(path: Path) -> set[str]:
    with sqlite3.connect(path) as db:
        return {row[0] for row in db.execute("SELECT key FROM calls")}


def test_a_run_killed_repeatedly_while_judging_asks_nothing_twice(tmp_path: Path) -> None:
    """Answers in the ledger survive a kill; only answers to calls in flight are lost."""
    draw, unread, late = random.Random(0), 0, 0
    path = tmp_path / "ledger.sqlite"
    with judge_server(latency=0.1) as server:
        succeed(tmp_path, *SMALL, "judge=off", "method=spin", "iterations=1")  # the stages before the judge
        for _ in range(2):
            before = server.stats()["attempts"]
            process = Process(tmp_path, *SMALL, *judge(server))
            while server.stats()["attempts"] < before + 6:  # the canary and then questions in earnest
                assert process.returncode is None, process.communicate(timeout=60)
                time.sleep(0.1)
            time.sleep(draw.uniform(0.1, 0.5))
            now = time.time()
            process.signal_group(signal.SIGKILL)
            process.communicate(timeout=60)
            time.sleep(0.4)  # the server has finished its requests
            answered = [line for line in server.requests() if line["fault"] == "ok" and not line["cut"]]
            missing = len(answered) - unread - len(keys(path))
            assert 0 <= missing <= 4
            unread += missing
            late += min(missing, sum(line["time"] > now for line in answered))
        server.change(latency=0.0)
        succeed(tmp_path, *SMALL, *judge(server))
        table = summary(tmp_path)["table"]
        assert table[-1]["pairs/unscored"] == 0
        stats = server.stats()
        # every recorded answer was given once
        assert stats["delivered"] - len(keys(path)) == unread
        assert stats["paid_twice"] <= unread
        print(f"{stats['answered']} answers; {unread} replies were not read at two kills, {late} of them sent after it")


def test_two_sweeps_at_once_ask_each_question_once(tmp_path: Path) -> None:
    """Their stores share only the ledger, and both have the same questions at the same time."""
    with judge_server(latency=0.05) as server:
        sweep = ["-m", *SMALL, *judge(server), "iterations=1", "acts_from=0", "seed=0,1", "data.seed=0"]
        ledger = tmp_path / "ledger.sqlite"
        both = [
            Process(tmp_path, *sweep, f"store=store-{n}", f"ledger={ledger}", f"hydra.sweep.dir=sweep-{n}")
            for n in ("a", "b")
        ]
        for process in both:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, out + err
        stats = server.stats()
        assert stats["paid_twice"] == 0
        assert stats["answered"] == stats["attempts"] == len(keys(ledger))
        tables = [summary(tmp_path, f"sweep-{n}/1/summary.json")["table"] for n in ("a", "b")]
        assert [row["eval/score"] for row in tables[0]] == [row["eval/score"] for row in tables[1]]
        with Ledger(ledger) as book:
            assert sum(row["hits"] for row in book.rows()) >= stats["answered"] - 8  # less the canaries


def test_a_run_leaves_its_key_nowhere(migrated: Path, tmp_path: Path) -> None:
    """Neither after a good run nor after one with a wrong key, with logs at the most detailed level."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    with judge_server(key=SECRET) as server:
        loud = {"OPENAI_LOG": "debug", "HTTPX_LOG_LEVEL": "trace"}
        command = ["scale=smoke", *TINY, *judge(server, "judge.key_from=MY_KEY")]
        # processes into which openai has not been imported yet, so that it reads these variables
        right = Process(tmp_path, *command, "iterations=2", "hydra.verbose=true", MY_KEY=SECRET, **loud)
        printed = [*right.communicate(timeout=300)]
        assert right.returncode == 0, printed
        (log,) = tmp_path.rglob("*.log")
        logged = log.read_text()
        assert all(f"[{name}][DEBUG]" in logged for name in ("openai._base_client", "httpcore2.http11"))
        wrong = Process(tmp_path, *command, "seed=3", MY_KEY=f"{SECRET}-wrong", **loud)
        printed += wrong.communicate(timeout=300)
        assert wrong.returncode == 1
        assert "MY_KEY" in printed[3]
        assert "Traceback" not in printed[3]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"ledger.sqlite", "mlflow.db", "summary.json"} <= {path.name for path in files}
    holding = [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not holding
    assert SECRET not in "".join(printed)


def test_a_plan_counts_new_questions_and_sends_nothing(tmp_path: Path) -> None:
    with judge_server() as server:
        table = tmp_path / "prices.yaml"
        table.write_text("judge: {input: 1.0, output: 1.0}\n")
        command = [*SMALL, *judge(server, f"judge.prices={table}"), "iterations=2"]
        before = succeed(tmp_path, *command, "plan=true")
        assert server.stats()["attempts"] == 0
        assert not (tmp_path / "ledger.sqlite").exists()
        succeed(tmp_path, *command)
        asked = server.stats()["answered"]
        forecast = next(line for line in before.splitlines() if line.startswith("all "))
        calls, new, cost = forecast.split()[1:]
        assert calls == new
        assert 0.8 * int(new) <= asked <= int(new) + 1  # equal samples are asked once; plus the canary
        with Ledger(tmp_path / "ledger.sqlite") as book:
            (row,) = book.rows()
            assert row["cost"] <= float(cost) + 0.01
        again = succeed(tmp_path, *command, "store=elsewhere", "plan=true")
        planned = next(line for line in again.splitlines() if line.startswith("all ")).split()
        assert int(planned[2]) < int(new)  # the human responses are known
        assert server.stats()["answered"] == asked


def test_a_judge_that_fails_too_often_ends_the_run_and_a_rerun_completes_it(tmp_path: Path) -> None:
    with judge_server() as server:
        command = [*SMALL, *judge(server, "judge.max_replies=1"), "iterations=2"]
        process = Process(tmp_path, *command)
        while not server.stats()["attempts"]:  # the canary, whose text is new every time, has to succeed
            assert process.returncode is None, process.communicate(timeout=60)[1]
            time.sleep(0.02)
        server.change(hopeless=0.2)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "judge.max_unscored=0.02" in err
        assert "Traceback" not in err
        server.change(hopeless=0.0)
        known = len(keys(tmp_path / "ledger.sqlite"))
        assert known > 0
        succeed(tmp_path, *command)
        assert server.stats()["paid_twice"] == 0
