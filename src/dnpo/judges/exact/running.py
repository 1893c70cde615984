"""Run an answer and its tests in separate processes, and find out how this machine can isolate them."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

from dnpo.errors import JudgeError
from dnpo.judges.exact.apart import NOT_ISOLATED, SYSTEM, WORK, form

Isolation = Literal["namespaces", "bubblewrap", "none"]

# Empty modules replace the parent packages, so that only the package ``apart`` is imported.
START = """
import json, sys, types
how = json.loads(sys.argv.pop())
folder = how["apart"]
for name in ("dnpo.judges.exact", "dnpo.judges", "dnpo"):
    folder = folder.rpartition("/")[0]
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from dnpo.judges.exact.apart import start
start.main(how)
"""
IN_WORDS: Mapping[Isolation, str] = {
    "namespaces": "answers run in separate namespaces, without network and with a private file system",
    "bubblewrap": "answers run in bubblewrap, without network and with a private file system",
    "none": "answers run with limits alone (judge.isolation=none): they can read this user's files and use the network",
}
# One thread for each numerical library, since every thread counts as a process of the user.
ENVIRONMENT = {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
_APART = Path(form.__file__).parent
# Finds the names, never the values, of variables that an answer could read.
_TRY = """
import os, re, socket
def secrets():
    found = set()
    for process in os.listdir("/proc") if os.path.isdir("/proc") else []:
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                names = [pair.partition(b"=")[0].decode(errors="replace") for pair in file.read().split(b"\\0")]
        except OSError:
            continue
        found.update(name for name in names if re.search("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", name.upper()))
    return sorted(found)
"""
_TRY_TESTS = "assert not secrets(), ' '.join(secrets())"
_TRY_LIMITS = {"RLIMIT_CPU": 20, "RLIMIT_NOFILE": 64}


@dataclass(frozen=True)
class Ended:
    """How an answer and its tests ended.

    Attributes:
        passed: whether the tests passed.
        reason: why they did not, in one line; "" if they did.
    """

    passed: bool
    reason: str


def run_tests(response: str, tests: str, how: Isolation, timeout: float, limits: Mapping[str, int], size: int) -> Ended:
    """Run a response and its tests.

    Args:
        timeout: seconds by the clock.
        limits: of each process, by their names in :mod:`resource`; sizes in bytes, times in seconds.
        size: total bytes that can be written if the file system is private.

    Raises:
        JudgeError: the machine does not isolate them as required.
    """
    if how == "none":
        from dnpo.judges.exact.apart.isolation import be_unreadable  # does not exist on every system

        be_unreadable()  # this process has the tests, and may have keys
    word = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="dnpo-code-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdin,  # files instead of pipes, on which a process could block
        tempfile.TemporaryFile() as stdout,
    ):
        task = {"names": form.answer_names(tests), "modules": form.own_modules(tests)}
        task["answers"] = form.answer_modules(tests)
        stdin.write(json.dumps({"response": response, "tests": tests, "word": word, **task}).encode())
        stdin.seek(0)
        ended = _wait(_command(how, folder, limits, size), timeout, folder, stdin, stdout)
        stdout.seek(0)
        output = stdout.read(1000).decode("utf-8", "replace")
    if ended is None:
        return Ended(False, f"not done after {timeout:g} s (judge.timeout)")
    if output == word:
        return Ended(True, "")
    if ended == NOT_ISOLATED:
        raise JudgeError(f"judge.isolation={how}: this system does not allow it ({output})")
    if ended < 0:
        return Ended(False, f"killed by {signal.Signals(-ended).name}")
    return Ended(False, output.splitlines()[0] if output else f"ended before its tests had finished (status {ended})")


def _command(how: Isolation, folder: str, limits: Mapping[str, int], size: int) -> list[str]:
    packages = list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    places = [sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix, *packages]
    trees = sorted({path for place in places for path in (place, os.path.realpath(place))} - {"/"}, key=len)
    # processes of the sandbox itself that count as the user's
    around = {"namespaces": 2 if os.geteuid() else 0, "bubblewrap": 3, "none": 0}[how]
    settings = {
        "isolation": how,
        "folder": folder,
        "trees": trees,
        "path": packages,
        "size": size,
        "apart": str(_APART),
        "limits": {name: value + around * (name == "RLIMIT_NPROC") for name, value in limits.items()},
    }
    # without site, which takes longer than most tests
    python = [os.path.realpath(sys.executable), "-I", "-S", "-c", START, json.dumps(settings)]
    return [*_bubblewrap([*trees, str(_APART)], size), *python] if how == "bubblewrap" else python


def _bubblewrap(trees: list[str], size: int) -> list[str]:
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
    for path in (*SYSTEM, *trees):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    for path in ("/tmp", WORK):
        if not any(tree.startswith(f"{path}/") for tree in trees):
            command += ["--size", str(size), "--tmpfs", path]
    return [*command, "--dev", "/dev", "--chdir", WORK]


def _wait(command: list[str], timeout: float, folder: str, stdin: IO[bytes], stdout: IO[bytes]) -> int | None:
    """Wait for the end, or until the timeout (returns None), and leave no process of the session running."""
    child = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    end = time.monotonic() + timeout
    try:
        # Wait without reaping: until it is reaped, its process id is not reused, so no other process can be killed.
        looks = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while not (done := os.waitid(os.P_PID, child.pid, looks) is not None) and time.monotonic() < end:
            time.sleep(0.002)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
    return status if done else None


@cache
def find_isolation(wanted: str) -> tuple[Isolation | None, str]:
    """Find how answers can be isolated on this machine, by running a real answer.

    Args:
        wanted: the setting ``judge.isolation``; ``auto`` takes the best isolation that works, never ``none``.

    Returns:
        The isolation and its description, or None and the reason why none works.
    """
    ways: dict[str, list[Isolation]] = {
        "auto": ["namespaces", "bubblewrap"],
        "namespaces": ["namespaces"],
        "bubblewrap": ["bubblewrap"],
        "none": ["none"],
    }
    problems = []
    for way in ways[wanted]:
        problem = _try(way)
        if problem is None:
            return way, IN_WORDS[way]
        problems.append(f"{way}: {problem}")
    return None, "; ".join(problems)


def _try(how: Isolation) -> str | None:
    """Why answers cannot run this way; None if they can."""
    if how != "none" and sys.platform != "linux":
        return "only on Linux"
    if how == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    try:
        ended = run_tests(_TRY, _TRY_TESTS, how, 30.0, _TRY_LIMITS, 16 << 20)
    except JudgeError as error:
        return str(error)
    if ended.passed:
        return None
    kind, _, names = ended.reason.partition("AssertionError: ")
    return (
        f"an answer could read {names} in the environment of a process of this user (unset it there)" if names else kind
    )
