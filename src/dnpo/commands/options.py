"""Replace names of options in a list by iteration, such as ``rollout=[given,ahead]``, by the options.

A name on the command line is replaced by the part that results if this option alone is chosen, with the settings of the
method and of other arguments. A name in a file of settings is replaced by the content of that option's file and nothing
else, since a list there replaces all other settings of the part.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from dnpo.errors import SettingsError
from dnpo.settings import offer


def expand_options(cfg: DictConfig, job: Any, places: Sequence[str], starting: Sequence[str]) -> None:
    """Replace names of options in lists by these options.

    Args:
        cfg: the composed tree, which is changed.
        job: Hydra's settings of the job.
        places: the parts that may change from iteration to iteration.
        starting: those of them whose options have a ``start``; a list makes it superfluous.

    Raises:
        SettingsError: a name is not an option, a defaults list chooses several options for one part, or a ``start`` is
            given along with a list.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    arguments = cast(list[str], OmegaConf.to_container(job.overrides.task))  # interpolations stay as they are
    overrides = OverridesParser.create().parse_overrides(arguments)
    chosen = {
        each.key_or_group: [str(name) for name in names]
        for each in overrides
        if each.key_or_group in places and isinstance(names := each.value(), list)
    }
    for each in overrides:
        place, _, setting = each.key_or_group.partition(".")
        if place in chosen and place in starting and setting == "start":
            raise SettingsError(
                f"{each.input_line}: {place} is a list, one option for each iteration, and its order says when each "
                "of them acts; give either the list or a start"
            )
    for place in places:
        if place in cfg and place not in job.runtime.choices and place not in chosen:
            raise SettingsError(
                f"{place}: has several options in a defaults list, whose settings would be mixed. Choose none there "
                f"(- override /{place}: null), and give the list as a value ({place}: […, …])"
            )
    found = _compose_chosen(chosen, job.job.config_name, arguments) if chosen else {}
    for place in places:
        value = cfg.get(place)
        if isinstance(value, ListConfig) and any(isinstance(each, str) for each in value):
            values = cast(list[Any], OmegaConf.to_container(value))
            found[place] = [_load(place, each) if isinstance(each, str) else each for each in values]
    with open_dict(cfg):
        for place, options in found.items():
            cfg[place] = [_without_start(each) for each in options] if place in starting else options


def refuse_idle_epochs(cfg: DictConfig, job: Any) -> None:
    """Refuse ``epochs`` on the command line for a training whose ``steps`` decide instead.

    Raises:
        SettingsError: an argument sets epochs that have no effect.
    """
    for argument in cast(list[str], OmegaConf.to_container(job.overrides.task)):
        place, _, value = argument.lstrip("+").partition("=")
        part, _, name = place.rpartition(".")
        if name != "epochs" or not part:
            continue
        steps = OmegaConf.select(cfg, f"{part}.steps")
        if all(steps) if isinstance(steps, ListConfig) else steps:
            raise SettingsError(f"{place}={value}: has no effect while {part}.steps={steps}; add {part}.steps=0")


def _compose_chosen(chosen: Mapping[str, Sequence[str]], config: str, arguments: Sequence[str]) -> dict[str, list[Any]]:
    """Compose the options of lists on the command line, each as if it were chosen alone.

    Arguments for settings of the part apply to the options that have these settings.
    """
    from hydra import compose

    own = [each for each in arguments if each.partition("=")[0].partition(".")[0] in chosen]
    others = [each for each in arguments if each not in own]
    settings = [each for each in own if each.partition("=")[0] not in chosen]
    found: dict[str, list[Any]] = {place: [] for place in chosen}
    for k in range(max(map(len, chosen.values()))):
        now = [*others, *(f"{place}={names[min(k, len(names) - 1)]}" for place, names in chosen.items() if names)]
        tree = compose(config, now)
        if has := [each for each in settings if _has(tree, each.partition("=")[0])]:
            tree = compose(config, [*now, *has])
        for place, names in chosen.items():
            if k < len(names):
                found[place].append(OmegaConf.to_container(tree[place], resolve=True))
    return found


def _has(tree: DictConfig, name: str) -> bool:
    place, *path = name.split(".")
    node: Any = tree[place]
    for key in path:
        if not isinstance(node, DictConfig) or key not in node:
            return False
        node = node._get_node(key)
    return True


def _load(place: str, name: str) -> Any:
    """Load an option, from this project's settings or from a folder of users' settings."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra

    known = GlobalHydra.instance().config_loader().get_group_options(place)
    if name not in known:
        raise SettingsError(f"{place}={name}: there is no such option.{offer(name, known, 'Options')}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hydra warns about options that include others
        tree = compose(f"{place}/{name}")
    if set(tree) != {place}:
        raise SettingsError(f"{place}={name}: sets more than {place}, so it cannot be in a list")
    return OmegaConf.to_container(tree[place])


def _without_start(option: Any) -> Any:
    return {k: v for k, v in option.items() if k != "start"} if isinstance(option, Mapping) else option
