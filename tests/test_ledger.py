"""The ledger: nothing is asked twice or lost, with other writers and for every end of a process."""

import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dnpo.errors import LedgerError
from dnpo.judges.asked.ledger import VERSION, Answer, Ledger, Question, sum_by
from tests.commands import run_command


def question(name: str = "a", **changes: str) -> Question:
    """A question with this text."""
    given = Question.make("judge", "model", "template-1/abc", "", [{"role": "user", "content": name}])
    return replace(given, **changes)


def ledger_at(folder: Path, run: str = "run") -> Ledger:
    return Ledger(folder / "ledger.sqlite", run)


HEAD = """
import os, sys, time
from pathlib import Path
from dnpo.judges.asked.ledger import Answer, Ledger, Question
def question(name):
    return Question.make("judge", "model", "template-1/abc", "", [{"role": "user", "content": name}])
ledger = Ledger(Path(sys.argv[1]), sys.argv[2])
"""


def start(code: str, folder: Path, run: str = "other") -> "subprocess.Popen[str]":
    """A process with its own ledger on the same file; it prints lines, and continues when it reads a line."""
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + code, str(folder / "ledger.sqlite"), run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: "subprocess.Popen[str]") -> list[str]:
    """Let it continue, and return its remaining lines."""
    out, _ = process.communicate("go\n", timeout=60)
    assert process.returncode == 0
    return out.splitlines()


# --- keys


def test_a_question_has_the_same_key_in_every_process(tmp_path: Path) -> None:
    code = "print(question('Is 7 > 6? é 数').key)"
    assert end(start(code, tmp_path)) == end(start(code, tmp_path)) == [question("Is 7 > 6? é 数").key]
    # fixed here, so that a change of the key's contents fails: it would ask everything again
    assert question().key == "a79a84ed0196a3fe4b628fd362e7f19afdd666bb82b0d94ee124b3a514a1e94c"


@pytest.mark.parametrize("name", ["judge", "model", "template", "order", "content"])
def test_every_field_changes_the_key(name: str) -> None:
    assert question(**{name: "other"}).key != question().key


def test_fields_of_a_key_are_separated() -> None:
    assert question(judge="ab", model="c").key != question(judge="a", model="bc").key
    assert question(template="x", order="").key != question(template="", order="x").key


def test_text_and_division_of_messages_change_the_key() -> None:
    def key(*messages: tuple[str, str]) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return Question.make("judge", "model", "t", "", turns).key

    keys = [
        key(("user", "ab")),
        key(("user", "ab ")),
        key(("system", "ab")),
        key(("user", "a"), ("user", "b")),
        key(("user", "b"), ("user", "a")),
        key(("user", "")),
        key(),
    ]
    assert len(set(keys)) == len(keys)
    assert Question.make("j", "m", "t", "", [{"content": "x", "role": "user"}]).key == (
        Question.make("j", "m", "t", "", [{"role": "user", "content": "x"}]).key
    )


# --- answers


def test_answers_come_back_in_chunks_of_any_size(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        asked = [question(str(n)) for n in range(1203)]
        for n, q in enumerate(asked):
            if n % 3:
                ledger.record(q, Answer(float(n % 101)))
        found = ledger.answers([q.key for q in asked])
        assert found == {q.key: float(n % 101) for n, q in enumerate(asked) if n % 3}
        assert ledger.answers([]) == {}
        assert ledger.answers([asked[1].key] * 1001) == {asked[1].key: 1.0}


def test_an_answer_is_kept_unchanged(tmp_path: Path) -> None:
    answer = Answer(83.5, 'Score: "83"\0 é 数', 120, 3, 0.00125, 0.75, 4)
    with ledger_at(tmp_path) as ledger:
        ledger.record(question(), answer)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.row_factory = sqlite3.Row
        row = dict(db.execute("SELECT * FROM calls").fetchone())
    assert {k: row[k] for k in ("value", "reply", "tokens_in", "tokens_out", "cost", "latency", "attempts")} == {
        **{"value": 83.5, "reply": answer.reply, "tokens_in": 120, "tokens_out": 3},
        **{"cost": 0.00125, "latency": 0.75, "attempts": 4},
    }
    assert (row["key"], row["judge"], row["model"], row["run"]) == (question().key, "judge", "model", "run")


def test_the_first_answer_is_kept(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        ledger.record(question(), Answer(10.0, cost=0.5))
        ledger.record(question(), Answer(90.0, cost=0.5))
        assert ledger.answers([question().key]) == {question().key: 10.0}


def test_a_reply_that_utf8_cannot_spell_does_not_cost_the_answer(tmp_path: Path) -> None:
    """A server may cut a reply in the middle of a surrogate pair."""
    half = json.loads('"83 \\ud83d"')
    with ledger_at(tmp_path) as ledger:
        ledger.record(question("a"), Answer(83.0, half))
        ledger.record(question("b"), Answer(None, half, reason=half))
        assert ledger.answers([question("a").key, question("b").key]) == {question("a").key: 83.0}


def test_an_answer_without_a_number_is_no_answer_and_no_secret(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        with pytest.raises(sqlite3.IntegrityError):
            ledger.record(question(), Answer(float("nan")))
        assert ledger.answers([question().key]) == {}
        ledger.record(question(), Answer(1.0))  # the transaction is over
        assert ledger.answers([question().key]) == {question().key: 1.0}


def test_failures_are_not_answers_but_cost(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        ledger.note_cost(question(), Answer(None, "maybe 5 or 6", 100, 9, 0.25, reason="two numbers"))
        ledger.record(question(), Answer(None, "maybe", 100, 1, 0.5, reason="no number"))
        ledger.record(question("unpriced"), Answer(None, cost=None))
        assert ledger.answers([question().key]) == {}
        assert ledger.claim([question().key])[0] == [question().key]
        assert ledger.sum_costs() == pytest.approx(0.75)
        assert ledger.cost_of(question().key) == 0.0
        ledger.record(question(), Answer(7.0, cost=0.125))
        assert ledger.sum_costs() == pytest.approx(0.875)
        assert ledger.cost_of(question().key) == 0.125
        (row,) = ledger.rows()
        assert (row["calls"], row["failed"], row["unpriced"], row["tokens_in"], row["tokens_out"]) == (1, 3, 1, 200, 10)


def test_costs_are_counted_by_run(tmp_path: Path) -> None:
    with ledger_at(tmp_path, "one") as one, ledger_at(tmp_path, "two") as two, ledger_at(tmp_path, "one") as again:
        one.record(question("a"), Answer(1.0, cost=1.0))
        two.record(question("b"), Answer(1.0, cost=2.0))
        again.record(question("c"), Answer(None, cost=4.0))
        two.record(question("d"), Answer(1.0, cost=None))
        assert (one.sum_costs(), again.sum_costs(), two.sum_costs()) == (5.0, 5.0, 2.0)
        assert Ledger(one.path, "three").sum_costs() == 0.0


def test_looking_up_leaves_no_file_behind(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "folder" / "ledger.sqlite")
    assert ledger.answers([question().key]) == {}
    ledger.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_ledger_opens_again(tmp_path: Path) -> None:
    ledger = ledger_at(tmp_path)
    ledger.close()
    for n in range(3):
        assert ledger.claim([question(str(n)).key])[0]
        ledger.record(question(str(n)), Answer(float(n)))
        ledger.close()
        ledger.close()
    assert len(ledger.answers([question(str(n)).key for n in range(3)])) == 3
    ledger.close()


# --- claims


def test_claims_within_a_process(tmp_path: Path) -> None:
    keys = [question(name).key for name in "abcd"]
    with ledger_at(tmp_path) as one, ledger_at(tmp_path) as two:
        two.record(question("d"), Answer(4.0))
        assert one.claim(keys[:2]) == (keys[:2], [], [])
        assert one.claim(keys[:2]) == (keys[:2], [], [])  # its own claims remain
        assert two.claim(keys) == ([keys[2]], [keys[3]], keys[:2])
        one.record(question("a"), Answer(1.0))
        one.record(question("b"), Answer(None, reason="refused"))
        assert two.claim(keys[:2]) == ([keys[1]], [keys[0]], [])
        assert one.claim([keys[1]]) == ([], [], [keys[1]])
        one.release([keys[1], keys[2]])  # not its own claims
        assert one.claim(keys[1:3]) == ([], [], keys[1:3])
        two.release([keys[1]])
        assert one.claim(keys[1:3]) == ([keys[1]], [], [keys[2]])
        assert one.claim([]) == ([], [], [])


def test_closing_releases_claims(tmp_path: Path) -> None:
    keys = [question(name).key for name in "ab"]
    with ledger_at(tmp_path) as one, ledger_at(tmp_path) as two:
        one.claim(keys)
        assert two.claim(keys) == ([], [], keys)
        one.close()
        assert two.claim(keys) == (keys, [], [])
        assert one.claim(keys) == ([], [], keys)
    assert list((tmp_path / "ledger.sqlite.claims").glob("*.lock")) == []


def test_claims_of_one_ledger_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "ledger.sqlite")
    with ledger_at(tmp_path) as one, Ledger(tmp_path / "elsewhere" / "link") as two:
        assert one.claim(["k"]) == (["k"], [], [])
        assert two.claim(["k"]) == ([], [], ["k"])


CLAIM = """
print(len(ledger.claim([question("a").key, question("b").key])[0]), flush=True)
sys.stdin.readline()
ledger.close()
"""


def test_a_living_process_keeps_its_claims_and_can_release_them(tmp_path: Path) -> None:
    keys = [question(name).key for name in "ab"]
    other = start(CLAIM, tmp_path)
    assert said(other) == "2"
    with ledger_at(tmp_path) as ledger:
        for _ in range(3):
            assert ledger.claim(keys) == ([], [], keys)
        end(other)
        assert ledger.claim(keys) == (keys, [], [])


def test_a_process_that_was_killed_loses_its_claims_at_once(tmp_path: Path) -> None:
    keys = [question(name).key for name in "ab"]
    other = start(CLAIM, tmp_path)
    assert said(other) == "2"
    with ledger_at(tmp_path) as ledger, ledger_at(tmp_path) as third:
        assert ledger.claim(keys) == ([], [], keys)
        other.kill()
        other.communicate()
        assert ledger.claim(keys[:1]) == (keys[:1], [], [])
        # both see that it is dead, in any order
        assert third.claim(keys) == (keys[1:], [], keys[:1])


def test_a_stopped_process_does_not_count_as_dead(tmp_path: Path) -> None:
    other = start(CLAIM, tmp_path)
    assert said(other) == "2"
    os.kill(other.pid, signal.SIGSTOP)
    try:
        with ledger_at(tmp_path) as ledger:
            assert ledger.claim([question("a").key]) == ([], [], [question("a").key])
    finally:
        os.kill(other.pid, signal.SIGCONT)
        end(other)


SHARE = """
import random
names = [str(n) for n in range(300)]
random.Random(sys.argv[2]).shuffle(names)
keys = {question(name).key: name for name in names}
print("ready", flush=True)
sys.stdin.readline()
asked, left = [], list(keys)
while left:
    some = [left.pop() for _ in range(min(7, len(left)))]
    mine, answered, others = ledger.claim(some)
    asked += mine
    for key in mine:
        if random.random() < 0.1:
            time.sleep(0.002)
        ledger.record(question(keys[key]), Answer(float(keys[key]) % 101, cost=1.0))
    left = others + left
    if others and not mine:
        time.sleep(0.01)
assert len(ledger.answers(list(keys))) == 300
print(" ".join(keys[key] for key in asked))
ledger.close()
"""


def test_four_processes_ask_every_question_once(tmp_path: Path) -> None:
    processes = [start(SHARE, tmp_path, f"run {n}") for n in range(4)]
    assert [said(process) for process in processes] == ["ready"] * 4
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    shares = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    counts = Counter(name for share in shares for name in share)
    assert counts == {str(n): 1 for n in range(300)}
    assert sum(bool(share) for share in shares) > 1, "nothing was shared, so nothing was tested"
    with ledger_at(tmp_path) as ledger:
        assert sum(row["calls"] for row in ledger.rows()) == 300
        assert [Ledger(ledger.path, f"run {n}").sum_costs() for n in range(4)] == [len(share) for share in shares]


DIE = """
n = 0
while True:
    mine, _, _ = ledger.claim([question(str(n)).key])
    if mine:
        ledger.record(question(mine and str(n)), Answer(float(n % 101), cost=1.0))
        print(n, flush=True)
    n += 1
"""


def test_recorded_answers_survive_a_kill(tmp_path: Path) -> None:
    """Every answer that a killed process reported is in the ledger, and all its claims are released."""
    told: set[int] = set()
    for delay in (0.02, 0.05, 0.1):
        process = start(DIE, tmp_path)
        told.add(int(said(process)))
        time.sleep(delay)
        process.kill()
        # print writes a number and its newline separately, so a line can be empty
        rest = process.communicate()[0].splitlines(keepends=True)
        told |= {int(line) for line in rest if line.endswith("\n") and line.strip()}
        with ledger_at(tmp_path, "reader") as ledger:
            keys = {question(str(n)).key: float(n % 101) for n in range(max(told) + 1)}
            assert ledger.answers(list(keys)) == keys
            unheard = question(str(max(told) + 1)).key
            mine, _, others = ledger.claim([unheard])
            assert others == []
            ledger.release(mine)
    assert len(told) > 3
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- the file

OPEN = """
print("ready", flush=True)
sys.stdin.readline()
ledger.record(question(sys.argv[2]), Answer(1.0))
ledger.close()
"""


def test_six_processes_open_a_fresh_file_at_once(tmp_path: Path) -> None:
    processes = [start(OPEN, tmp_path, str(n)) for n in range(6)]
    assert [said(process) for process in processes] == ["ready"] * 6
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    with ledger_at(tmp_path) as ledger:
        assert len(ledger.answers([question(str(n)).key for n in range(6)])) == 6


def test_another_format_is_refused(tmp_path: Path) -> None:
    ledger_at(tmp_path).sum_costs()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute(f"PRAGMA user_version={VERSION + 1}")
    with pytest.raises(LedgerError, match=rf"ledger=.*has format {VERSION + 1}.* reads {VERSION}; give another file"):
        ledger_at(tmp_path).sum_costs()


@pytest.mark.parametrize("content", [b"this is a text, and a rather long one. " * 40, b"PK\x03\x04" + bytes(2000)])
def test_a_file_that_is_not_a_database_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(content)
    look_up, claim = (lambda ledger: ledger.answers(["k"])), (lambda ledger: ledger.claim(["k"]))
    for use in (Ledger.sum_costs, Ledger.rows, look_up, claim):
        with pytest.raises(LedgerError, match=r"ledger=.*cannot be opened .*expected a SQLite file"):
            use(ledger_at(tmp_path))
    assert (tmp_path / "ledger.sqlite").read_bytes() == content


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("CREATE TABLE experiments (id INTEGER)")
    before = (tmp_path / "ledger.sqlite").read_bytes()
    with pytest.raises(LedgerError, match="another program"):
        ledger_at(tmp_path).record(question(), Answer(1.0))
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


def test_an_empty_file_is_a_fresh_ledger(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").touch()
    with ledger_at(tmp_path) as ledger:
        ledger.record(question(), Answer(1.0))
        assert ledger.answers([question().key])


def test_a_path_where_no_folder_can_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for use in (Ledger.sum_costs, lambda ledger: ledger.claim(["k"])):
        with pytest.raises(LedgerError, match=r"ledger=.*cannot be opened"):
            use(Ledger(tmp_path / "file" / "ledger.sqlite"))
    with pytest.raises(LedgerError, match=r"ledger=.*cannot be opened"):
        Ledger(tmp_path).sum_costs()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user can write everywhere")
    try:
        with pytest.raises(LedgerError, match=r"ledger=.*cannot be opened"):
            ledger_at(tmp_path).record(question(), Answer(1.0))
    finally:
        tmp_path.chmod(0o700)


def test_a_file_that_cannot_be_written_can_be_read(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        ledger.record(question(), Answer(1.0))
    (tmp_path / "ledger.sqlite").chmod(0o400)
    if os.access(tmp_path / "ledger.sqlite", os.W_OK):
        pytest.skip("this user can write everywhere")
    with ledger_at(tmp_path) as ledger:
        assert ledger.answers([question().key]) == {question().key: 1.0}
        with pytest.raises(LedgerError, match=r"ledger=.*readonly"):
            ledger.record(question("b"), Answer(1.0))
        with pytest.raises(LedgerError, match=r"ledger=.*readonly"):
            ledger.claim([question("b").key])


def test_damage_gives_a_message(tmp_path: Path) -> None:
    """An SQLite error in the middle of a run names the file, and the transaction is over."""
    with ledger_at(tmp_path) as ledger:
        ledger.record(question(), Answer(1.0))
        with sqlite3.connect(ledger.path) as db:
            db.execute("DROP TABLE claims")
        with pytest.raises(LedgerError, match=r"ledger=.*no such table: claims.*run the same command again"):
            ledger.record(question("b"), Answer(1.0))
        assert ledger.answers([question("a").key, question("b").key]) == {question("a").key: 1.0}


def test_a_locked_file_gives_a_message(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        ledger._db.execute("PRAGMA busy_timeout=50")
        holder = sqlite3.connect(ledger.path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match=r"ledger=.*locked"):
            ledger.record(question(), Answer(1.0))
        assert ledger.answers([question().key]) == {}  # readers do not wait for writers
        holder.execute("COMMIT")
        holder.close()
        ledger.record(question(), Answer(1.0))


def test_a_ledger_that_can_no_longer_write_still_closes(tmp_path: Path) -> None:
    one, two = ledger_at(tmp_path), ledger_at(tmp_path)
    one.claim(["k"])
    one._db.execute("PRAGMA query_only=1")
    one.close()
    assert two.claim(["k"]) == (["k"], [], [])
    two.close()


def test_an_interrupted_transaction_leaves_nothing(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:

        def interrupted() -> None:
            with ledger._transaction():
                ledger._failure(question(), Answer(None, cost=1.0), "2026-01-01")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert ledger.sum_costs() == 0.0


# --- ceilings

PACE = """
clock, read = time.time, []
def time_as_the_ledger_reads_it():
    read.append(clock())
    return read[-1]
time.time = time_as_the_ledger_reads_it
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    wait = ledger.slot("endpoint", 0.05, 0.02)
    print(read[-1] + wait)
ledger.close()
"""


def test_two_processes_keep_one_ceiling(tmp_path: Path) -> None:
    """By the reserved times, no window exceeds the ceiling of 20 in a second."""
    processes = [start(PACE, tmp_path, str(n)) for n in range(2)]
    assert [said(process) for process in processes] == ["ready"] * 2
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    times = sorted(float(at) for process in processes for at in process.communicate(timeout=60)[0].split())
    assert len(times) == 120
    for begin in times:
        assert sum(begin <= at < begin + 1.0 - 1e-5 for at in times) <= 20
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.05 - 1e-5
    assert times[-1] - times[0] < 119 * 0.05 + 5.0  # and not slower than necessary


def test_the_tighter_ceiling_decides(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        waits = [ledger.slot("a", 0.5, seconds) for seconds in (2.0, 0.1, 0.0, 0.0)]
        assert waits == pytest.approx([0.0, 2.0, 2.5, 3.0], abs=0.1)
        assert ledger.slot("b", 0.5, 2.0) == 0.0  # another endpoint has another row


def test_an_idle_endpoint_accumulates_no_allowance(tmp_path: Path) -> None:
    with ledger_at(tmp_path) as ledger:
        ledger.slot("a", 0.05, 0.0)
        time.sleep(0.3)
        assert [ledger.slot("a", 0.05, 0.0) > 0.0 for _ in range(3)] == [False, True, True]


# --- batches


def test_batches_are_kept_until_they_are_collected(tmp_path: Path) -> None:
    some = [question("a"), question("b", order="ba")]
    with ledger_at(tmp_path) as ledger:
        assert ledger.batches("e") == {}
        ledger.remember_batch("e", "batch-1", some)
        ledger.remember_batch("e", "batch-2", [question("c")])
        ledger.remember_batch("f", "batch-1", [question("d")])
    with ledger_at(tmp_path, "another run") as ledger:
        found = ledger.batches("e")
        assert found == {"batch-1": some, "batch-2": [question("c")]}
        assert [q.key for q in found["batch-1"]] == [q.key for q in some]
        assert found["batch-1"][0].messages == []
        assert not ledger.was_collected("e", "batch-1")
        ledger.forget_batch("e", "batch-1")
        assert set(ledger.batches("e")) == {"batch-2"}
        assert set(ledger.batches("f")) == {"batch-1"}
        collected = [ledger.was_collected(*batch) for batch in (("e", "batch-1"), ("e", "batch-2"), ("f", "batch-1"))]
        assert collected == [True, False, False]
        assert not ledger.was_collected("e", "unknown")
        ledger.forget_batch("e", "unknown")
        ledger.remember_batch("e", "batch-1", some)
        assert set(ledger.batches("e")) == {"batch-1", "batch-2"}


# --- reading


def filled(folder: Path) -> Ledger:
    """Two judges, two runs, failures, hits and a call without a price."""
    one, two = ledger_at(folder, "one"), ledger_at(folder, "two")
    one.record(question("a"), Answer(1.0, tokens_in=100, tokens_out=2, cost=0.25))
    one.record(question("b"), Answer(2.0, tokens_in=50, tokens_out=1, cost=None))
    one.record(question("c"), Answer(None, tokens_in=10, tokens_out=5, cost=0.5, reason="no number"))
    two.record(question("d", judge="other"), Answer(3.0, tokens_in=1000, tokens_out=3, cost=2.0))
    two.hit(question("a"), 1500)
    two.hit(question("b"), 2)
    one.close()
    return two


def test_rows_count_calls_failures_and_hits(tmp_path: Path) -> None:
    with filled(tmp_path) as ledger:
        rows = ledger.rows()
        month = time.strftime("%Y-%m", time.gmtime())
        names = ("judge", "run", "calls", "failed", "hits", "tokens_in", "tokens_out", "cost", "unpriced")
        assert [tuple(row[name] for name in names) for row in rows] == [
            ("judge", "one", 2, 1, 0, 160, 8, 0.75, 1),
            ("judge", "two", 0, 0, 1502, 0, 0, 0.0, 0),
            ("other", "two", 1, 0, 0, 1000, 3, 2.0, 0),
        ]
        assert {(row["model"], row["month"]) for row in rows} == {("model", month)}


def test_rows_add_up() -> None:
    counted = ("calls", "failed", "hits", "tokens_in", "tokens_out", "cost", "unpriced")

    def row(judge: str, run: str, value: float) -> dict[str, Any]:
        return {"judge": judge, "model": "m", "run": run, "month": "x", **dict.fromkeys(counted, value)}

    rows = [row("a", "1", 1), row("b", "1", 10), row("a", "2", 100)]
    assert sum_by(rows, "judge") == [
        {"judge": "a", **dict.fromkeys(counted, 101)},
        {"judge": "b", **dict.fromkeys(counted, 10)},
    ]
    assert sum_by(rows) == [dict.fromkeys(counted, 111)]
    assert len(sum_by(rows, "judge", "run")) == 3
    assert sum_by([]) == []
    assert rows[0]["calls"] == 1


def shown(*arguments: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return run_command(cwd, "dnpo.ledger", *arguments)


def test_the_command_prints_the_tables(tmp_path: Path) -> None:
    filled(tmp_path).close()
    result = shown(cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["judge", "model", "2", "1", "1,502", "160", "8", "0.7500+"] in lines
    assert ["other", "model", "1", "0", "0", "1,000", "3", "2.0000"] in lines
    assert ["two", "1", "0", "1,502", "1,000", "3", "2.0000"] in lines
    assert sum(line[:1] == ["all"] for line in lines) == 3
    assert "+: and calls without a known price." in result.stdout
    assert ["all", "3", "1", "1,502", "1,160", "11", "2.7500+"] in lines
    assert shown("ledger.sqlite", cwd=tmp_path).stdout == result.stdout


def test_the_command_on_an_empty_ledger(tmp_path: Path) -> None:
    ledger_at(tmp_path).sum_costs()
    result = shown(cwd=tmp_path)
    assert result.returncode == 0
    assert "all" not in result.stdout.split()


def test_the_command_names_errors(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no ledger " * 100)
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE runs (id INTEGER)")
    before = (tmp_path / "other.db").read_bytes()
    for name, problem in (("nothing", "there is no such file"), ("text", "not a database"), ("other.db", "another")):
        result = shown(name, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ")
        assert problem in result.stderr
        assert name in result.stderr
        assert "Traceback" not in result.stderr
    assert (tmp_path / "other.db").read_bytes() == before
    assert not (tmp_path / "nothing").exists()


def test_the_command_before_any_judge_was_asked(tmp_path: Path) -> None:
    """A missing default file is no error and is not created; a given path must exist."""
    result = shown(cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "nothing yet" in result.stdout
    assert not list(tmp_path.iterdir())
    assert shown("ledger.sqlite", cwd=tmp_path).returncode == 1
