"""The result of one check of the gate."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "warn", "stop"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: name of the check.
        level: ``pass``, ``warn``, or ``stop`` if the run would be pointless or impossible.
        text: what was checked and found, with figures.
        setting: what to change; "" if nothing.
    """

    name: str
    level: Level
    text: str
    setting: str = ""
