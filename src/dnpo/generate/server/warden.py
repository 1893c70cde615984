"""Run a command; when the waiting process ends, end the command and everything that it started.

    python warden.py COMMAND …

The waiting process holds the other end of standard input. The end of input, whether it was closed or the process was
killed, ends the command: first by SIGTERM, then by SIGKILL. This file is run by its path and imports nothing of dnpo.
"""

import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE = 20.0  # seconds from SIGTERM to SIGKILL


def main(command: list[str]) -> int:
    """Run the command; return its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: end(child))

    def wait_for_the_end_of_input() -> None:
        while os.read(0, 1 << 16):
            pass
        end(child)

    threading.Thread(target=wait_for_the_end_of_input, daemon=True).start()
    status = child.wait()
    end(child)  # processes that it may have left running
    return status


def end(child: "subprocess.Popen[bytes]") -> None:
    """End a command and its group."""
    try:
        os.killpg(child.pid, signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            os.killpg(child.pid, 0)
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
