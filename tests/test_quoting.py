"""Arguments that Hydra cannot read: the message shows how to quote the setting, and this works."""

import re
import shlex
from pathlib import Path

import pytest

from dnpo.commands.quoting import quote
from tests.commands import run_command, train

VALUES = ["/d/year=2024/x.jsonl", "/d/a,b.jsonl", "/d/a(1).jsonl", "/d/{a}.jsonl", "/d/set[1].jsonl"]
VALUES += ['/d/"a"=1', "/d/'a'=1"]
PLACES = [("data.path", value) for value in VALUES]  # every value for one setting, and some for others
PLACES += [(place, value) for place in ("model.path", "store", "ledger") for value in (VALUES[0], VALUES[-2])]


@pytest.mark.parametrize(("place", "value"), PLACES)
def test_the_way_to_quote_is_shown_and_works(place: str, value: str, tmp_path: Path) -> None:
    chosen = ["data=jsonl"] if place == "data.path" else ["model=local"] if place == "model.path" else []
    done = train(tmp_path, *chosen, "plan=true", "tracking=off", f"{place}={value}")
    assert done.returncode == 1
    assert f"error: {place}={value}: the value has a character that means something to Hydra; quote it: " in done.stderr
    shown = re.search(r"quote it: (.*?)(; a list is .*)?\n", done.stderr)
    assert shown is not None
    (argument,) = shlex.split(shown.group(1))
    again = train(tmp_path, *chosen, "plan=true", "tracking=off", argument)
    assert "quote it" not in again.stderr
    if place.endswith("path"):
        assert value in again.stderr, "read as given, and not found there"
    else:
        assert again.returncode == 0


def test_a_number_is_not_a_path(tmp_path: Path) -> None:
    for value in ("2024", "true"):
        done = train(tmp_path, "data=jsonl", "plan=true", f"data.path={value}")
        assert """to give it as text, quote it: 'data.path="…"'""" in done.stderr


def test_other_commands_show_it_too(tmp_path: Path) -> None:
    done = run_command(tmp_path, "dnpo.commands.reward", "fit", "data.path=/d/k=v", "base=x", "out=y")
    assert """quote it: 'data.path="/d/k=v"'""" in done.stderr


@pytest.mark.parametrize("argument", ["hello", "a..b=c=d", "=x"])
def test_errors_that_quotes_cannot_fix(argument: str, tmp_path: Path) -> None:
    assert quote(argument) is None
    done = train(tmp_path, argument)
    assert done.returncode == 1
    assert argument in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("setting", ["data.columns={prompt: instruction, response: output}", "rollout=[given, ahead]"])
def test_a_value_that_the_shell_split_is_shown_whole(setting: str, tmp_path: Path) -> None:
    done = train(tmp_path, "seed=1", *setting.split(), "plan=true")
    assert f"the shell has split this value at its spaces; quote it: {shlex.quote(setting)}\n" in done.stderr
