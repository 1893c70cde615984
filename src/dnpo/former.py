"""What settings were called in earlier layouts, so that users' yaml and saved runs go on working."""

from collections.abc import Mapping
from typing import Any

MOVED: dict[str, str] = {}
"""Import paths of dnpo's own parts as they were once, and as they are."""

REMOVED: dict[str, tuple[str, ...]] = {}
"""Settings that a part once had, by its import path of today. They are accepted there, and ignored."""


def up_to_date(settings: Mapping[str, Any], name: str = "") -> tuple[dict[str, Any], list[str]]:
    """Bring settings that were written for an earlier layout up to date.

    Args:
        settings: a tree of plain values, in which parts have a ``_target_``.
        name: where the tree stands, such as ``npo``.

    Returns:
        The tree with the import paths of today and without settings that are gone, and the dotted names of these.
    """
    tree, ignored = dict(settings), []
    if isinstance(tree.get("_target_"), str):
        tree["_target_"] = MOVED.get(tree["_target_"], tree["_target_"])
    gone = REMOVED.get(str(tree.get("_target_")), ())
    for key, value in settings.items():
        dotted = f"{name}.{key}" if name else key
        if key in gone:
            del tree[key]
            ignored.append(dotted)
        elif isinstance(value, Mapping):
            tree[key], inner = up_to_date(value, dotted)
            ignored += inner
    return tree, ignored
