"""Start a server by a command, and end it with everything that it started, even if this process is killed."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from socket import socket

from dnpo.connection import Connection
from dnpo.errors import EngineError
from dnpo.generate.server import PART, warden

SHOWN = 2000  # characters of the end of a log in a message
PATIENCE = 60.0  # seconds that a server may take to end


class Launched:
    """A server that runs until this object is closed.

    Args:
        command: the words of the command.
        log: the file for its output.
        connection: knows the keys, which are removed from messages.
    """

    def __init__(self, command: Sequence[str], log: Path, connection: Connection) -> None:
        self.log, self.command, self.connection = log, shlex.join(command), connection
        with log.open("ab") as stream:
            # in a separate session, so Ctrl-C reaches only this process, which ends the server
            self._process = subprocess.Popen(
                [sys.executable, str(warden.__file__), *command],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def check(self) -> None:
        """Check that it still runs.

        Raises:
            EngineError: it has ended; shows the end of its log.
        """
        status = self._process.poll()
        if status is not None:
            raise EngineError(f"{PART}.launch: the server ended with status {status} ({self.command}).{self.tail()}")

    def tail(self) -> str:
        """The end of its log, as further sentences of a message."""
        text = self.log.read_text(errors="replace")[-SHOWN:].strip() if self.log.is_file() else ""
        return (
            f" The end of its log, {self.log}:\n{self.connection.clean(text)}"
            if text
            else f" Its log, {self.log}, is empty"
        )

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
    return port
