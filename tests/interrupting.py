"""Interrupt calls in threads at each line that the main thread runs, each time in a forked process, which must end.

A separate program, because forking pytest's process takes long. It prints the number of lines.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from dnpo.threads import map_in_threads

NOT_REACHED = 3
SECONDS = 10  # after which a process hangs


class Interrupt(KeyboardInterrupt):
    """Raised where a signal's handler would raise it."""


def interrupt(line: int) -> int:
    """Raise at the n-th line in a forked process; return how it ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(SECONDS)
    seen = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        seen += event == "line"
        if event == "line" and seen == line:
            sys.settrace(None)
            above: FrameType | None = frame
            while above is not None:
                above.f_trace, above = None, above.f_back
            raise Interrupt
        return trace

    try:
        sys.settrace(trace)
        list(map_in_threads(str, range(6), 2))
        status = NOT_REACHED if seen < line else 0
    except (Interrupt, RuntimeError):  # the latter from threading, whose locks may be left in disorder
        status = 0
    sys.settrace(None)
    for thread in threading.enumerate():  # as Python does before it ends
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    os._exit(status)


def main() -> None:
    """Interrupt at line after line until the calls end before it."""
    line, status = 1, 0
    while (status := interrupt(line)) == 0:
        line += 1
    if status != NOT_REACHED:
        sys.exit(f"interrupted at line {line}, the process did not end ({status})")
    print(line - 1)


if __name__ == "__main__":
    main()
