"""Talk to a policy of a finished run, or to two of them side by side: ``dnpo chat RUN [against=K]``."""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from dnpo.commands.grammar import Parser, parse, program
from dnpo.commands.sample import add_sampling, announce_policies, chosen, open_policies
from dnpo.errors import DnpoError
from dnpo.escape import for_terminal, say, tell
from dnpo.wording import plural

GAP = 3  # columns between two responses
LEAST = 90  # columns that a terminal needs to show two responses side by side
KEYS = "/new forgets the conversation, /again samples another response, /quit or Ctrl-D ends."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dnpo chat``. Errors that the user can correct become one line and exit status 1.

    Args:
        arguments: the command's; None: those of the process.
    """
    parser = Parser(
        prog=program("dnpo.commands.chat", "chat"),
        description="Talk to a policy of a finished run, or to two of them side by side with the judge's opinion.",
    )
    add_sampling(parser)
    parser.add_argument("--against", metavar="K", help="a second policy of the run, sft or a number")
    parser.add_argument("--ledger", type=Path, default=Path("ledger.sqlite"), help="file of judge calls (%(default)s)")
    given = parse(parser, arguments)
    try:
        _talk(given)
    except DnpoError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)
    except KeyboardInterrupt:
        say("")
        sys.exit(130)


def _talk(given: argparse.Namespace) -> None:
    iterations = [given.iteration, *([given.against] if given.against else [])]
    announce_policies(given, iterations)
    from dnpo.records import Message
    from dnpo.running.talk import open_judge, opinions, user

    speakers, saved = open_policies(given, iterations)
    judge = open_judge(saved)
    names = " and ".join(speaker.name for speaker in speakers)
    tell(f"{names} of {given.run}, {chosen(speakers[0])}. {KEYS}")
    if isinstance(judge, str) and len(speakers) > 1:
        tell(f"No judge gives an opinion: {judge}.")
    histories: list[list[Message]] = [[] for _ in speakers]
    seed, asked = given.seed, ""
    for text in _lines():
        if text == "/quit":
            break
        if text == "/new":
            histories = [[] for _ in speakers]
            say("(a new conversation)")
            continue
        if text == "/again":
            if not asked:
                say("(nothing was asked yet)")
                continue
            seed += 1
            histories = [history[:-2] for history in histories]
            text = asked
        elif text.startswith("/"):
            tell(f"({text.split()[0]} is not known. {KEYS})")
            continue
        asked = text
        turns = [[*history, user(text)] for history in histories]
        try:
            responses = [s.respond([turn], seed)[0][0] for s, turn in zip(speakers, turns, strict=True)]
        except DnpoError as error:
            tell(f"({error}; /new begins again)")
            continue
        histories = [
            [*turn, {"role": "assistant", "content": response.text}]
            for turn, response in zip(turns, responses, strict=True)
        ]
        notes = [
            f"{plural(r.tokens, 'token')}, log p {r.logprob:.1f}".replace("-", "−") + ", cut" * (r.finish == "length")
            for r in responses
        ]
        if not isinstance(judge, str):
            scores = opinions(judge, turns, responses, Path(given.ledger))
            notes = [f"{note}, judge {score}" for note, score in zip(notes, scores, strict=True)]
        _show([speaker.name for speaker in speakers], [response.text for response in responses], notes)


def _lines() -> Iterator[str]:
    """What is typed, line by line; empty lines are left out."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def _show(names: Sequence[str], texts: Sequence[str], notes: Sequence[str]) -> None:
    """Print the responses, two of them side by side if the terminal is wide enough."""
    width = shutil.get_terminal_size().columns
    blocks = [
        [f"[{name}: {note}]", *for_terminal(text).splitlines()]
        for name, text, note in zip(names, texts, notes, strict=True)
    ]
    if len(blocks) < 2 or width < LEAST:
        for block in blocks:
            say("\n".join(block))
        return
    wide = (width - GAP) // 2
    left, right = ([line for text in block for line in textwrap.wrap(text, wide) or [""]] for block in blocks)
    for n in range(max(len(left), len(right))):
        a, b = (side[n] if n < len(side) else "" for side in (left, right))
        say(f"{a:{wide + GAP}}{b}".rstrip())
