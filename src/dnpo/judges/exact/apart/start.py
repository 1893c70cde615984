"""Start the two processes of an answer and its tests; ``python -c`` calls ``main`` and passes the task on stdin.

The answer's process is started before the task is read, so it never has the tests. It closes every file except its
connection. Only the tests' process can write the word that means success.
"""

import json
import os
import signal
import sys
from typing import Any

from dnpo.judges.exact.apart import FAILED, NOT_ISOLATED, PASSED, isolation, testing
from dnpo.judges.exact.apart.answer import Doorkeeper
from dnpo.judges.exact.apart.wire import Wire

_USERS = 60_000  # first id of the users of answers' processes; the machine should not use these ids
_PAIRS = 2_500  # answers that can run at once; each has two users


def main(how: dict[str, Any]) -> None:
    """Isolate this process, start the answer's process, run the tests, and exit with one of the codes in ``__init__``.

    Args:
        how: ``isolation`` (``namespaces``, ``bubblewrap`` or ``none``), ``folder`` (an empty folder), ``trees``
            (folders that Python needs), ``path`` (of Python's packages), ``size`` (total bytes that can be written) and
            ``limits``.
    """
    sys.path += how["path"]
    user = None
    try:
        if how["isolation"] == "namespaces":
            user = _enter(how)
        isolation.be_unreadable()
    except OSError as error:
        os.write(1, f"{error.strerror or error}".encode())
        os._exit(NOT_ISOLATED)
    (questions, asks), (replies, gives) = os.pipe(), os.pipe()
    answer = os.fork()
    if answer == 0:
        _answer(questions, gives, how, user)
    os.close(questions)
    os.close(gives)
    _test(Wire(replies, asks), answer, how, None if user is None else user + 1)


def _enter(how: dict[str, Any]) -> int | None:
    """Enter the namespaces; return the user for the answer's process, None if it cannot be another user."""
    # Answers that run at once must not share a user, and its limit on processes. Namespaces hide the claims of others.
    number, claim = isolation.claim_number(_PAIRS)
    user: int | None = _USERS + 2 * number
    if not isolation.enter_namespaces() or not isolation.can_be(_USERS + 2 * number + 1):
        user = None
        claim.close()
    child = os.fork()  # the first process of the new namespace; all others end with it
    if child:
        os.close(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    isolation.end_with_parent()
    isolation.enter_root(how["folder"], how["trees"], how["size"])
    return user


def _answer(reads: int, writes: int, how: dict[str, Any], user: int | None) -> None:
    """Serve the answer; never returns."""
    try:
        isolation.give_up_rights(user)
        isolation.end_with_parent()  # after the change of user, which clears it
        isolation.limit(how["limits"])
        _close_streams(0, 1, 2)
        for other in range(3, 64):
            if other not in (reads, writes):
                os.closerange(other, other + 1)
        Doorkeeper(Wire(reads, writes)).serve()
    finally:
        os._exit(1)


def _test(wire: Wire, answer: int, how: dict[str, Any], user: int | None) -> None:
    """Run the tests; never returns."""
    task = json.load(sys.stdin)
    out = os.dup(1)
    os.set_inheritable(out, False)
    isolation.give_up_rights(user)
    if how["isolation"] == "namespaces":
        isolation.end_with_parent()
    isolation.be_unreadable()
    isolation.limit({name: value for name, value in how["limits"].items() if name != "RLIMIT_NPROC"})
    _close_streams(0, 1, 2)
    status, message = PASSED, task["word"]
    try:
        client = testing.Client(wire)
        client.load(task["response"])
        testing.run(task["tests"], task["names"], task["modules"], task["answers"], client)
    except BaseException as error:
        status, message = FAILED, _describe(error, answer)
    os.write(out, message.encode(errors="replace"))
    os._exit(status)


def _describe(error: BaseException, answer: int) -> str:
    """Why the tests ended, in one line."""
    if isinstance(error, testing.AnswerEnded):
        gone, status = os.waitpid(answer, os.WNOHANG)
        if gone and os.WIFSIGNALED(status):
            return f"the answer's process was killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"the answer's process {error} before its tests had finished"
    message = str(error).strip().partition("\n")[0][:200]
    return message if isinstance(error, testing.NotPlain) else f"{type(error).__name__}: {message}"


def _close_streams(*streams: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in streams:
        os.dup2(nothing, stream)
    os.close(nothing)
