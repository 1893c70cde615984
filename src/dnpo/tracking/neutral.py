"""Which settings of a tracked run cannot have changed its results: read from the parts themselves."""

from collections.abc import Mapping
from functools import cache

from dnpo.errors import SettingsError
from dnpo.former import MOVED
from dnpo.settings import CONTENTS, OWN, locate, neutral_names
from dnpo.stages.plan import RunSettings

TARGET = "_target_"


def find_neutral(params: Mapping[str, str]) -> frozenset[str]:
    """Names of the settings of a run that cannot have changed its results.

    A setting that says where something lies (a path) counts as one only where the run also says what lay there.

    Args:
        params: the run's settings under dotted names.
    """
    found = {*neutral_names(RunSettings), *(name for name in params if name.startswith("tracking."))}
    for name, value in params.items():
        prefix, _, last = name.rpartition(".")
        if last == TARGET and value.startswith(OWN):
            found |= {f"{prefix}.{each}" for each in _neutral_of(value, f"{prefix}.{CONTENTS}" in params)}
    return frozenset(found)


@cache
def _neutral_of(target: str, contents_known: bool) -> tuple[str, ...]:
    """Of a part by its import path; none of one that is no longer there."""
    try:
        part = locate(TARGET, MOVED.get(target, target))
    except SettingsError:
        return ()
    return tuple(neutral_names(part, places=contents_known))
