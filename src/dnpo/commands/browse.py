"""``dnpo browse [RUN …]``: a page on this machine that shows the rows of runs."""

import argparse
import os
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from dnpo.commands.grammar import Parser, parse
from dnpo.errors import DnpoError
from dnpo.escape import announce, say
from dnpo.tracking.client import default_uri
from dnpo.wording import plural

PORT = 8463


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C. Errors that the user can correct become one line and exit status 1."""
    given = parse(_parser(), arguments)
    try:
        _browse(given)
    except DnpoError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)
    except KeyboardInterrupt:  # while it reads the rows
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dnpo browse",
        description="Show the rows of finished runs in a browser, on a page that only this machine can open: held-out "
        "answers of all policies side by side, and training pairs. Nothing is written.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="a run's or a sweep's folder, a tracked run's id or its beginning, or a sweep's name (default: the newest "
        "run in outputs/)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        help="of the page (default: %(default)s); 0 takes any free port, so links do not last",
    )
    parser.add_argument("--no-open", action="store_true", help="do not open the page in a browser")
    parser.add_argument("--store", type=Path, help="where the store is now, if it has moved")
    parser.add_argument(
        "--uri",
        default=default_uri(),
        help="where runs were tracked (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)",
    )
    parser.add_argument("--experiment", default="dnpo", help="MLflow experiment (default: %(default)s)")
    return parser


def _browse(given: argparse.Namespace) -> None:
    announce(f"reading {', '.join(given.runs) or 'the newest run in outputs/'}")
    from dnpo.browse.runs import find
    from dnpo.browse.server import LOOPBACK, listen, make_app, serve

    clock = time.monotonic()
    opened = listen(given.port)
    with opened:
        runs = find(given.runs, given.store, given.uri, given.experiment)
        app = make_app(runs)
        address = f"http://{LOOPBACK}:{opened.getsockname()[1]}/"
        took = time.monotonic() - clock
        opened.listen()  # a browser may ask as soon as it knows the address, before the server runs
        say(f"{plural(len(runs), 'run')} read in {took:.1f} s: {address}  (Ctrl-C ends it)")
        if not given.no_open and _has_screen():
            webbrowser.open(address)
        serve(app, opened)


def _has_screen() -> bool:
    """Whether a graphical browser can be opened; otherwise Python would start a text browser in this terminal."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
