"""Signals that ask a process to end: raised like Ctrl-C, or held back until a training has written a checkpoint.

SLURM sends SIGTERM when a job is preempted, and a signal of choice (SIGUSR1, or submitit's SIGUSR2) some time before
its limit. Handlers that a launcher has installed are still called, only later.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, TypeVar

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STDERR = 2
AGAIN = 0.05  # seconds after which a dropped signal is sent again
JUST_AFTER = 1.0  # seconds after a signal in which an error counts as its consequence

Result = TypeVar("Result")
_raised: dict[int, float] = {}  # when the exception of each signal was last raised, by the monotonic clock


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

    Ctrl-C raises KeyboardInterrupt as usual. But libraries catch what is raised while they are imported, or are left
    half imported, so an import is finished first; a second Ctrl-C ends the process at once. Python drops an exception
    that a handler raises during a finalizer or a weak reference's callback: the signal is then sent again. Compiled
    code may turn it into an error of its own: an error just after a signal counts as the signal.
    """
    owner = os.getpid()
    report_dropped = sys.unraisablehook
    waiting: set[int] = set()  # signals that arrived during an import
    own: set[int] = set()  # those that were sent again by this process
    timers: list[threading.Timer] = []

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that was forked from this one ends as if there were no handler
            _end_by(number, ours[number])
            return
        again, known = number in own, number in waiting
        own.discard(number)
        if _is_importing(frame):
            if known and not again:
                _end_by(number, signal.SIG_DFL)
            if not known:
                waiting.add(number)
                _show(number, "the libraries are loaded first")
            send(number)
            return
        waiting.discard(number)
        _raised[number] = time.monotonic()
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        for each in ENDING:  # a second signal must not stop what the first one started
            if each in ours:
                signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    def send(number: int) -> None:
        def now() -> None:
            own.add(number)
            os.kill(owner, number)

        later = threading.Timer(AGAIN, now)
        later.daemon = True
        later.start()
        timers.append(later)

    def send_again(dropped: Any) -> None:
        number = exit_status(dropped.exc_value) - 128 if isinstance(dropped.exc_value, KeyboardInterrupt) else 0
        if number not in ours:
            report_dropped(dropped)
            return
        signal.signal(number, end)
        send(number)  # not here, where it would be dropped too

    usual: dict[int, Any] = dict.fromkeys(ENDING, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    ours = {each: one for each, one in usual.items() if _in_main_thread() and signal.getsignal(each) is one}
    for each in ours:
        signal.signal(each, end)
    sys.unraisablehook = send_again
    try:
        yield
    except Exception as error:
        just = [number for number, at in _raised.items() if time.monotonic() - at < JUST_AFTER]
        if not just:
            raise
        raise KeyboardInterrupt if signal.SIGINT in just else Ended(just[0]) from error
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = report_dropped
        for each, one in ours.items():
            signal.signal(each, one)
            _raised.pop(each, None)


def _end_by(number: int, handler: Any) -> None:
    signal.signal(number, handler)
    os.kill(os.getpid(), number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _show(number: int, what: str) -> None:
    """Answer a signal in its handler, where print and rich could be interrupted in the middle of a line."""
    again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
    with suppress(BrokenPipeError):  # nobody reads it any more
        os.write(STDERR, f"\n{signal.Signals(number).name}: {what}{again}\n".encode())


class Held:
    """Holds signals back until it is safe to end.

    Only signals that have a handler are held, and their handlers are called by :meth:`deliver`. A second Ctrl-C is not
    held.

    Args:
        what: what the process does before it ends; the message shown at the signal says so.

    Attributes:
        also: called at each signal that is held.
        waiting: the signals held.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.also: Callable[[], object] = lambda: None
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
            _show(number, self.what)
            self.also()


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


def run(work: Coroutine[Any, Any, Result], what: str) -> Result:
    """Run a coroutine as ``asyncio.run`` does; a signal cancels it, and is raised when it has ended.

    Args:
        work: the coroutine, which may finish something when it is cancelled.
        what: what it then does, for the message at the signal.
    """
    import asyncio

    signals = Held(what)

    async def cancellable() -> Result:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        signals.also = partial(loop.call_soon_threadsafe, task.cancel)  # a handler may run within any line of the loop
        return await work

    signals.hold()
    try:
        return asyncio.run(cancellable())
    finally:
        signals.release()
        signals.deliver()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
