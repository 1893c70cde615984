"""What runs of the tests leave out, or have ready: problems and compositions are made once, pictures are blank.

Making the 38,400 problems of the tiny world takes a tenth of a small run, and drawing its pictures an eighth. A run
whose environment has ``TESTS_DRAW`` draws them; the one that the tests share does.
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
    """Lighten the runs of this process."""
    keep_compositions()
    leave_to_the_kernel()
    if execute._draw_once is _draw_once:
        execute._draw_once = _draw_or_leave_blank
        tinyworld.problems = cache(tinyworld.problems)


lighten()
for family in tinyworld.FAMILIES:  # so that processes that are forked from this one find them
    tinyworld.problems(family, 1)
