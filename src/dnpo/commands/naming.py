"""Name runs and jobs by the settings that were given to them."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from dnpo.settings import neutral_names
from dnpo.wording import short_number


def run_name(overrides: Sequence[str]) -> str:
    """Name a run by its overrides, without those that cannot change results, and with paths cut to their last part."""
    return " ".join(_words(overrides)) or "defaults"


def job_name(sweep: Path, overrides: Sequence[str]) -> str:
    """Name a job of a sweep by its own settings, to fit the columns of MLflow's pages: ``npo alpha=0.1 seed=2``."""
    from dnpo.running.sweep import find_varying

    own = [each for each in find_varying(sweep, overrides) if not each.startswith("+sweep=")]
    words = [word.partition("=") for word in _words(own)]
    lasts = [setting.rpartition(".")[2] for setting, _, _ in words]
    shown = []
    for last, (setting, equals, value) in zip(lasts, words, strict=True):
        name = last if lasts.count(last) == 1 else setting
        shown.append(value if setting == "method" else f"{name}{equals}{short_number(value)}")
    return " ".join(shown) or "defaults"


def _words(overrides: Sequence[str]) -> list[str]:
    from dnpo.stages.plan import RunSettings

    words = []
    aside = {*neutral_names(RunSettings), "tracking", "launch"} - {"acts_from"}
    for override in overrides:
        setting, equals, value = override.partition("=")
        if setting.lstrip("+").split(".")[0] in aside:
            continue
        end = PurePath(value).name if value.startswith(("/", ".", "~")) and "," not in value else value
        words.append(f"{setting}{equals}{end or value}")
    return words
