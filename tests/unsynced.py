"""Write without waiting for the disk: a small run waits for it hundreds of times, longer than it computes.

Written data outlive a process however it ends, also without this wait; only a power failure would make a difference.
"""

import os
import sqlite3
from contextlib import suppress
from functools import wraps
from sqlite3 import dbapi2
from typing import Any

_connect = sqlite3.connect


def _leave_to_the_kernel(handle: Any) -> None:
    """The replacement of ``os.fsync``."""


@wraps(_connect)
def _connect_without_waiting(*given: Any, **named: Any) -> sqlite3.Connection:
    connection = _connect(*given, **named)
    with suppress(sqlite3.DatabaseError):  # other files fail later, when they are read
        connection.execute("PRAGMA synchronous=OFF").close()
    return connection


def leave_to_the_kernel() -> None:
    """Let this process write without waiting."""
    os.fsync = _leave_to_the_kernel
    sqlite3.connect = dbapi2.connect = _connect_without_waiting
