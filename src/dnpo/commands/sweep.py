"""Run a sweep: a file of ``sweeps/`` by name, or any settings with several values.

dnpo sweep methods seed=0          # python -m dnpo.train -m +sweep=methods seed=0
dnpo sweep npo.alpha=0.01,0.1      # python -m dnpo.train -m npo.alpha=0.01,0.1
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from dnpo.commands import train
from dnpo.commands.grammar import HELP
from dnpo.escape import say
from dnpo.settings import conf_folder, offer

USAGE = """usage: dnpo sweep NAME [SETTING=VALUE] …
       dnpo sweep SETTING=VALUE,VALUE … [SETTING=VALUE] …
"""
HELP_TEXT = (
    "Every setting of dnpo train --help can have several values, with commas: a sweep runs all combinations, and "
    "shares what they have in common. These sweeps have names:"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dnpo sweep``.

    Args:
        arguments: the command's; None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    sweeps = {file.stem: file for file in sorted((conf_folder() / "sweep").glob("*.yaml"))}
    if not given or HELP & set(given):
        _list(sweeps)
        sys.exit(0 if given else 2)
    first = given[0]
    if "=" not in first and not first.startswith("-"):
        if first not in sweeps:
            say(f"error: {first}: there is no such sweep.{offer(first, sweeps)}", error=True)
            sys.exit(1)
        given[0] = f"+sweep={first}"
    train.main(["-m", *given])


def _list(sweeps: dict[str, Path]) -> None:
    width = max(60, min(120, shutil.get_terminal_size().columns - 1))
    wide = max(map(len, sweeps)) + 4
    say(USAGE)
    say(textwrap.fill(HELP_TEXT, width))
    say()
    for name, file in sweeps.items():
        say(textwrap.fill(_question(file), width, initial_indent=f"  {name}".ljust(wide), subsequent_indent=" " * wide))


def _question(file: Path) -> str:
    """The first sentence of a sweep's comment: the question that it answers."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @package")]
    return re.split(r"(?<=[.?])\s", " ".join(comment))[0]
