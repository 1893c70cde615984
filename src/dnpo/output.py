"""Output that nobody reads any more does not end a command: ``dnpo train | head -3`` is still a whole run."""

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any


def outlive_readers() -> None:
    """From now on, drop what is printed to a pipe whose reader has ended; Python would raise BrokenPipeError.

    Streams that are not the process's own, such as those of a test, and terminals stay as they are.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)  # None if it was closed at the start
        own = isinstance(stream, TextIOWrapper) and stream is getattr(sys, f"__{name}__")
        if own and not stream.isatty():
            setattr(sys, name, _outliving(stream))


def _outliving(stream: TextIOWrapper) -> TextIOWrapper:
    stream.flush()
    pipe = _Pipe(stream.fileno(), "w", closefd=False)
    return TextIOWrapper(
        pipe if stream.write_through else BufferedWriter(pipe),  # it is true for python -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Pipe(FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for processes that are started later, too
            os.close(nowhere)
            return super().write(data)
