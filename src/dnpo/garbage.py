"""Python's garbage collection costs a command seconds: the libraries leave many objects, and hardly any garbage."""

import atexit
import gc


def collect_less_often() -> None:
    """Let Python collect garbage less often: during imports, collecting takes a quarter of the time and finds none."""
    gc.set_threshold(10_000)


def leave_at_exit() -> None:
    """Leave out the interpreter's last collection, which would take 2 CPU seconds after Ctrl-C and at every other end.

    What has to be closed at the end is closed before it: files by their blocks, libraries by their own exit handlers.
    """
    atexit.register(gc.freeze)
