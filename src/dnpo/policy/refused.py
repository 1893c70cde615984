"""Find the value of a model's configuration that transformers refuses, even if its error does not name it.

Some errors name neither the file nor the setting (``KeyError: 'nope'``). So the model is built repeatedly without
weights, each time without another value of the configuration. The first value whose removal makes this succeed is the
refused one.
"""

import json
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from dnpo.policy.folder import CONFIG

TRIES = 60  # maximum number of models built; without weights each takes much less than a second


def find_refused(folder: Path, kind: Any, error: Exception, trust_remote_code: bool = False) -> str | None:
    """Name the value of ``config.json`` because of which a model cannot be made.

    Args:
        kind: one of transformers' Auto classes.
        error: the error that was raised; values that it mentions are tried first.

    Returns:
        A text such as ``hidden_act='nope' in config.json``; only the file's name if no single value is the reason; None
            if the configuration is not the reason.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(settings, Mapping) or _makes(folder, settings, kind, trust_remote_code):
        return None
    paths = sorted(_paths(settings), key=lambda path: (not _is_mentioned(settings, path, str(error)), -len(path)))
    for path in paths[:TRIES]:
        if path != ("model_type",) and _makes(folder, _without(settings, path), kind, trust_remote_code):
            return f"{'.'.join(path)}={reprlib.repr(_value(settings, path))} in {CONFIG}"
    return CONFIG


def _makes(folder: Path, settings: Mapping[str, Any], kind: Any, trust_remote_code: bool) -> bool:
    """Whether a model can be made from a configuration."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as made:
        for file in folder.glob("*.py"):
            shutil.copy(file, made)
        (Path(made) / CONFIG).write_text(json.dumps(settings), encoding="utf-8")
        try:
            config = AutoConfig.from_pretrained(made, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                kind.from_config(config, trust_remote_code=trust_remote_code)
        except Exception:  # a model's code can raise any error
            return False
    return True


def _paths(settings: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in settings.items():
        yield (*before, name)
        if isinstance(value, Mapping):
            yield from _paths(value, (*before, name))


def _value(settings: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = settings
    for name in path:
        value = value[name]
    return value


def _is_mentioned(settings: Mapping[str, Any], path: tuple[str, ...], text: str) -> bool:
    value = _value(settings, path)
    return path[-1] in text or (isinstance(value, str) and len(value) > 1 and value in text)


def _without(settings: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    rest = deepcopy(dict(settings))
    inner = rest
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return rest
