"""Signals that ask a process to end: raised like Ctrl-C, or held back until a training has written a checkpoint.

SLURM sends SIGTERM when a job is preempted, and a signal of choice (SIGUSR1, or submitit's SIGUSR2) some time before
its limit. Handlers that a launcher has installed are still called, only later.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STDERR = 2
AGAIN = 0.05  # seconds after which a dropped signal is sent again


class Ended(KeyboardInterrupt):
    """A signal asked the process to end, as Ctrl-C does.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_status(interrupt: KeyboardInterrupt) -> int:
    """Return the status with which an interrupted process exits: 128 and the signal's number."""
    return 128 + (interrupt.number if isinstance(interrupt, Ended) else signal.SIGINT)


def name(interrupt: KeyboardInterrupt) -> str:
    """Return the name of the signal; "" for Ctrl-C."""
    return signal.Signals(interrupt.number).name if isinstance(interrupt, Ended) else ""


@contextmanager
def raised() -> Iterator[None]:
    """Raise :class:`Ended` at a signal that would end the process without a message, unless a launcher handles it.

    Python drops an exception that a handler raises during a finalizer or a weak reference's callback. The signal, and
    Ctrl-C, is then sent again.
    """
    owner = os.getpid()
    report_dropped = sys.unraisablehook

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that was forked from this one ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for each in ours:  # a second signal must not stop what the first one started
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    def send_again(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report_dropped(dropped)
            return
        number = exit_status(dropped.exc_value) - 128
        if number in ours:
            signal.signal(number, end)
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), number))  # not here, where it would be dropped too
        again.daemon = True
        again.start()

    ours = [each for each in ENDING if _in_main_thread() and signal.getsignal(each) is signal.SIG_DFL]
    for each in ours:
        signal.signal(each, end)
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report_dropped
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


class Held:
    """Holds signals back until it is safe to end.

    Only signals that have a handler are held, and their handlers are called by :meth:`deliver`. A second Ctrl-C is not
    held.

    Args:
        what: what the process does before it ends; the message shown at the signal says so.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.waiting: list[int] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        for each in (signal.SIGINT, *ENDING):
            handler = signal.getsignal(each)
            if _in_main_thread() and callable(handler):
                self._handlers[each] = handler

    def hold(self) -> None:
        """Begin to hold signals back."""
        for each in self._handlers:
            signal.signal(each, self._note)

    def deliver(self) -> None:
        """Call the handlers of the signals that have arrived. They may raise; otherwise the caller continues."""
        while self.waiting:
            number = self.waiting.pop(0)
            self._handlers[number](number, None)

    def release(self) -> None:
        """Put the handlers back."""
        for each, handler in self._handlers.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.waiting:
            self.waiting.clear()
            self._handlers[number](number, frame)
            return
        if number not in self.waiting:
            self.waiting.append(number)
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            # print and rich are not reentrant
            os.write(STDERR, f"\n{signal.Signals(number).name}: {self.what}{again}\n".encode())


@contextmanager
def held(what: str) -> Iterator[None]:
    """Hold signals back until the body has ended.

    For code of libraries that starts threads and waits for them: a signal's exception could leave both waiting forever.

    Args:
        what: what the process does before it ends, for the message at the signal.
    """
    signals = Held(what)
    signals.hold()
    try:
        yield
    finally:
        signals.release()
        signals.deliver()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
