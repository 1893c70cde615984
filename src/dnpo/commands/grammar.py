"""One form of arguments for every command: ``setting=value``.

Commands whose settings are files in ``conf/``, such as training, pass their arguments to Hydra, which reads
``setting=value``. Other commands read them with an ``argparse`` parser, for which ``to=FOLDER`` and ``--to FOLDER``
mean the same.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dnpo import output
from dnpo.errors import SettingsError
from dnpo.escape import say, tell
from dnpo.settings import offer

HYDRA = {  # Hydra's options, which have dashes
    "--hydra-help",
    "--cfg",
    "-c",
    "--resolve",
    "--package",
    "-p",
    "--run",
    "-r",
    "--multirun",
    "-m",
    "--shell-completion",
    "-sc",
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--experimental-rerun",
    "--info",
    "-i",
}
HELP = {"--help", "-h"}
COMPLETES = "DNPO_COMPLETES"  # variable that is set when only the settings are asked for, see completion.py
VERSION = {"--version", "-V"}
ASSIGNMENT = re.compile(r"([A-Za-z]\w*)=(.*)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose help and errors write settings as ``setting=value``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)
        self._positionals.title, self._optionals.title = "arguments", "settings"

    def error(self, message: str) -> NoReturn:
        """End the process with status 2, and a message that names settings without dashes."""
        for option in sorted(self._option_string_actions, key=len, reverse=True):
            if option.startswith("--") and option not in HELP:
                message = message.replace(option, _name(option))
        self.print_usage(sys.stderr)
        tell(f"{self.prog}: error: {message}", error=True)
        self.exit(2)


class _Help(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        plain = not action.option_strings or HELP & set(action.option_strings)
        return super()._format_action_invocation(action) if plain else _written(action)

    def _format_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None,
    ) -> str:
        actions = list(actions)
        settings = [each for each in actions if each.option_strings and not HELP & set(each.option_strings)]
        words = [
            "%(prog)s",
            *(
                self._format_args(each, self._get_default_metavar_for_positional(each)).replace("%", "%%")
                for each in actions
                if not each.option_strings
            ),
            *(_written(each) for each in settings if each.required),
            *(["[setting=value] …"] if any(not each.required for each in settings) else ()),
        ]
        return super()._format_usage(" ".join(words), actions, groups, prefix)


def _name(option: str) -> str:
    """The name of the setting for an option, such as ``log`` for ``--no-log``."""
    return option.removeprefix("--").removeprefix("no-").replace("-", "_")


def _written(action: argparse.Action) -> str:
    """How to write a setting, such as ``to=FOLDER`` or ``log=false``."""
    option = next(each for each in action.option_strings if each.startswith("--"))
    if not _takes_values(action):
        return f"{_name(option)}={'false' if option.startswith('--no-') else 'true'}"
    value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    several = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    return f"{_name(option)}={value}{',…' * several}"


def program(module: str, verb: str) -> str:
    """The form in which the user called a command: ``dnpo VERB`` or ``python -m MODULE``."""
    called = Path(sys.argv[0])
    ours = called.stem == "dnpo" or (called.stem == "__main__" and called.parent.name == "dnpo")
    return f"dnpo {verb}" if ours else f"python -m {module}"


def take_folder(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Split arguments into the user's folder of settings, given by Hydra's option ``--config-dir``, and all others.

    Raises:
        SettingsError: there is no such folder.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    given, others = parser.parse_known_args(arguments)
    if given.config_dir is None:
        return None, others
    folder = Path(given.config_dir).absolute()
    if not folder.is_dir():
        raise SettingsError(f"--config-dir={given.config_dir}: expected a folder with settings")
    return folder, others


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse arguments; some may be written ``setting=value``.

    A setting that can be given several times takes commas: ``sweep=main,ablation``. A switch takes true or false.
    Errors end the process with a message and status 1, or argparse's own status 2.

    Args:
        arguments: the arguments of the command; None: those of the process.
    """
    output.outlive_readers()
    given = sys.argv[1:] if arguments is None else list(arguments)
    if COMPLETES in os.environ:
        say("\n".join(_settings(parser, given)))
        sys.exit(0)
    try:
        return parser.parse_args(list(with_dashes(parser, given)))
    except SettingsError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)


def with_dashes(parser: argparse.ArgumentParser, given: Sequence[str]) -> Iterator[str]:
    """Rewrite every ``setting=value`` as argparse reads it.

    Raises:
        SettingsError: there is no such setting, or a switch has another value than true or false.
    """
    options = _options(parser, given)
    value_of_option = False
    for argument in given:
        match = ASSIGNMENT.fullmatch(argument)
        dashed = re.match(r"--([A-Za-z][\w-]*)", argument)
        if dashed and not value_of_option and not any(each.startswith(dashed[0]) for each in options):
            name = dashed[1].replace("-", "_")
            raise SettingsError(
                f"{argument}: settings are written without dashes, and there is no setting {name} here."
                f"{offer(name, _known(options))}"
            )
        if match is None or value_of_option or _is_path(argument, options):
            value_of_option = argument.startswith("--") and "=" not in argument and _takes_values(options.get(argument))
            yield argument
            continue
        yield from _option(options, match[1], match[2], argument)


def _options(parser: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, argparse.Action]:
    """The options of a parser, and of the subcommand in the arguments, by their written form."""
    options: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            named: Mapping[str, argparse.ArgumentParser] = action.choices
            chosen = next((each for each in given if each in named), None)
            options |= _options(named[chosen], []) if chosen is not None else {}
        options |= dict.fromkeys(action.option_strings, action)
    return options


def _settings(parser: argparse.ArgumentParser, given: Sequence[str]) -> Iterator[str]:
    """The settings of a parser, each with its possible values if they are listed; the subcommands if none is given."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and not set(given) & set(action.choices):
            yield from action.choices
    for option, action in _options(parser, given).items():
        if option.startswith("--") and option not in HELP:
            name = _name(option)
            words = action.choices or (() if _takes_values(action) else ("true", "false"))
            yield from (f"{name}={word}" for word in words) if words else (f"{name}=",)


def _is_path(argument: str, options: Mapping[str, argparse.Action]) -> bool:
    """Whether an argument with = is an existing file or folder instead of a setting."""
    return f"--{argument.partition('=')[0].replace('_', '-')}" not in options and Path(argument).exists()


def _known(options: Mapping[str, argparse.Action]) -> list[str]:
    """The names of all settings."""
    return sorted(_name(each) for each in options if each.startswith("--") and each not in HELP)


def _takes_values(action: argparse.Action | None) -> bool:
    return action is not None and action.nargs != 0


def _option(options: Mapping[str, argparse.Action], name: str, value: str, written: str) -> Iterator[str]:
    long, negative = f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}"
    action = options.get(long) or options.get(negative)
    if action is None:
        raise SettingsError(f"{written}: there is no setting {name} here.{offer(name, _known(options))}")
    if not _takes_values(action):
        if value.lower() not in ("true", "false"):
            raise SettingsError(f"{written}: expected {name}=true or {name}=false")
        if (value.lower() == "true") == (long in options):
            yield long if long in options else negative
        return
    yield long
    pairs = "=" in str(action.metavar)  # such as NAME=VALUE, whose value may have commas
    several = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    values = value.split(",") if several and not pairs else [value]
    yield values[0]
    for further in values[1:]:
        if isinstance(action, argparse._AppendAction):
            yield long
        yield further


class Dashed(NamedTuple):
    """An argument with dashes that is none of Hydra's options.

    Attributes:
        written: as it was given.
        setting: its name as that of a setting.
        value: its value; "" if it has none.
    """

    written: str
    setting: str
    value: str


def find_dashes(arguments: Sequence[str]) -> Dashed | None:
    """Find the first argument such as ``--seed 1``, ``--seed=1``, ``--plan`` or ``-j 2`` that Hydra does not know.

    Args:
        arguments: the arguments for Hydra.
    """
    short = {name[:2] for name in HYDRA | HELP | VERSION if name[1] != "-"}  # also before a value, such as -cjob
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        known = name in HYDRA | HELP | VERSION if name.startswith("--") else name[:2] in short
        if not name.startswith("-") or known or not name.strip("-"):
            continue
        following = arguments[place + 1 : place + 2]
        if not equals and following and "=" not in following[0] and not following[0].startswith("-"):
            value, argument = following[0], f"{argument} {following[0]}"
        return Dashed(argument, name.lstrip("-").replace("-", "_"), value)
    return None
