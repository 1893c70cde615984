"""The result of one check of the gate."""

from dataclasses import dataclass
from typing import Literal

from dnpo.errors import DnpoError

Level = Literal["pass", "warn", "stop"]
OWN_ERROR = "this is an error in dnpo, not in the settings"  # end of a text if no setting can help


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: name of the check.
        level: ``pass``, ``warn``, or ``stop`` if the run would be useless or impossible.
        text: what was checked and found, with figures.
        setting: what to change; "" if nothing, or if no setting can help, as the text says.
    """

    name: str
    level: Level
    text: str
    setting: str = ""

    @property
    def refusal(self) -> str:
        """Why the run does not begin, and what to change, without repeating a name."""
        named = self.text.startswith(tuple(f"{self.name}{mark}" for mark in ":.= "))
        advice = f". Change {self.setting}" if self.setting else ""
        return f"{'' if named else f'{self.name}: '}{self.text.removesuffix('.')}{advice}"


def refuse(name: str, error: DnpoError, setting: str) -> Finding:
    """The finding of a check that ended with an error, without repeating the check's name."""
    return Finding(name, "stop", str(error).removeprefix(f"{name}: "), setting)
