"""``dnpo VERB …``: all commands of the laboratory under one name.

Each verb is a function, which is imported only when it is called, so that ``dnpo --help`` is fast.
"""

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from dnpo import __version__, garbage, interrupts, output
from dnpo.commands.verbs import VERBS
from dnpo.escape import announce, say

USAGE = """usage: dnpo VERB [setting=value] …
A laboratory for LLM self-improvement with synthetic preference data.
"""
ADVICE = """
dnpo VERB --help explains the settings of a verb, each written setting=value.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dnpo``.

    Args:
        arguments: the command's; None: those of the process.
    """
    output.outlive_readers()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        say(usage())
        return
    if given[0] in ("-V", "--version"):
        say(f"dnpo {__version__}")
        return
    name = next((name for name in (" ".join(given[:2]), given[0]) if name in VERBS), "")
    if not name:
        _refuse(given)
    garbage.leave_at_exit()
    verb = VERBS[name]
    rest = given[len(name.split()) :]
    try:
        if verb.module.startswith("analysis") and not {"-h", "--help"} & set(rest):  # its imports take seconds
            announce(" ".join([name, *rest]))
        with interrupts.raised():
            status = _function(verb.module)([*verb.before, *rest])
    except KeyboardInterrupt as interrupt:  # during imports, or in a verb that does not catch it
        say("\nInterrupted.")
        sys.exit(interrupts.exit_status(interrupt))
    sys.exit(status)


def usage() -> str:
    """The help of the command, one screen."""
    wide = max(map(len, VERBS))
    lines = [f"  {name:{wide}}  {verb.purpose}" for name, verb in VERBS.items()]
    return USAGE + "\n" + "\n".join(lines) + "\n" + ADVICE.rstrip()


def _function(module: str) -> Callable[[Sequence[str]], int | None]:
    if module.startswith("analysis"):
        _find_analysis()
    found: Callable[[Sequence[str]], int | None] = import_module(module).main
    return found


def _find_analysis() -> None:
    """Make figures and claims importable: they are next to ``src/`` in a checkout, in ``dnpo/checkout`` in a wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here / "checkout", here.parent.parent):
        if (folder / "analysis" / "__init__.py").is_file():
            sys.path.insert(0, str(folder))
            return


def _refuse(given: Sequence[str]) -> None:
    """Refuse a verb that does not exist, and name the most similar one."""
    group = [name for name in VERBS if name.startswith(f"{given[0]} ")]
    if group:
        say(f"usage: dnpo {given[0]} {'|'.join(name.split()[1] for name in group)} [setting=value] …", error=True)
        sys.exit(2)
    if "=" in given[0] or given[0].startswith("-"):
        advice = f" For a run: dnpo train {' '.join(given)}"
    else:
        near = get_close_matches(given[0], VERBS, 1)
        advice = f" Did you mean {near[0]}?" if near else ""
    say(f"error: {given[0]}: there is no such verb.{advice}\n       dnpo --help lists them.", error=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
