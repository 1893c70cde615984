"""The settings that ``dnpo claims`` and ``dnpo claims plan`` share, and how both commands end."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.claims_book import FILE, Book
from dnpo.commands.grammar import Parser, parse, program
from dnpo.errors import DnpoError, SettingsError
from dnpo.escape import tell
from dnpo.tracking.client import default_uri
from dnpo.wording import ranges


def make_parser(module: str, verb: str, description: str, seeds: str) -> argparse.ArgumentParser:
    """The parser of a command on a file of claims, with the settings that all such commands have.

    Args:
        module, verb: the two names of the command.
        seeds: help on the setting ``seeds``.
    """
    options = Parser(prog=program(module, verb), description=description)
    options.add_argument(
        "--uri",
        default=default_uri(),
        help="MLflow tracking store (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    options.add_argument("--experiment", default="dnpo", help="MLflow experiment (default: %(default)s)")
    options.add_argument("--claims", type=Path, default=FILE, metavar="FILE", help="the file of claims")
    options.add_argument(
        "--out",
        type=Path,
        default=Path("claims"),
        metavar="FOLDER",
        help="folder of the results (default: %(default)s)",
    )
    options.add_argument("--seeds", help=seeds)
    options.add_argument(
        "--tag", action="append", default=[], metavar="NAME=VALUE", help="a tag or setting that runs must have"
    )
    return options


def execute(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None,
    interrupted: str = "",
) -> int:
    """Run a command and return its exit status; errors that the user can correct become messages.

    Args:
        arguments: arguments of the command; None: those of the process.
        interrupted: what follows ``Interrupted.`` after Ctrl-C.
    """
    options = parse(parser, arguments)
    try:
        return body(options)
    except DnpoError as error:
        tell(f"error: {error}", error=True)
        return 1
    except KeyboardInterrupt:
        tell(f"\nInterrupted. {interrupted}".rstrip(" "))
        return 130


def choose_seeds(book: Book, options: argparse.Namespace) -> list[int] | None:
    """The seeds to use: the requested ones, or else the file's; None: all, in an exploratory table.

    Raises:
        SettingsError: they are not numbers, or the file does not fix them and the table is not exploratory.
    """
    text = options.seeds or ""
    if not text:
        return None if options.exploratory else list(book.seeds)
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise SettingsError(f"seeds={text}: expected whole numbers with commas, such as 5,6,7")
    seeds = sorted({int(part) for part in text.split(",")})
    if not options.exploratory and (others := set(seeds) - set(book.seeds)):
        raise SettingsError(
            f"seeds={text}: {book.path.name} fixes seeds {ranges(book.seeds)}, so {ranges(sorted(others))} cannot test "
            "its claims; exploratory=true takes any, and marks the results"
        )
    return seeds


def pair_tags(given: Sequence[str]) -> dict[str, str]:
    """Names and values of the tags that runs must have.

    Raises:
        SettingsError: one has no value.
    """
    for pair in given:
        if "=" not in pair:
            raise SettingsError(f"tag={pair}: expected NAME=VALUE, such as data.train=4800")
    return dict(pair.split("=", 1) for pair in given)
