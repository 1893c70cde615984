"""List the methods, or explain one of them, from the comments of their files in ``conf/method/``."""

import itertools
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dnpo.commands.grammar import take_folder
from dnpo.errors import SettingsError
from dnpo.escape import fold, say
from dnpo.settings import conf_folder, nearest

USAGE = "usage: dnpo methods [NAME] [--config-dir=FOLDER]"
HELP_TEXT = (
    "Without a name: all methods, with their sources. With one: its options, deviations, commands. With --config-dir: "
    "also the methods in FOLDER/method, a folder of settings of your own."
)
BEGINS = re.compile(r" (?=(?:Deviations?|Expected)\b[^.:]*:)")  # where a further paragraph begins
ITEM = re.compile(r"(?<=[.:]) (?=\d\. )")
SOURCE = re.compile(r"\(([^()]*(?:19|20)\d\d[^()]*|[^()]*(?:paper|proposal)[^()]*)\)")


@dataclass(frozen=True)
class Header:
    """The comment of a method's file.

    Attributes:
        summary: a description in one sentence.
        source: the paper in brackets, if the summary names one.
        lines: the whole comment.
        commands: the commands that run it.
    """

    summary: str
    source: str
    lines: tuple[str, ...]
    commands: tuple[str, ...]

    @classmethod
    def read(cls, file: Path) -> "Header":
        """Read the comment at the head of a file."""
        lines = []
        for line in file.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            if not line.startswith("# @package"):
                lines.append(line[1:].removeprefix(" "))
        text = " ".join(lines[: lines.index("")] if "" in lines else lines)
        summary = re.split(r"(?<=[.])\s+(?=[A-Z])", text)[0]
        source = SOURCE.search(summary)
        commands = tuple(line.strip() for line in lines if line.strip().startswith("python -m dnpo.train"))
        without = summary if source is None else SOURCE.sub("", summary, count=1)
        return cls(re.sub(r"\s+([:.,])", r"\1", without), source[1] if source else "", tuple(lines), commands)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dnpo methods``.

    Args:
        arguments: the command's; None: those of the process.
    """
    try:
        own, given = take_folder(sys.argv[1:] if arguments is None else arguments)
    except SettingsError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)
    folders = [*([own] if own else []), conf_folder()]  # of two files with one name, Hydra takes dnpo's
    found = {file.stem: file for folder in folders for file in (folder / "method").glob("*.yaml")}
    files = dict(sorted(found.items()))
    if {"-h", "--help"} & set(given) or len(given) > 1:
        say(f"{USAGE}\n\n{textwrap.fill(HELP_TEXT, _width())}")
        sys.exit(0 if len(given) == 1 else 2)
    if not given:
        _list(files, f"--config-dir={shlex.quote(str(own))} " if own else "")
    elif given[0] in files:
        for line in _explain(Header.read(files[given[0]]).lines):
            say(line)
        say("\nIts settings:\n")
        say("\n".join(_words(files[given[0]])))
    else:
        say(f"error: {given[0]}: there is no such method.{nearest(given[0], list(files))}", error=True)
        sys.exit(1)


def _explain(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a comment as wide as the terminal; each numbered deviation begins on a line of its own."""
    for begins, group in itertools.groupby(lines, key=lambda line: not line.strip() or line.startswith("  python")):
        if begins:
            yield from group
            continue
        for paragraph in BEGINS.split(" ".join(line.strip() for line in group)):
            for line in ITEM.sub("\n  ", paragraph).split("\n"):
                yield fold(line, _width() + 1, hang=5 if line.startswith("  ") else 0)


def _list(files: dict[str, Path], option: str) -> None:
    """Print a line or more for each method, and the commands that use them, with an option for an own folder."""
    width = _width()
    wide = max(map(len, files))
    for name, file in files.items():
        header = Header.read(file)
        text = header.summary + (f" [{header.source}]" if header.source else "")
        lines = textwrap.wrap(text, width - wide - 2, break_on_hyphens=False) or [""]
        say(f"{name:{wide}}  {lines[0]}")
        for line in lines[1:]:
            say(f"{'':{wide}}  {line}")
    say(f"\nRun one:        dnpo train {option}method=NAME")
    say(f"Compare some:   dnpo sweep {option}method=spin,dnpo seed=0,1,2")
    say(f"Explain one:    dnpo methods {option}NAME")


def _width() -> int:
    return max(60, min(120, shutil.get_terminal_size().columns - 1))


def _words(file: Path) -> list[str]:
    """The settings of a method's file, without its comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    start = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [f"    {line}" for line in lines[start:] if line.strip()]
