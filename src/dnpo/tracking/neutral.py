"""Find the settings of a tracked run that cannot have changed its results; the parts themselves declare them."""

from collections.abc import Mapping
from functools import cache

from dnpo.errors import SettingsError
from dnpo.former import MOVED
from dnpo.settings import CONTENTS, OWN, locate, neutral_names
from dnpo.stages.plan import RunSettings

TARGET = "_target_"


def find_neutral(params: Mapping[str, str]) -> frozenset[str]:
    """Return the names of a run's settings that cannot have changed its results.

    A path counts as such a setting only if the run also recorded a hash of the contents there.

    Args:
        params: the run's settings under dotted names.
    """
    names = {*neutral_names(RunSettings), *(name for name in params if name.startswith(("tracking.", "launch.")))}
    for name, value in params.items():
        prefix, _, last = name.rpartition(".")
        if last == TARGET and value.startswith(OWN):
            names |= {f"{prefix}.{each}" for each in _neutral_of(value, f"{prefix}.{CONTENTS}" in params)}
    return frozenset(names)


@cache
def _neutral_of(target: str, contents_known: bool) -> tuple[str, ...]:
    """Return the neutral settings of the part with this import path; none if the part no longer exists."""
    try:
        part = locate(TARGET, MOVED.get(target, target))
    except SettingsError:
        return ()
    return tuple(neutral_names(part, places=contents_known))
