"""Cache Hydra's compositions for each choice of options, and its files: they take most of a refused command's time.

The composition is cached without the values of a command, which are set on a copy. The cache's key includes names,
sizes and times of the files of settings, so a test can write and change settings.
"""

import copy
from collections.abc import Hashable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

LIMIT = 100  # number of cached compositions; the oldest are dropped

_create_defaults_list = config_loader_impl.create_defaults_list
_compose = ConfigLoaderImpl._compose_config_from_defaults_list
_load = ConfigRepository.load_config
_lists: dict[Hashable, DefaultsList] = {}
_composed: dict[int, DictConfig] = {}  # by the identity of the lists in `_lists`
_loaded: dict[Hashable, ConfigResult | None] = {}


@wraps(_create_defaults_list)
def _find_defaults_list(
    repo: Any, config_name: str | None, overrides_list: Sequence[Any], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    options: list[Any] = []
    values: list[Any] = []
    for override in overrides_list:
        if not override.is_sweep_override():
            is_value = isinstance(override.value(), dict) or not repo.group_exists(override.key_or_group)
            (values if is_value else options).append(override)
    files = tuple((source.full_path(), _files(source.full_path())) for source in repo.get_sources())
    key = (files, config_name, tuple(each.input_line for each in options), prepend_hydra, skip_missing)
    found = _lists.pop(key, None) or _create_defaults_list(repo, config_name, options, prepend_hydra, skip_missing)
    _lists[key] = found  # behind the others
    if len(_lists) > LIMIT:
        _composed.pop(id(_lists.pop(next(iter(_lists))).defaults), None)
    return DefaultsList(found.defaults, found.defaults_tree, values, found.overrides)


def _files(source: str) -> Hashable:
    """The files in a folder of settings; other sources are packages, which do not change."""
    if not source.startswith("file://"):
        return ()
    paths = Path(source.removeprefix("file://")).rglob("*.yaml")
    return tuple((str(path), status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()])


@wraps(_compose)
def _copy_composed(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: Any) -> DictConfig:
    if id(defaults) not in _composed:
        _composed[id(defaults)] = _compose(self, defaults, repo)
    return copy.deepcopy(_composed[id(defaults)])


@wraps(_load)
def _copy_loaded(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    source = self._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.scheme() != "file":
        return _load(self, config_path)
    status = (Path(source.path) / source._normalize_file_name(config_path)).stat()
    key = (source.provider, source.path, config_path, status.st_size, status.st_mtime_ns)
    if key not in _loaded:
        _loaded[key] = _load(self, config_path)
    return copy.deepcopy(_loaded[key])


def _copy_repository(self: ConfigRepository, known: dict[int, Any]) -> ConfigRepository:
    """A copy that can be given other sources, which is what Hydra copies it for."""
    return copy.copy(self)


def keep_compositions() -> None:
    """Keep what is composed in this process."""
    if config_loader_impl.create_defaults_list is _create_defaults_list:
        config_loader_impl.create_defaults_list = _find_defaults_list
        ConfigLoaderImpl._compose_config_from_defaults_list = _copy_composed
        ConfigRepository.load_config = _copy_loaded
        ConfigRepository.__deepcopy__ = _copy_repository
