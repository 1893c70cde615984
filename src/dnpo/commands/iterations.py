"""Settings that change from iteration to iteration: a list in place of a value or a part.

    objective.beta=[0.1,0.1,5.0]    one value for each iteration; the last one is repeated

A list is read in this way if the setting takes a single value, or if a part is expected. Settings whose value is a list
are unchanged. Parts get a single value and never such a list.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from dnpo.errors import SettingsError
from dnpo.settings import accepts, is_part, locate
from dnpo.wording import plural


def settings_at(name: str, value: Any, k: int, iterations: int) -> Any:
    """The settings of a part in iteration ``k``.

    Args:
        name: dotted name of the settings, for messages.
        value: a part, or a list of parts, as plain values.
        iterations: number of iterations of the run.

    Raises:
        SettingsError: a list is empty, or longer than the run.
    """
    if isinstance(value, list):
        return settings_at(name, value_at(name, value, k, iterations), k, iterations)
    if not isinstance(value, Mapping):
        return value
    target = value.get("_target_")
    tree = {}
    for key, each in value.items():
        dotted = f"{name}.{key}"
        if isinstance(each, list) and is_part(value) and _takes_one(dotted, str(target), key, each):
            each = value_at(dotted, each, k, iterations)
        tree[key] = settings_at(dotted, each, k, iterations) if isinstance(each, Mapping) else each
    return tree


def value_at(name: str, values: Sequence[Any], k: int, iterations: int) -> Any:
    """The value of a list in iteration ``k``; the last one is repeated.

    Raises:
        SettingsError: there are no values, or more than iterations.
    """
    if not values:
        raise SettingsError(f"{name}=[]: expected one value an iteration, or a single one")
    if len(values) > iterations:
        raise SettingsError(
            f"{name}: has {plural(len(values), 'value')}, one an iteration, but the run has iterations={iterations}; "
            "expected no more values than that"
        )
    return values[min(k, len(values) - 1)]


def join(trees: Sequence[Any]) -> Any:
    """The settings of all iterations as one tree, with a list for each setting that differs."""
    first = trees[0]
    if all(tree == first for tree in trees):
        return first
    alike = all(isinstance(tree, Mapping) and tree.keys() == first.keys() for tree in trees)
    if alike and len({tree.get("_target_") for tree in trees}) == 1:
        return {key: join([tree[key] for tree in trees]) for key in first}
    return list(trees)


def _takes_one(name: str, target: str, key: str, values: Sequence[Any]) -> bool:
    """Whether a setting takes a single value, so that a list has one for each iteration."""
    if values and all(map(is_part, values)):
        return True
    if target.startswith("torch."):  # importing torch takes too long; its only lists are pairs of betas
        return key != "betas"
    kind = locate(f"{name.rpartition('.')[0]}._target_", target)
    parameter = inspect.signature(kind).parameters.get(key)
    return parameter is not None and not any(accepts(kind, key, each) for each in (list(values), []))
