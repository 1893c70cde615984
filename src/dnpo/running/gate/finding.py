"""One line of the gate."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["pass", "warn", "stop"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        level: ``pass``; ``warn`` for what one should know; ``stop`` for what makes the run pointless or impossible.
        text: what was looked at and what was found, with the figure.
        setting: what to change; "" where nothing has to be.
    """

    name: str
    level: Level
    text: str
    setting: str = ""
