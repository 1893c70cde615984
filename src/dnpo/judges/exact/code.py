"""A judge that runs code: the response's, and then the unit tests that are the prompt's answer.

Each response runs in a separate Python process: isolated mode, an empty environment, an empty temporary folder to
work in, a new session that is killed as a whole at the end or after ``timeout``, and limits of the system on
processor time, address space, size of files, open files and processes.

These are limits, not a sandbox. They keep an endless loop or a leak from taking the machine along. They do not keep
code from reading what its user can read, from using the network, from leaving its session, or, where it runs as root,
from starting processes. Code can also cheat its tests by looking for them in its own process. It is therefore off until
``i_know_this_runs_code`` is set, and belongs where there is nothing to lose.
"""

import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, ClassVar

from dnpo.errors import JudgeError
from dnpo.judges.asked.ledger import Ledger
from dnpo.judges.exact.answers import Checker
from dnpo.records import Prompt, Response, Verdict
from dnpo.settings import Count, Positive, neutral
from dnpo.store import Report

# The new process limits itself before it sees any code (a hook between fork and exec is not safe with threads). It
# writes the word it was given only when the tests are through: code that ends the process early has not passed.
HARNESS = """
import json, os, resource, sys
def main():
    task = json.load(sys.stdin)
    for name, value in task["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    out, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    write, leave = os.write, os._exit
    try:
        space = {"__name__": "response"}
        for part in ("response", "tests"):
            exec(compile(task[part], part, "exec"), space)
    except BaseException as error:
        write(out, (type(error).__name__ + ": " + str(error)[:200]).encode(errors="replace"))
        leave(1)
    write(out, task["word"].encode())
    leave(0)
main()
"""
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class UnitTests(Checker):
    """100 points if the tests in the prompt's answer run through after the response's code; see the head of this file.

    The response's code is its last fenced block, or all of it where there is none. A response that takes too long on a
    busy machine fails, so scores near the limits depend on the machine.

    Args:
        i_know_this_runs_code: nothing is run before this is true.
        timeout: seconds of one response with its tests, by the clock; the same of processor time.
        memory_mb: of address space.
        file_mb: of any one file that it writes.
        processes: and threads, of the user, this one included; the system does not hold root to it.
        workers: responses tested at once.
    """

    option: ClassVar[str] = "code"

    i_know_this_runs_code: bool = neutral(False)
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
        """It may run code, on a system that has limits, and every answer is a program."""
        if not self.i_know_this_runs_code:
            return (
                "judge=code runs programs that a model wrote, as your user, with limits on time, memory, files and "
                "processes but without a sandbox: they can read your files and use the network. Set "
                "judge.i_know_this_runs_code=true if that is what you want"
            )
        if sys.platform == "win32":
            return "judge=code needs the limits of a POSIX system; choose another judge"
        return super().accepts(prompts)

    def usable(self, gold: str) -> bool:
        """It is Python, and does something."""
        try:
            return bool(compile(gold, "tests", "exec").co_code) and bool(gold.strip())
        except (SyntaxError, ValueError):
            return False

    def check(self, gold: str, text: str) -> tuple[bool, str]:
        """The tests run through."""
        if not self.i_know_this_runs_code:
            raise JudgeError("judge=code: nothing is run unless judge.i_know_this_runs_code=true")
        blocks = _FENCE.findall(text)
        code = blocks[-1] if blocks else text
        return self._run(code, gold) if code.strip() else (False, "no code in the response")

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], ledger: Ledger, report: Report
    ) -> list[Verdict]:
        """One verdict a response, ``workers`` of them at once."""
        by_id = {p.id: p for p in prompts}
        report.begin(len(responses), "verdicts")
        with ThreadPoolExecutor(self.workers) as pool:
            found = []
            for verdict in pool.map(lambda r: self.verdict(by_id[r.id], r), responses):
                found.append(verdict)
                report.advance()
            return found

    def _run(self, code: str, tests: str) -> tuple[bool, str]:
        word = secrets.token_hex(16)
        task = {"response": code, "tests": tests, "word": word, "limits": self.limits}
        with (
            tempfile.TemporaryDirectory(prefix="dnpo-code-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as stdin,  # files instead of pipes, on which a process could block
            tempfile.TemporaryFile() as stdout,
        ):
            stdin.write(json.dumps(task).encode())
            stdin.seek(0)
            ended = self._wait(folder, stdin, stdout)
            stdout.seek(0)
            output = stdout.read(1000).decode("utf-8", "replace")
        if ended is None:
            return False, f"not done after {self.timeout:g} s (judge.timeout)"
        if output == word:
            return True, ""
        if ended < 0:
            return False, f"killed by {signal.Signals(-ended).name}"
        return False, output.splitlines()[0] if output else f"ended before its tests were through (status {ended})"

    def _wait(self, folder: str, stdin: IO[bytes], stdout: IO[bytes]) -> int | None:
        """Run to the end, or to the timeout (None), and leave nothing of the session running."""
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", HARNESS],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        end = time.monotonic() + self.timeout
        try:
            # Waited for without reaping: until it is reaped its process id cannot be reused, so the kill hits no other.
            looks = os.WEXITED | os.WNOWAIT | os.WNOHANG
            while not (done := os.waitid(os.P_PID, child.pid, looks) is not None) and time.monotonic() < end:
                time.sleep(0.005)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            status = child.wait()
        return status if done else None
