"""A judge that runs code: the code of a response, and the unit tests that are the prompt's answer.

They run in separate processes, which exchange plain values: the answer's process evaluates calls and returns values,
and the tests' process compares them. So an answer cannot see its tests, change their values, or decide what is equal.
:mod:`dnpo.judges.exact.apart.form` describes what tests can do; tests that cannot work in this way are refused by name.

Both processes have an empty environment, an empty folder to work in, limits on processor time, address space, files and
processes, and no capability. They run in a new session, which is killed as a whole at the end or after ``timeout``. If
the system allows it, they are in namespaces without the machine's network and processes, and in a read-only file system
that contains only Python. If dnpo runs as root, each process also gets a separate user. If the system forbids
namespaces but has bubblewrap, bubblewrap does the same. If neither works, nothing runs. With ``isolation=none`` there
are only limits: an answer can read the user's files, use the network and leave its session. Even then nothing runs if
the environment seems to contain a secret that an answer could read.

Starting and ending all this takes about 35 ms of processor time for each answer, twice as much as one bare process; a
call of an answer's function takes about 30 µs.
"""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dnpo.errors import JudgeError
from dnpo.judges import Canary
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.exact.answers import Checker
from dnpo.judges.exact.apart.form import find_comparison, find_fault
from dnpo.judges.exact.running import find_isolation, run_tests
from dnpo.records import Prompt, Response, Verdict
from dnpo.settings import Count, Positive, neutral
from dnpo.store import Report
from dnpo.threads import map_in_threads

TRIED = 8  # number of rows tried whose tests seem to compare objects of the answer
COMPARED = re.compile(r"the tests compare \(\w+\) a \S+ of the answer with a ")


@dataclass(frozen=True)
class UnitTests(Checker):
    """100 points if the response's code passes the tests in the prompt's answer; see the head of this file.

    The response's code is all its fenced blocks of Python, one after another; without a fence, it is the whole
    response, or its lines of code. A response that takes too long on a busy machine fails, so scores near the limits
    depend on the machine.

    Args:
        i_know_this_runs_code: must be true; otherwise nothing is run.
        isolation: ``namespaces``, ``bubblewrap``, ``auto`` for the first of these that works, or ``none``.
        timeout: seconds for one response with its tests, of wall-clock time and of processor time.
        memory_mb: address space of each process.
        file_mb: maximum size of a file; with isolation, all files that a response writes can have four times that size
            together.
        processes: maximum number of processes and threads, including the first. Without isolation, all processes of the
            user count, and root has no limit.
        workers: responses tested at once.
    """

    option: ClassVar[str] = "code"

    i_know_this_runs_code: bool = neutral(False)
    isolation: Literal["auto", "namespaces", "bubblewrap", "none"] = "auto"
    timeout: Positive = 10.0
    memory_mb: Count = 1024
    file_mb: Count = 16
    processes: Count = 1
    workers: Count = neutral(1)

    @property
    def expects(self) -> str:
        """A program with tests."""
        return "a Python program with tests"

    @property
    def limits(self) -> dict[str, int]:
        """The system's limits on a process, by their names in :mod:`resource`; sizes in bytes, time in seconds."""
        return {
            "RLIMIT_CPU": math.ceil(self.timeout),
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_FSIZE": self.file_mb << 20,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }

    def accepts(self, prompts: Sequence[Prompt]) -> str | None:
        """Accept if running code is allowed and isolated, and every answer is a program whose tests can work."""
        if not self.i_know_this_runs_code:
            return (
                "judge=code runs programs that a model wrote, with limits on time, memory, files and processes"
                + (
                    ", but not closed off from files and network (judge.isolation=none)"
                    if self.isolation == "none"
                    else ", and closed off from files and network; if the system cannot do this, none is run"
                )
                + ". Set judge.i_know_this_runs_code=true if that is what you want"
            )
        if sys.platform == "win32":
            return "judge=code needs the limits of a POSIX system; choose another judge"
        problem = super().accepts(prompts)
        if problem is not None:
            faults = ((p.id, find_fault(p.answer)) for p in prompts if p.answer is not None)
            first = next(((name, fault) for name, fault in faults if fault is not None), None)
            return problem if first is None else f"{problem}. The answer of {first[0]} {first[1]}"
        way, found = find_isolation(self.isolation)
        return self._find_own_objects(prompts) if way else self._refusal(found)

    def _find_own_objects(self, prompts: Sequence[Prompt]) -> str | None:
        """Describe tests that compare an answer's objects, so that no answer could pass; None if there are none.

        A few tests that seem to do so are run with the row's own response.
        """
        seem = [
            (p, found) for p in prompts if p.answer is not None and (found := find_comparison(p.answer)) is not None
        ]
        for prompt, found in seem[:TRIED]:
            _, reason = self.check(str(prompt.answer), prompt.human)
            if COMPARED.search(reason):
                return (
                    f"the tests of {prompt.id}, {found}, which no response could pass: {reason}; or leave the row out"
                )
        return None

    def canary(self, ledger: Ledger) -> Canary | None:
        """Report how answers are isolated; this was found out when the rows were accepted."""
        way, found = find_isolation(self.isolation)
        return Canary(way is not None, found if way else self._refusal(found))

    def usable(self, gold: str) -> bool:
        """Whether it is a Python program that tests an answer."""
        return find_fault(gold) is None

    def check(self, gold: str, text: str) -> tuple[bool, str]:
        """Whether the response's code passes the tests.

        Raises:
            JudgeError: running code is not allowed, or this machine does not isolate it.
        """
        if not self.i_know_this_runs_code:
            raise JudgeError("judge=code: nothing is run unless judge.i_know_this_runs_code=true")
        way, found = find_isolation(self.isolation)
        if way is None:
            raise JudgeError(self._refusal(found))
        if not text.strip():
            return False, "no code in the response"
        size = 4 * self.file_mb << 20
        ended = run_tests(text, gold, way, self.timeout, self.limits, size)
        return ended.passed, ended.reason

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """Return a verdict on each response, testing ``workers`` of them at once."""
        by_id = {p.id: p for p in prompts}
        report.begin(len(responses), "verdicts")
        found = []
        for verdict in map_in_threads(lambda r: self.verdict(by_id[r.id], r), responses, self.workers):
            found.append(verdict)
            report.advance()
        return found

    def _refusal(self, problem: str) -> str:
        if self.isolation == "none":
            return f"judge.isolation=none: {problem}; mend this, or isolate (judge.isolation=auto)"
        return (
            f"judge.isolation={self.isolation}: this system does not isolate answers ({problem}); allow namespaces, "
            "or install bubblewrap, or set judge.isolation=none if there is nothing to lose: answers can then read "
            "your files and use the network"
        )
