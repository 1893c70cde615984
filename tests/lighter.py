"""Make runs of the tests faster: problems and compositions are made once, and pictures are blank.

Making the problems of the tiny world takes a tenth of a small run, and drawing its pictures an eighth. A run with
``TESTS_DRAW`` in its environment draws pictures; so does the run that tests share.
"""

import base64
import os
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path

from dnpo.data import tinyworld
from dnpo.running import execute
from dnpo.store import Store
from tests.composing import keep_compositions
from tests.unsynced import leave_to_the_kernel

DRAW = "TESTS_DRAW"
BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

_draw_once = execute._draw_once


@wraps(_draw_once)
def _draw_or_leave_blank(store: Store, key: str, draw: Callable[[Path], None], picture: Path) -> None:
    _draw_once(store, key, draw if DRAW in os.environ else _leave_blank, picture)


def _leave_blank(path: Path) -> None:
    path.write_bytes(BLANK)


def lighten() -> None:
    """Make the runs of this process faster."""
    keep_compositions()
    leave_to_the_kernel()
    if execute._draw_once is _draw_once:
        execute._draw_once = _draw_or_leave_blank
        tinyworld.problems = cache(tinyworld.problems)


lighten()
for family in tinyworld.FAMILIES:  # so that processes forked from this one have them
    tinyworld.problems(family, 1)
