"""Write a policy of a finished run as a self-contained folder."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dnpo.commands.grammar import Parser, parse, program
from dnpo.commands.sample import name_policy
from dnpo.errors import DnpoError
from dnpo.escape import announce, say, tell

if TYPE_CHECKING:
    from dnpo.running.card import SavedPolicy


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.export``. Errors that the user can correct become one line and exit status 1."""
    parser = Parser(
        prog=program("dnpo.export", "export"),
        description="Write a policy of a finished run as a folder that needs nothing else: whole weights (LoRA "
        "adapters merged in), tokenizer, model card.",
    )
    parser.add_argument("run", type=Path, help="the run's folder, such as outputs/DATE/TIME")
    parser.add_argument(
        "--iteration", help="sft, or a number; by default the last, or the best of a run with keep=best"
    )
    parser.add_argument("--to", type=Path, help="a folder that does not exist yet, or is empty; needed without push")
    parser.add_argument("--store", type=Path, help="where the store is now, if it has moved")
    parser.add_argument(
        "--push",
        metavar="REPO",
        help="USER/NAME or NAME on the hub of HF_ENDPOINT: push the policy, and the pairs it was trained on as a data "
        "set of the same name, with cards; the token is read from HF_TOKEN or the login of huggingface_hub",
    )
    parser.add_argument(
        "--format",
        choices=("transformers", "gguf"),
        default="transformers",
        help="gguf is for llama.cpp, whose convert_hf_to_gguf.py has to be on the PATH; transformers if not given",
    )
    parser.add_argument("--public", action="store_true", help="let everyone see what is pushed; private if not given")
    given = parse(parser, arguments)
    if given.to is None and given.push is None:
        parser.error("to=FOLDER or push=REPO is needed")
    if given.public and given.push is None:
        parser.error("public=true needs push=REPO")
    announce(f"exporting {name_policy(given.iteration)} of {given.run}")
    from dnpo.running.console import silence_libraries

    silence_libraries()
    try:
        with _folder(given.to) as to:
            policy = _export(given, to)
            if given.to is not None:
                say(f"{policy.name} ({policy.stage}) is in {given.to}")
            if given.push is not None:
                from dnpo.running.push import push

                for pushed in push(policy, to, given.push, public=given.public, say=say):
                    say(f"{pushed.url} has {pushed.what} ({'public' if given.public else 'private'})")
    except DnpoError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)


def _export(given: argparse.Namespace, to: Path) -> "SavedPolicy":
    from dnpo.running.export import expect_new, export

    def warn(text: str) -> None:
        tell(f"warning: {text}")

    if given.format == "transformers":
        return export(given.run, to, given.iteration, given.store, warn)
    from dnpo.running.gguf import convert, find_converter

    converter = find_converter()
    expect_new(to)
    with tempfile.TemporaryDirectory(prefix="dnpo-") as folder:
        copy = Path(folder) / to.absolute().name
        policy = export(given.run, copy, given.iteration, given.store, warn)
        convert(converter, copy, to)
    return policy


@contextmanager
def _folder(to: Path | None) -> Iterator[Path]:
    """The folder for the copy; a temporary one if none is given."""
    if to is not None:
        yield to
        return
    with tempfile.TemporaryDirectory(prefix="dnpo-") as folder:
        yield Path(folder) / "model"
