"""Run a judge in a separate process, so that it can judge while this process trains.

A judge that asks an endpoint mostly waits, but each reply also takes some milliseconds of Python. In a thread this
would slow down training, because threads share Python's lock.
"""

import os
import pickle
import signal
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from dnpo.errors import DnpoError, JudgeError, SettingsError
from dnpo.interrupts import ENDING
from dnpo.judges import Judge, ask
from dnpo.judges.asked.ledger import Ledger
from dnpo.records import Prompt, Response, Verdict
from dnpo.store import Report

Round = tuple[Sequence[Prompt], Sequence[Response]]


class Meanwhile:
    """Judges one round of responses after another in another process, which ends with this one.

    Args:
        judge: the judge.
        ledger: stores its replies; the other process opens it for itself.
        report: receives its notes.

    Raises:
        SettingsError: the judge cannot be sent to another process.
    """

    def __init__(self, judge: Judge, ledger: Ledger, report: Report) -> None:
        try:
            pickle.dumps(judge)
        except Exception as error:
            raise SettingsError(
                f"rollout.ahead_by: {type(judge).__name__} (judge) cannot be sent to another process ({error}); take "
                "rollout.ahead_by=0"
            ) from error
        self.report = report
        self._rounds: SimpleQueue[tuple[Round, Future[list[Verdict]]] | None] = SimpleQueue()
        context = get_context("spawn")  # a fork would copy the present locks of torch's threads
        self._here, there = context.Pipe()
        self._process = context.Process(target=_judge, args=(there, judge, ledger.path, ledger.run), daemon=True)
        self._process.start()
        there.close()  # so that this process notices the end of the other one
        self._thread = Thread(target=self._exchange, name="judge", daemon=True)
        self._thread.start()

    def ask(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> "Future[list[Verdict]]":
        """Have responses judged, after the responses of earlier calls.

        Returns:
            The verdicts, in the order of the responses; or the error with which the judge failed.
        """
        verdicts: Future[list[Verdict]] = Future()
        self._rounds.put(((prompts, responses), verdicts))
        return verdicts

    def close(self) -> None:
        """End the other process at once."""
        self._rounds.put(None)
        self._process.kill()
        self._thread.join()  # first, since only one of two threads that wait for a process learns its exit code
        self._process.join()

    def _exchange(self) -> None:
        while (given := self._rounds.get()) is not None:
            asked, verdicts = given
            try:
                self._here.send(asked)
                kind, content = self._here.recv()
                while kind == "note":
                    self.report.note(content)
                    kind, content = self._here.recv()
            except (EOFError, OSError):
                self._process.join()
                code = self._process.exitcode
                text = (
                    f"judge: its process has ended with exit code {code}; run the same command again: answers are kept"
                )
                kind, content = "error", JudgeError(text)
            if kind == "verdicts":
                verdicts.set_result(content)
            else:
                verdicts.set_exception(content)


class _Notes:
    """Sends a judge's notes to the process that trains; its progress is not shown there."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def begin(self, total: int, unit: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Pass on the note."""
        self.connection.send(("note", text))

    def status(self, text: str) -> None:
        """Do nothing."""

    def steps(self, rows: list[dict[str, float]]) -> None:
        """Do nothing."""


def _judge(connection: Connection, judge: Judge, path: Any, run: str) -> None:
    """Judge the responses that arrive, in the other process, until the connection ends."""
    for number in (signal.SIGINT, *ENDING):  # the process that trains handles these signals, and ends this one
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            prompts, responses = connection.recv()
        except EOFError:
            return
        try:
            with Ledger(path, run) as ledger:
                connection.send(("verdicts", ask(judge, prompts, responses, ledger, _Notes(connection))))
        except DnpoError as error:
            connection.send(("error", error))
        except Exception as error:
            error.add_note(f"({type(judge).__name__} worked in a separate process: rollout.ahead_by)")
            connection.send(("error", error))


def _end_with_parent() -> None:
    """End this process at once when the process that trains has ended or was killed."""
    parent = parent_process()
    assert parent is not None, "a process started by another one"
    parent.join()
    os._exit(1)
