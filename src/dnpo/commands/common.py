"""Code that the commands share: it runs Hydra without Hydra's own output, and turns errors into messages.

Heavy modules are imported inside functions, so that wrong settings are reported at once.
"""

import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dnpo import __version__, disk, garbage, interrupts, output
from dnpo.commands.grammar import HELP, VERSION, find_dashes, program, take_folder
from dnpo.commands.naming import run_name
from dnpo.commands.quoting import explain_unreadable
from dnpo.errors import DnpoError, SettingsError
from dnpo.escape import say, tell
from dnpo.former import up_to_date
from dnpo.settings import NEAR, check_values, conf_folder, flat, locate, nearest, offer, part_settings

if TYPE_CHECKING:
    from dnpo.store import Compute, Store
    from dnpo.tracking.writing import Status, Tracking

KEPT = "Finished stages are kept and an unfinished one continues: run the same command again."


def run(
    config: str,
    called: tuple[str, str],
    body: Callable[[DictConfig, Any], Any],
    interrupted: str = KEPT,
    arguments: Sequence[str] | None = None,
    idle: Collection[str] = (),
) -> None:
    """Compose ``conf/CONFIG.yaml`` with the arguments and call ``body``, once for every job of a multirun.

    Errors that the user can correct become a message and a non-zero exit status. A failing job of a sweep does not stop
    the others; the sweep's report lists it.

    Args:
        config: name of the composed file, without its suffix.
        called: the command's module (``python -m MODULE``) and name (``dnpo NAME``), for messages.
        body: called with the composed tree and Hydra's settings of the job; its result is what a searching sweeper
            optimises.
        interrupted: message after Ctrl-C, or a signal that asks the process to end.
        arguments: arguments of the command; None: those of the process.
        idle: parts and settings in the file that have no effect in this command, which its help leaves out.
    """
    failed: list[str] = []

    def task(cfg: DictConfig) -> Any:
        from dnpo.running.sweep import record_failure

        job = HydraConfig.get()
        output.outlive_readers()  # this and the next lines also here, since launchers call task() in other processes
        garbage.collect_less_often()
        try:
            with interrupts.raised():
                return body(cfg, job)
        except DnpoError as error:
            if job.mode is RunMode.MULTIRUN:
                record_failure(Path(job.runtime.output_dir), str(error))
            else:
                failed.append(str(error))  # raised within Hydra, it would be printed with more text around it
        except Exception as error:
            words = disk.explain(error)
            if job.mode is RunMode.MULTIRUN:
                record_failure(Path(job.runtime.output_dir), words or traceback.format_exc())
            elif words is None:
                raise
            else:
                failed.append(f"{words}. {interrupted}")
        return None

    given = sys.argv[1:] if arguments is None else list(arguments)
    output.outlive_readers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # makes Hydra raise errors instead of printing them
    garbage.collect_less_often()  # here too: composing creates many objects before the first line is printed
    garbage.leave_at_exit()
    try:
        folder = conf_folder()
        if not (folder / f"{config}.yaml").is_file():
            raise SettingsError(f"{folder}: expected a {config}.yaml among the settings")
        if HELP & set(given):
            from dnpo.commands.explain import show

            show(config, program(*called), given, idle)
            return
        if VERSION & set(given):
            say(f"dnpo {__version__}")
            return
        refuse_dashes(config, given)
        with interrupts.raised(), _without_folders(given) as final, _arguments(final):
            hydra.main(version_base="1.3", config_path=str(folder), config_name=config)(task)()
        if failed:
            _fail(failed.pop())
    except DnpoError as error:
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, config, sys.argv[1:]))
    except KeyboardInterrupt as interrupt:
        by = interrupts.name(interrupt)
        tell(f"\nInterrupted{f' by {by}' if by else ''}. {interrupted}")
        sys.exit(interrupts.exit_status(interrupt))
    except Exception as error:
        from dnpo.running.sweep import report_stopped

        if not report_stopped(error):
            raise


def greet(cfg: DictConfig, job: Any) -> None:
    """Print the first line of a run or of a sweep's job at once, since importing the libraries takes seconds."""
    from dnpo.running.sweep import describe_place, find_varying

    given = job.overrides.task
    if job.mode is RunMode.MULTIRUN:
        sweep = Path(job.sweep.dir)
        tell(f"{describe_place(sweep, job.job.num)}: {run_name(find_varying(sweep, given))}")
    elif not (cfg.get("plan") or cfg.get("check")):
        tell(f"dnpo {__version__}: {run_name(given)}")


@contextmanager
def _without_folders(given: Sequence[str]) -> Iterator[Sequence[str]]:
    """If nothing will be run, let Hydra make its folders in a temporary folder, which is removed at the end."""
    if not {"plan=true", "check=true"} & set(given):
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="dnpo-") as folder:
        place = next(n for n, each in enumerate(given) if "=" in each and not each.startswith("-"))
        yield [*given[:place], f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}", *given[place:]]


@contextmanager
def _arguments(given: Sequence[str]) -> Iterator[None]:
    """Put the arguments into ``sys.argv``, where Hydra reads them, and restore it afterwards.

    ``store=PATH`` is short for ``store.root=PATH``.
    """
    before = sys.argv
    several = any(each.startswith("store.") for each in given)  # then store=PATH would replace the others
    sys.argv = [before[0], *(re.sub(r"^store=", "store.root=", each) if several else each for each in given)]
    try:
        yield
    finally:
        sys.argv = before


USUAL = ("jsonl", "openai", "local")  # options to offer first


def _fail(message: str) -> None:
    say(f"error: {message}", error=True)
    sys.exit(1)


def explain(error: Exception, config: str, arguments: Sequence[str]) -> str:
    """Rewrite Hydra's message, with near matches for a key that does not exist."""
    text = str(error).strip()
    unreadable = explain_unreadable(error, arguments)
    if unreadable is not None:
        return unreadable
    unmerged = re.search(r"^In '(\w+)/([^']+)': .*\nCannot merge DictConfig with ListConfig", text)
    if unmerged:
        return _explain_list(unmerged.group(1), unmerged.group(2), arguments)
    absent = re.search(r"Could not override '([^']+)'\. No match in the defaults list", text)
    if absent:
        return _explain_absent(absent.group(1), config, arguments)
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        return _explain_unknown(unknown.group(1), _list_settings(config, arguments))
    plugin = re.search(r"Could not find '(hydra/(\w+))/(\w+)'", text)
    if plugin:
        group, kind, name = plugin.groups()
        return (
            f"{group}={name}: there is no such option. It may come with pip install hydra-{name.split('_')[0]}-{kind}"
        )
    option = re.search(r"Could not (?:find|load) '([^'/]+)/([^']+)'", text)
    if option:
        group, name = option.groups()
        searched = map(Path, re.findall(r"path=file://(.+)", text))  # including the user's folder
        options = sorted({p.stem for folder in (conf_folder(), *searched) for p in (folder / group).glob("*.yaml")})
        return f"{group}={name}: there is no such option.{offer(name, options, 'Options')}"
    if "Missing mandatory value" in text:
        key = text.split("Missing mandatory value:")[-1].strip().split()[0]
        return f"{key}: needs a value; give {key}=…"
    return text


def refuse_dashes(config: str, arguments: Sequence[str]) -> None:
    """Refuse ``--seed 1``, ``--seed=1`` and ``--plan``; the message shows the right form if there is such a setting.

    Raises:
        SettingsError: an argument has dashes and is not an option of Hydra.
    """
    found = find_dashes(arguments)
    if found is None:
        return
    known = _list_settings(config, arguments)
    if found.setting not in known:
        raise SettingsError(
            f"{found.written}: settings are written without dashes. {_explain_unknown(found.setting, known)}"
        )
    value = shlex.quote(found.value) if found.value else "true" if isinstance(known[found.setting], bool) else "…"
    raise SettingsError(f"{found.written}: settings are written without dashes: {found.setting}={value}")


def _list_settings(config: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that a command has with the options in its arguments, and their values; places have None."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        folder, others = take_folder(arguments)
        own = [f"hydra.searchpath=[file://{folder}]"] if folder else []
        tree = compose(config, [*_options(others, folder), *own], return_hydra_config=True)
    places = {each for each in tree.hydra.runtime.choices if not each.startswith("hydra/")}
    OmegaConf.set_struct(tree, False)
    del tree.hydra
    settings = flat(cast(dict[str, Any], OmegaConf.to_container(tree)))
    return dict.fromkeys({name.split(".")[0] for name in settings} | places) | settings


def _explain_unknown(key: str, known: Mapping[str, Any]) -> str:
    """Say that there is no such setting, and advise the option that has it, or settings with similar names."""
    part, _, name = key.rpartition(".")
    target = known.get(f"{part}._target_")
    names = part_settings(locate(f"{part}._target_", target)) if target else []
    if name in names:
        return f"{key}: write +{key}=…, since the file of this part does not name it"
    known = dict.fromkeys(f"{part}.{each}" for each in names) | dict(known)
    options = [] if names and "." in part else _options_with(key)  # an option's file names inner parts as a whole
    if options:
        part = key.partition(".")[0]
        return (
            f"{key}: a setting of {', '.join(f'{part}={option}' for option in options)}; give that too, such as "
            f"{part}={options[0]} {key}=…"
        )
    near = nearest(key, known)
    return f"{key}: unknown setting.{near if NEAR in near else ' With --help, the command lists all settings.'}"


def _explain_absent(group: str, config: str, arguments: Sequence[str]) -> str:
    """Advise ``+group=…`` if the command can be composed with it; else say which argument needs a part it lacks."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    chosen = next((each for each in arguments if each.startswith(f"{group}=")), None)
    if chosen is None:  # an option that chooses one of this place, such as +scale=smoke
        asking = [each for each in arguments if each.startswith("+") and "." not in each.partition("=")[0]]
        return f"{' '.join(asking)}: sets {group}, which the settings of {config} do not have"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        try:
            fits = set(compose(config, [f"+{chosen}"])) <= set(compose(config, []))
        except HydraException:
            fits = False
    if not fits:
        return f"{group}: the settings of {config} have no such part; leave {chosen} out"
    return f"{group}: none of its options is chosen by default; give +{group}=…"


def _explain_list(group: str, name: str, arguments: Sequence[str]) -> str:
    """Explain that one option cannot replace a list with a part for each iteration, such as that of method=spa."""
    file = conf_folder() / group / f"{name}.yaml"
    content = OmegaConf.load(file) if file.is_file() else OmegaConf.create()
    lists = [str(key) for key, value in content.items() if isinstance(value, ListConfig)]
    chosen = next((each for each in arguments if each.partition("=")[0] in lists), "")
    part = chosen.partition("=")[0] or " or ".join(lists) or "a part"
    return (
        f"{chosen or part}: {group}={name} gives {part} as a list, one for each iteration, but a single option cannot "
        f"replace it. Set one of the list by its number, such as {part}.1.…=…, or write your own {group}: a copy of "
        f"conf/{group}/{name}.yaml with another {part}"
    )


def _options_with(key: str) -> list[str]:
    """The options of a part that have a setting which the chosen option lacks, the most specific ones first."""
    part, _, name = key.partition(".")
    folder = conf_folder() / ("judge" if part == "second_judge" else part)
    found = [file.stem for file in sorted(folder.glob("*.yaml")) if name and _has_setting(file, name)]
    return sorted(found, key=lambda option: (option not in USUAL, option))


def _has_setting(file: Path, name: str) -> bool:
    """Whether an option has a setting, in its file or in the file of an option that it includes."""
    content = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(content, dict):
        return False
    first = name.partition(".")[0]
    taken = [each for each in content.get("defaults", ()) if isinstance(each, str) and not each.startswith("_")]
    return first in content or any(_has_setting(file.with_name(f"{each}.yaml"), name) for each in taken)


def _options(arguments: Sequence[str], own: Path | None = None) -> list[str]:
    """Return the arguments that choose an existing option of a part; of a sweep's list, the first option.

    Args:
        own: the user's folder of settings.
    """
    folders = [conf_folder(), *([own] if own else [])]
    found = []
    for argument in arguments:
        group, _, names = argument.partition("=")
        if any((folder / group / f"{names.split(',')[0]}.yaml").is_file() for folder in folders):
            found.append(f"{group}={names.split(',')[0]}")
    return found


def plain(cfg: DictConfig, shorthand: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Return the composed tree as plain values, with settings of earlier layouts brought up to date.

    Args:
        shorthand: alternative names of settings, for messages.

    Raises:
        SettingsError: a value is missing; the message names it.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        name = shorthand.get(missing[0], missing[0])
        raise SettingsError(f"{name}: needs a value; give {name}=…")
    tree, ignored = up_to_date(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)))
    if ignored:
        say(
            f"warning: these settings no longer exist and are ignored: {', '.join(ignored)}; leave them out", error=True
        )
    if isinstance(tree.get("store"), dict):  # a file of settings may have a path there
        store = check_values("store", _store, tree["store"])
        tree |= {"store": store["root"], "remote": store.get("remote")}
    return tree


def _store(*, root: str, remote: str | None = None) -> None:
    """The settings of ``store``."""


def make_store(settings: Mapping[str, Any], compute: "Compute | None" = None) -> "Store":
    """Make the store of a command, which has the settings ``store``, ``verify`` and ``remote``.

    Args:
        compute: does the work of a stage; by default this process.

    Raises:
        SettingsError: the remote store cannot be used.
    """
    from dnpo.store import Remote, Store, compute_here

    remote = Remote(settings["remote"]) if settings.get("remote") else None
    return Store(Path(settings["store"]), settings["verify"], remote, compute or compute_here)


def prepare_torch(threads: int) -> None:
    """Silence the libraries and set torch's threads; called only when there is something to compute."""
    import torch

    from dnpo.running.console import silence_libraries

    silence_libraries()
    torch.set_num_threads(threads)


@contextmanager
def track(
    tracking: "Tracking",
    name: str,
    settings: Mapping[str, Any],
    tags: Mapping[str, str],
    sweep: Path | None,
    folder: Path,
    stages: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[None]:
    """Keep a tracked run open while the body runs, and set its status by how the body ended.

    Args:
        stages: the keys of its stages, by short names.
    """
    from dnpo.store import write_json

    tracking.start(name, flat(settings), tags, sweep, folder, stages)
    status: Status = "FAILED"
    try:
        if stages:
            write_json(folder / "stages.json", dict(stages))
            tracking.artifact(folder / "stages.json")
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # a launcher exits when it restarts the job
        status = "KILLED"
        raise
    finally:
        tracking.finish(status)


def folders(job: Any) -> tuple[Path, Path | None]:
    """Return the folder of the results, and the sweep's folder if the job is part of a sweep."""
    sweep = Path(job.sweep.dir).absolute() if job.mode is RunMode.MULTIRUN else None
    return Path(job.runtime.output_dir), sweep
