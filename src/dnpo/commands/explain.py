"""Explain a command's settings: each with its default and its description.

    dnpo train --help
    dnpo train judge=openai rollout=live --help      # the settings of these options

The description is from the part's docstring, or else from the comment at the setting in ``conf/``.
"""

import inspect
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from dnpo.commands.grammar import take_folder
from dnpo.errors import SettingsError
from dnpo.escape import say
from dnpo.settings import conf_folder, locate

LEAST, MOST = 60, 110  # columns
BESIDE = 36  # the column in which a description begins
HEADING = re.compile(r"^(?:Attributes|Args):\n((?:[ ].*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", re.MULTILINE)
ROLES = re.compile(r":\w+:`~?\.?([^`]+)`")
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
TYPICAL = "typical"
LIBRARY = {"lr": "peak learning rate."}  # settings of libraries' classes that our files of settings name
START = "the iteration from which it acts; last is the run's last one."  # of any part that may begin later
COMMENT = re.compile(r"^( *)([\w]+):.*?\s#\s*(.*)$")
CHOSEN = re.compile(r"^ *- \w+@([\w.]+):.*?\s#\s*(.*)$")  # an option for another place, in the list of defaults


def show(config: str, usage: str, arguments: Sequence[str], idle: Collection[str] = ()) -> None:
    """Print all settings of a command.

    Args:
        config: name of its file in ``conf/``, whose first comment describes the command.
        usage: how the command is called.
        arguments: the arguments given with ``--help``: the options that they choose are explained.
        idle: parts and settings that have no effect here, which are left out.

    Raises:
        SettingsError: the settings cannot be read.
    """
    width = max(LEAST, min(MOST, shutil.get_terminal_size().columns - 1))
    tree, choices = _compose(config, arguments)
    tree = {name: value for name, value in tree.items() if name not in idle}
    file = conf_folder() / f"{config}.yaml"
    say(f"usage: {usage} [PART=OPTION | SETTING=VALUE] …\n")
    say(textwrap.fill(_purpose(file), width, break_on_hyphens=False))
    if choices:
        advice = f"To see the settings of another option, give it before --help: {usage} PART=OPTION --help"
        say(textwrap.fill(advice, width, break_on_hyphens=False))
    firsts = {name: value[0] if isinstance(value, list) and value else value for name, value in tree.items()}
    parts = {name: tree[name] for name, first in firsts.items() if _is_part(first)}
    comments = _comments(file)
    say("\ngeneral")
    for name, value in _flat({name: value for name, value in tree.items() if name not in (*parts, TYPICAL)}):
        _line(name, value, comments.get(name, "") or comments.get(name.rpartition(".")[0], ""), width)
    for name, value in parts.items():
        group = next((each for each in choices if each.endswith(f"@{name}")), name)  # judge@second_judge
        _head(group, choices.get(group), width)
        if isinstance(value, list):
            say(f"  a list, one for each iteration; shown here is the first, {name}.0")
        _part(name, firsts[name], width, idle)
    if TYPICAL in tree:
        say(f"\n{TYPICAL}\n  Values set by scale=…, method=… and +sweep=…, which other options refer to.")
        for name, value in _flat({TYPICAL: tree[TYPICAL]}):
            _line(name, value, comments.get(name, ""), width)


def _purpose(file: Path) -> str:
    """The first paragraph of a file's comment."""
    lines = file.read_text(encoding="utf-8").splitlines()
    paragraph = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    return " ".join(paragraph[: paragraph.index("")] if "" in paragraph else paragraph)


def _head(name: str, chosen: str | None, width: int) -> None:
    options = sorted(file.stem for file in (conf_folder() / name.partition("@")[0]).glob("*.yaml"))
    say(f"\n{name}={chosen}" if chosen else f"\n{name}")
    if chosen and len(options) > 1:
        text = f"{name}={'|'.join(options)}".replace("|", " | ")
        say(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="    "))


def _compose(config: str, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose the settings, and name the chosen options.

    If the arguments cannot be composed, such as values of a sweep, only those that choose an option are used.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    folder, others = take_folder(arguments)
    own = [f"hydra.searchpath=[file://{folder}]"] if folder else []
    given = [each for each in others if "=" in each and not each.startswith("-")]
    for overrides in (given, [each for each in given if _chooses(each)], []):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            try:
                cfg = compose(config, [*overrides, *own], return_hydra_config=True)
            except HydraException as error:
                if not overrides:
                    raise SettingsError(str(error)) from error
                continue
        choices = {str(group): str(option) for group, option in cfg.hydra.runtime.choices.items()}
        tree = {str(name): _resolve(value, cfg) for name, value in _raw(cfg).items() if name != "hydra"}
        return tree, choices
    raise AssertionError("composing without arguments has neither worked nor failed")


def _chooses(argument: str) -> bool:
    group, _, option = argument.partition("=")
    return bool(option) and (conf_folder() / group / f"{option}.yaml").is_file()


def _raw(node: Any) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))


@dataclass(frozen=True)
class Follows:
    """A default value that is another setting's value."""

    value: Any
    setting: str


def _resolve(value: Any, cfg: DictConfig) -> Any:
    """Replace references to other settings by their values."""
    if isinstance(value, dict):
        return {name: _resolve(each, cfg) for name, each in value.items()}
    if isinstance(value, list):
        return [_resolve(each, cfg) for each in value]
    reference = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is None:
        return value
    found = OmegaConf.select(cfg, reference[1])
    if isinstance(found, DictConfig):
        return _resolve(_raw(found), cfg)
    return Follows(found, reference[1])


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _part(place: str, settings: Mapping[str, Any], width: int, idle: Collection[str]) -> None:
    """Print one part's purpose and settings, then its inner parts."""
    target = str(settings["_target_"])
    own = {name: value for name, value in settings.items() if not name.startswith("_")}
    if not target.startswith("dnpo."):
        _wrap(f"Settings of {target}.", width)
        words = {name: LIBRARY.get(name, f"as {target.rpartition('.')[2]} defines it.") for name in own}
    else:
        part = locate(place, target)
        purpose = (inspect.getdoc(part) or "").split("\n\n")[0]
        _wrap(_unmarked(purpose), width)
        words = {"start": START, **describe(part)}
        own |= _defaults(part, own)
    own = {name: value for name, value in own.items() if f"{place}.{name}" not in idle}
    inner = {name: value for name, value in own.items() if _is_part(value)}
    for name, value in own.items():
        if name not in inner:
            for dotted, leaf in _flat({name: value}):
                _line(f"{place}.{dotted}", leaf, words.get(name, ""), width)
    for name, value in inner.items():
        _wrap(f"{place}.{name}:" + (f" {words[name]}" if name in words else ""), width)
        _part(f"{place}.{name}", value, width, idle)


def _wrap(text: str, width: int) -> None:
    say(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


def describe(part: Any) -> dict[str, str]:
    """Descriptions of a part's settings, from its docstring and its base classes', with the values they may have."""
    found: dict[str, str] = {}
    kinds = reversed(inspect.getmro(part)) if inspect.isclass(part) else [part]
    for kind in kinds:
        section = HEADING.search((inspect.cleandoc(kind.__doc__) if kind.__doc__ else "") + "\n")
        for names, text in ENTRY.findall(section[1]) if section else ():
            found |= {name.strip(): _as_setting(_unmarked(text)) for name in names.split(",")}
    for name, (what, words) in _choices(part).items():
        if not all(word in found.get(name, "") for word in words):
            found[name] = f"{found.get(name, '').rstrip('.')}; {what} {', '.join(words)}".lstrip("; ")
    return found


def _choices(part: Any) -> dict[str, tuple[str, list[str]]]:
    """The words among which the values of a setting, or the keys of a mapping, must be, and what they are."""
    try:
        hints = get_type_hints(
            part.__init__ if inspect.isclass(part) and not hasattr(part, "__dataclass_fields__") else part
        )
    except NameError:  # a type that is imported only for type checkers
        return {}
    found: dict[str, tuple[str, list[str]]] = {}
    for name, hint in hints.items():
        for what, those in (("fields:", _keys(hint)), ("one of", [hint])):
            words = [word for each in those for word in _literals(each) if isinstance(word, str)]
            if len(words) > 1:
                found.setdefault(name, (what, words))
    return found


def _literals(hint: Any) -> Iterator[Any]:
    """The words that a type allows as values, not those of the keys of mappings."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    else:
        for each in get_args(hint)[_is_mapping(hint) :]:
            yield from _literals(each)


def _keys(hint: Any) -> Iterator[Any]:
    """The types of the keys of all mappings in a type."""
    if _is_mapping(hint):
        yield get_args(hint)[0]
    for each in get_args(hint):
        yield from _keys(each)


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, Mapping)


def _defaults(part: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a part that its file in ``conf/`` leaves at their defaults."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(part).parameters.values()
        if parameter.default is not parameter.empty
        and parameter.name not in own
        and (parameter.default is None or isinstance(parameter.default, bool | int | float | str))
    }


def _comments(file: Path) -> dict[str, str]:
    """The comments at the settings in a file, by dotted name."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        chosen = CHOSEN.match(line)
        if chosen is not None:
            found[chosen[1]] = chosen[2]
        key = re.match(r"^( *)(\w+):", line)
        if key is None:
            continue
        depth = len(key[1])
        path = [*((at, name) for at, name in path if at < depth), (depth, key[2])]
        comment = COMMENT.match(line)
        if comment is not None:
            found[".".join(name for _, name in path)] = comment[3]
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value and "_target_" not in value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _line(name: str, value: Any, words: str, width: int) -> None:
    """Print a setting with its default, and its description next to it or below."""
    given = f"  {name} = {_spell(value)}"
    if not words:
        say(given)
        return
    text = textwrap.wrap(words, width - BESIDE, break_on_hyphens=False)
    beside = len(given) < BESIDE - 1
    say(given.ljust(BESIDE) + text[0] if beside else given)
    for line in text[1:] if beside else text:
        say(" " * BESIDE + line)


def _spell(value: Any) -> str:
    """Write a value as on the command line."""
    if isinstance(value, Follows):
        return f"{_spell(value.value)} ({value.setting})"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping) and "_target_" in value:
        return f"({str(value['_target_']).rpartition('.')[2]})"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_spell, value))}]"
    if value == "???":
        return "(has to be given)"
    return repr(value) if isinstance(value, str) and (not value or value != value.strip()) else str(value)


def _as_setting(text: str) -> str:
    """A docstring's text in the words of settings: None is ``null`` there."""
    return re.sub(r"\bNone\b", "null", text)


def _unmarked(text: str) -> str:
    """A docstring's text without marks."""
    return " ".join(ROLES.sub(r"\1", text).replace("``", "").split())
