"""The command ``python -m dnpo.judges.reward fit``: fit a reward model to preferences.

    python -m dnpo.judges.reward fit data.path=preferences.jsonl base=FOLDER out=FOLDER

The settings are ``conf/reward.yaml``.
"""

import re
import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from dnpo.commands import common as command
from dnpo.commands.quoting import quote
from dnpo.escape import say
from dnpo.judges.reward.preferences import Preferences
from dnpo.settings import check_values

USAGE = "usage: dnpo judge fit data.path=FILE base=FOLDER out=FOLDER [key=value …]; conf/reward.yaml has all settings"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m dnpo.judges.reward fit``.

    Args:
        arguments: arguments of the command, ``fit`` first; None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] != ["fit"]:
        say(USAGE, error=True)
        sys.exit(2)
    command.run("reward", ("dnpo.judges.reward fit", "judge fit"), _fit, "Nothing is written.", arguments=given[1:])


def _fit(cfg: DictConfig, job: Any) -> None:
    command.greet(cfg, job)
    tree = command.plain(cfg)
    data = Preferences(**check_values("data", Preferences, tree.pop("data")))

    from dnpo.judges.reward.fitting import fit

    settings = check_values("", fit, tree)
    command.prepare_torch(settings["threads"])
    fit(data, **settings)
    given = f"judge.path={settings['out']}"
    plain = re.fullmatch(r"judge\.path=[\w./~@%+-]+", given) is not None
    say(f"use it with: judge=reward {given if plain else quote(given) or given}")
