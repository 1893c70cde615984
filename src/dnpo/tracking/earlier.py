"""Bring the settings of runs of earlier versions up to date: import paths, and settings that did not exist yet.

The default of a new setting does what dnpo did before, so a run without the setting had that default. Without this,
runs of two versions could not be compared, although they share their stages.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from dnpo.errors import SettingsError
from dnpo.former import MOVED, MOVED_AT, PARTIAL
from dnpo.settings import OWN, locate
from dnpo.stages.plan import Plan, RunSettings

TARGET = "_target_"


def rename(params: Mapping[str, str]) -> dict[str, str]:
    """Bring the import paths of parts up to date, and leave out ``_partial_``, which no part has any more.

    Args:
        params: the settings that a run recorded, under dotted names.
    """
    found = {}
    for name, value in params.items():
        prefix, _, last = name.rpartition(".")
        if last != PARTIAL:
            found[name] = MOVED_AT.get((prefix, value), MOVED.get(value, value)) if last == TARGET else value
    return found


def complete(params: Mapping[str, str]) -> dict[str, str]:
    """Add the defaults of settings that a run did not record.

    Args:
        params: the run's settings under dotted names, with the present import paths of parts.
    """
    if not any(name.endswith(f".{TARGET}") for name in params):  # not a run of dnpo, or a run that recorded nothing
        return dict(params)
    given = dict(params)
    begun = {name[: i + 1] for name in params for i, sign in enumerate(name) if sign == "."}

    def add(name: str, value: str) -> None:
        if name not in given and f"{name}." not in begun:
            given[name] = value

    for name, value in _defaults(RunSettings):
        add(name, value)
    for name, target in _default_parts():
        if f"{name}." not in begun and name not in given:
            given[f"{name}.{TARGET}"] = target
    for name, target in list(given.items()):
        prefix, _, last = name.rpartition(".")
        if last == TARGET and target.startswith(OWN):
            for setting, value in _defaults_of(target):
                add(f"{prefix}.{setting}", value)
    return given


def knows(target: str, setting: str) -> bool:
    """Whether this version's part with this import path has a setting; True of parts that are not dnpo's own."""
    if not target.startswith(OWN):
        return True
    try:
        part = locate(TARGET, target)
    except SettingsError:
        return False
    return not dataclasses.is_dataclass(part) or setting in {each.name for each in dataclasses.fields(part)}


def _defaults(part: Any) -> Iterator[tuple[str, str]]:
    for each in dataclasses.fields(part):
        if each.default is not dataclasses.MISSING:
            yield each.name, str(each.default)


@cache
def _defaults_of(target: str) -> tuple[tuple[str, str], ...]:
    """The defaults of the part with this import path; none if the part no longer exists."""
    try:
        part = locate(TARGET, target)
    except SettingsError:
        return ()
    return tuple(_defaults(part)) if dataclasses.is_dataclass(part) else ()


@cache
def _default_parts() -> tuple[tuple[str, str], ...]:
    """The parts of an iteration that have a default, with its import path."""
    factories: dict[str, Any] = {each.name: each.default_factory for each in dataclasses.fields(Plan)}
    return tuple((name, _path_of(part)) for name, part in factories.items() if isinstance(part, type))


def _path_of(part: type) -> str:
    """The import path of a part as written in ``conf/``: through its package if that exports the part."""
    package = part.__module__.rpartition(".")[0]
    offered = getattr(sys.modules[package], part.__name__, None) is part
    return f"{package if offered else part.__module__}.{part.__name__}"
