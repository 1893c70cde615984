"""judge=code: right answers in every form get points, cheats get none, and running answers are isolated."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dnpo.errors import JudgeError
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.exact.apart.form import find_fault
from dnpo.judges.exact.apart.isolation import claim_number
from dnpo.judges.exact.code import UnitTests
from dnpo.judges.exact.running import _TRY, Isolation, find_isolation, run_tests
from dnpo.records import HUMAN, Prompt, Response
from tests.conftest import verdicts

TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
GOOD = "def add(a, b):\n    return a + b"
LIMITS = UnitTests(timeout=5.0, memory_mb=256, file_mb=1).limits
WAYS: list[Isolation] = ["namespaces", "bubblewrap", "none"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Isolation:
    """Each isolation in which this machine can run answers."""
    found, why = find_isolation(request.param)
    if found is None and request.param != "none":
        pytest.skip(why)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def closed() -> Isolation:
    """The best isolation, if it is complete."""
    found, why = find_isolation("auto")
    if found is None:
        pytest.skip(why)
    return found


def run(text: str, tests: str = TESTS, how: Isolation | None = None, timeout: float = 10.0) -> tuple[bool, str]:
    ended = run_tests(text, tests, how or find_isolation("auto")[0] or "none", timeout, LIMITS, 4 << 20)
    return ended.passed, ended.reason


def cases(group: str) -> dict[str, tuple[str, str]]:
    """Responses and tests of a group in ``code_cases.txt``, by name."""
    text = (Path(__file__).parent / "code_cases.txt").read_text(encoding="utf-8")
    found = {}
    for part in text.split("#### case ")[1:]:
        head, _, body = part.partition("\n")
        kind, name = head.split(" | ")
        response, _, tests = body.rstrip("\n").partition("\n#### tests\n")
        if kind == group:
            found[name] = (response, tests or TESTS)
    return found


# --- right answers ----------------------------------------------------------------------------------------------------

WRONG_TESTS = {
    "def test_add():\n    assert add(1, 2) == 4": "AssertionError",
    "import unittest as u\nclass T(u.TestCase):\n    def test(self): self.assertEqual(add(1, 2), 4)": "AssertionError",
    "import sys\nadd(1, 2)\nsys.exit(1)": "status 1",
    "assert sub(1, 2) == 3": "NameError",
}


def test_right_answers_in_every_form() -> None:
    said = {name: run(*each) for name, each in cases("form").items()}
    said["windows"] = run(f"```python\n{GOOD}\n```".replace("\n", "\r\n"))
    assert said == dict.fromkeys(said, (True, ""))


def test_right_answers_to_every_kind_of_tests() -> None:
    programs = cases("program")
    assert {name: find_fault(tests) for name, (_, tests) in programs.items()} == dict.fromkeys(programs)
    assert {name: run(*each) for name, each in programs.items()} == dict.fromkeys(programs, (True, ""))


def test_wrong_answers_to_every_kind_of_tests() -> None:
    for tests, reason in WRONG_TESTS.items():
        passed, why = run(GOOD, tests)
        assert not passed
        assert reason in why


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def add(a, b):\n    return a - b", "AssertionError"),
        ("def add(a, b:", "SyntaxError"),
        ("I do not know.", "SyntaxError"),
        (f"x = bytearray(1 << 30)\n{GOOD}", "MemoryError"),
        (f"open('big', 'wb').write(b'x' * (2 << 20))\n{GOOD}", "File too large|SIGXFSZ"),
        (f"some = [open('/dev/null') for _ in range(100)]\n{GOOD}", "Too many open files"),
    ],
)
def test_wrong_answers(text: str, reason: str, way: Isolation) -> None:
    passed, why = run(text, how=way)
    assert not passed
    assert any(part in why for part in reason.split("|")), why


# --- cheats -----------------------------------------------------------------------------------------------------------


def test_cheats(way: Isolation) -> None:
    said = {name: run(*each, how=way) for name, each in cases("cheat").items()}
    assert [name for name, (passed, _) in said.items() if passed] == []
    assert [name for name, (_, reason) in said.items() if not reason] == []


def test_rough_cheats(closed: Isolation) -> None:
    said = {name: run(*each, how=closed, timeout=2.0) for name, each in cases("rough").items()}
    assert [name for name, (passed, _) in said.items() if passed] == []
    assert run(GOOD, how=closed) == (True, "")  # the machine still works


def test_an_endless_loop_ends(way: Isolation) -> None:
    began = time.monotonic()
    assert run("while True: pass", how=way, timeout=1.0) == (False, "not done after 1 s (judge.timeout)")
    assert time.monotonic() - began < 4


def test_no_process_is_left_running(closed: Isolation) -> None:
    """Processes that an answer starts are ended with it, even if they are in another session."""
    mark = f"left-{secrets.token_hex(4)}"  # a process's name has at most 15 characters
    left = f"import ctypes, os, time\nif os.fork() == 0:\n    os.setsid()\n    ctypes.CDLL(None).prctl(15, b'{mark}')\n"
    text = f"{left}    time.sleep(60)\ntime.sleep(0.5)\n{GOOD}"
    limits = {**LIMITS, "RLIMIT_NPROC": 10}
    assert run_tests(text, TESTS, closed, 10.0, limits, 4 << 20).passed
    for _ in range(100):
        if not any(mark in _name_of(process) for process in Path("/proc").glob("[0-9]*")):
            break
        time.sleep(0.02)
    else:
        pytest.fail("a child is still running")


def _name_of(process: Path) -> str:
    try:
        return (process / "comm").read_text()
    except OSError:
        return ""


# --- access ------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[int]:
    """A listening port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_no_network(closed: Isolation, server: int) -> None:
    call = f"import socket\ndef add(*a):\n    socket.create_connection(('127.0.0.1', {server}), 1)"
    passed, reason = run(call, "add()", closed)
    assert not passed
    assert "Network is unreachable" in reason or "Connection refused" in reason
    assert run(call, "add()", "none") == (True, "")  # otherwise this test could not fail


def test_private_files(closed: Isolation, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    looks = "import os\ndef sees(path): return os.path.exists(path)\n"
    looks += "def writes(path):\n    open(path, 'w').close()\n    return True"
    hidden = [str(tmp_path / "mine"), __file__, "/etc/passwd", f"/proc/{os.getpid()}", "/proc/self"]
    assert run(looks, f"assert not any(map(sees, {hidden}))", closed) == (True, "")
    for path in (f"{sys.base_prefix}/x", "/usr/x", f"{os.path.dirname(os.__file__)}/x"):
        passed, reason = run(looks, f"writes({path!r})", closed)
        assert not passed
        assert "Read-only" in reason or "Permission" in reason
    assert run(looks, "assert writes('x') and writes('/tmp/x')", closed) == (True, "")
    assert run(looks, f"assert all(map(sees, {hidden[:1]}))", "none") == (True, "")


# The isolations that a process with a key in its environment finds.
WITH_KEY = """
import json
from dnpo.judges.exact.running import find_isolation, run_tests
reads = '''
import os
def holds(text):
    for process in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                if text.encode() in file.read(): return True
        except OSError: pass
    return False
'''
found = {}
for way in ("namespaces", "bubblewrap", "none"):
    name, text = find_isolation(way)
    tests = "assert not holds('sk-' + 'secret')"
    found[way] = [name, text, name is not None and not run_tests(reads, tests, way, 20.0, {}, 1 << 24).passed]
print(json.dumps(found))
"""


def test_no_environment_with_a_key_can_be_read() -> None:
    """Neither that of the starting process nor those of others; if one can be read, no answer is run."""
    environment = {**os.environ, "SOME_API_KEY": "sk-secret"}
    done = subprocess.run([sys.executable, "-c", WITH_KEY], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert all(not seen for _, _, seen in found.values()), found
    name, text, _ = found["none"]
    assert name == "none" or "SOME_API_KEY" in text
    assert "sk-secret" not in done.stdout


def test_secrets_are_found_by_name() -> None:
    seen = subprocess.run(
        [sys.executable, "-I", "-c", f"{_TRY}\nprint(secrets())"],
        env={"SOME_API_KEY": "sk-1", "HF_TOKEN": "hf-1", "PLAIN": "sk-2"},
        capture_output=True,
        text=True,
    ).stdout
    assert "SOME_API_KEY" in seen
    assert "HF_TOKEN" in seen
    assert "PLAIN" not in seen
    assert "-1" not in seen


REFUSED = """
from dnpo.judges.exact.code import UnitTests
from dnpo.records import Prompt
prompt = Prompt("p", [], "", answer="assert add(1, 2) == 3")
for how in ("auto", "none"):
    judge = UnitTests(i_know_this_runs_code=True, isolation=how)
    print(judge.accepts([prompt]))
    print(judge.canary(None))
"""


def test_the_checks_report_the_protections_in_force(way: Isolation) -> None:
    if find_isolation(way)[0] is None:
        pytest.skip(find_isolation(way)[1])
    ledger = Ledger(Path("there-is-no-such-folder/ledger.sqlite"))
    trial = UnitTests(i_know_this_runs_code=True, isolation=way).canary(ledger)
    assert trial is not None
    assert trial.scored
    assert way in trial.text


def test_a_system_without_isolation_needs_a_setting() -> None:
    """Without namespaces and bubblewrap nothing runs unless the user allows it."""
    command = [sys.executable, "-c", REFUSED]
    if find_isolation("namespaces")[0]:
        unshare = shutil.which("unshare")
        if unshare is None:
            pytest.skip("unshare, which forbids namespaces in one, is not installed")
        forbid = "for kind in mnt user; do echo 0 > /proc/sys/user/max_${kind}_namespaces; done"
        command = [unshare, "--user", "--map-root-user", "/bin/sh", "-c", f'{forbid}; exec "$@"', "sh", *command]
    environment = {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "DNPO"))}
    done = subprocess.run(command, env={**environment, "PATH": "/nowhere"}, capture_output=True, text=True)
    refused, trial, *_ = done.stdout.splitlines() or [done.stderr, ""]
    assert "judge.isolation=auto" in refused
    assert "judge.isolation=none" in refused
    assert "bwrap is not installed" in refused
    assert "scored=False" in trial


# --- refusals --------------------------------------------------------------------------------------------------


def test_code_is_off_until_asked_for() -> None:
    prompt = Prompt("p", [], "", answer=TESTS)
    objection = UnitTests().accepts([prompt])
    assert objection is not None
    assert "judge.i_know_this_runs_code=true" in objection
    assert "closed off from files and network; if the system cannot do this, none is run" in objection
    open_to_all = UnitTests(isolation="none").accepts([prompt])
    assert open_to_all is not None
    assert "but not closed off from files and network (judge.isolation=none)" in open_to_all
    with pytest.raises(JudgeError, match="i_know_this_runs_code"):
        verdicts(UnitTests(), [prompt], [Response("p", HUMAN, GOOD, [1], 1, "eos")])


@pytest.mark.parametrize(
    ("tests", "fault"),
    [
        ("assert (", "not a Python program"),
        ("", "empty"),
        ("assert True", "would pass"),
        ("def check(candidate):\n    assert candidate(1) == 2", "check(NAME)"),
        ("assert len(sum(1, 2)) == 3", "would pass"),
        ("assert eval(f(1)) == 2", "eval"),
        ("import inspect\nassert inspect.getsource(f)", "inspect"),
        ("from unittest.mock import patch\nf()", "mock"),
        (
            "from sulotion import f\nassert f(1) == 2",
            "sulotion is not installed; if it is to be the answer, call",
        ),
        ("from .solution import f\nassert f(1) == 2", "a relative import is not possible"),
        ("import solution.parts\nassert solution.parts.f(1) == 2", "the answer is one module, solution"),
        ("import solution\nsolution.LIMIT = 3\nassert solution.f(1) == 2", "solution.LIMIT cannot be set"),
        ("import solution as s\nassert 'f' in dir(s)", "s is the answer, and only its names can be used (s.NAME)"),
        ("import sys\nsys.stdin = f", "sys.stdin"),
        ("import asyncio\nassert asyncio.run(f()) == 1", "asyncio"),
    ],
)
def test_tests_that_cannot_work_are_refused(tests: str, fault: str) -> None:
    judge = UnitTests(i_know_this_runs_code=True, isolation="none")
    objection = judge.accepts([Prompt("q", [], "", answer=TESTS), Prompt("row", [], "", answer=tests)])
    assert objection is not None
    assert "row" in objection
    assert fault in objection


OWN = "class Point:\n    def __init__(self, x): self.x = x\n    def __eq__(self, other): return True"
NAMED = "from collections import namedtuple\nPoint = namedtuple('Point', 'x')"


@pytest.mark.parametrize(
    "tests",
    [
        "assert Point(1) == Point(2)",
        "from solution import Point\np = Point(1)\nassert p != Point(2)",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(Point(1), Point(2))",
        "import solution\nassert [p for p in [solution.Point(1)] if p == solution.Point(1)]",
    ],
)
def test_tests_that_compare_objects_of_the_answer_are_refused(tests: str) -> None:
    """The answer would decide the comparison. If its class has plain values, the tests work."""
    judge = UnitTests(i_know_this_runs_code=True, isolation="auto" if find_isolation("auto")[0] else "none")
    objection = judge.accepts([Prompt("row", [], OWN, answer=tests)])
    if objection is not None and "isolation=none" in objection:
        pytest.skip(objection)
    assert objection is not None
    assert objection.startswith("the tests of row, line ")
    assert "the answer would decide; compare their attributes, or str() or repr()" in objection
    assert judge.accepts([Prompt("row", [], NAMED, answer=tests)]) is None
    assert judge.accepts([Prompt("row", [], "I do not know.", answer=tests)]) is None  # it tells nothing


def test_side_by_side() -> None:
    """Several answers run at once; the results have the order of the responses."""
    judge = UnitTests(i_know_this_runs_code=True, workers=3, isolation="auto" if find_isolation("auto")[0] else "none")
    objection = judge.accepts([Prompt("p", [], "", answer=TESTS)])
    if objection is not None:
        pytest.skip(objection)
    prompt = Prompt("p", [], "", answer=TESTS)
    texts = [GOOD, "def add(a, b): return 0", GOOD, ""]
    responses = [Response("p", f"policy@{i}", text, [1], 1, "eos") for i, text in enumerate(texts)]
    said = verdicts(judge, [prompt], responses)
    assert [v.score for v in said] == [100.0, 0.0, 100.0, 0.0]
    assert [v.source for v in said] == [r.source for r in responses]


def test_answers_that_run_at_once_have_different_users() -> None:
    claims = [claim_number(3) for _ in range(3)]
    assert sorted(number for number, _ in claims) == [0, 1, 2]
    with pytest.raises(OSError, match="all 3 user ids for answers are in use"):
        claim_number(3)
    number, claim = claims[1]
    claim.close()
    assert claim_number(3)[0] == number
