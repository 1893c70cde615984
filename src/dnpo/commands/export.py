"""Write a policy of a finished run as a self-contained folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dnpo.commands.grammar import parse, program
from dnpo.errors import DnpoError
from dnpo.escape import say


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.export``. Errors that the user can correct become one line and exit status 1."""
    parser = argparse.ArgumentParser(
        prog=program("dnpo.export", "export"),
        description="Write a policy of a finished run as a folder that needs nothing else: whole weights (LoRA "
        "adapters merged in), tokenizer, model card.",
    )
    parser.add_argument("run", type=Path, help="the run's folder, such as outputs/DATE/TIME")
    parser.add_argument(
        "--iteration", help="sft, or a number; by default the last, or the best of a run with keep=best"
    )
    parser.add_argument("--to", type=Path, required=True, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--store", type=Path, help="where the store is now, if it has moved")
    given = parse(parser, arguments)
    from dnpo.running.console import silence_libraries
    from dnpo.running.export import export

    silence_libraries()
    try:
        policy = export(given.run, given.to, given.iteration, given.store, lambda text: say(f"warning: {text}"))
    except DnpoError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)
    say(f"{policy.name} ({policy.stage}) is in {given.to}")
