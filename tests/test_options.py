"""Names of options in lists, one per iteration, on the command line and in files."""

import re
from pathlib import Path

import pytest

from tests.commands import SMOKE, succeed, train

SELF_LABELLING = ("judge=implicit", "npo=off", "typical.gold_pairs=0.5", "eval.judge=${typical.judge}")
METHOD = """# @package _global_
defaults:
  - override /npo: "off"
  - override /judge: implicit
  - override /prompts: null
  - override /rollout: null
  - override /dsl: null
prompts: [seed, fresh]
rollout: {rollout}
dsl: [given, two]
typical: {{gold_pairs: 0.5}}
eval: {{judge: "${{typical.judge}}"}}
"""
PARTS = """
  - {_target_: dnpo.generate.Given}
  - _target_: dnpo.generate.Ahead
    samples: 2
    temperature: ${generate.temperature}
    shard_size: ${generate.shard_size}"""


def plan(folder: Path, *arguments: str) -> list[str]:
    """The stages of a run and their keys."""
    return re.findall(r"\w+/[0-9a-f]{16}", succeed(folder, *arguments, *SMOKE, "plan=true"))


def refusal(folder: Path, *arguments: str) -> str:
    """The message that refuses a run."""
    done = train(folder, *arguments, *SMOKE, "plan=true")
    assert done.returncode == 1, done.stdout
    return done.stdout + done.stderr


def method(folder: Path, rollout: str) -> tuple[str, str]:
    """The arguments for a user's method with this rollout, and for a user's option of rollout."""
    own = folder / "own"
    (own / "method").mkdir(parents=True)
    (own / "rollout").mkdir()
    (own / "method" / "mine.yaml").write_text(METHOD.format(rollout=rollout), encoding="utf-8")
    (own / "rollout" / "twice.yaml").write_text("defaults: [ahead]\nsamples: 2\n", encoding="utf-8")
    return f"--config-dir={own}", "method=mine"


def test_names_on_the_command_line_and_in_a_file_are_the_parts(tmp_path: Path) -> None:
    """Also a name from a user's folder; a setting applies to the options that have it."""
    by_parts = plan(tmp_path, *method(tmp_path / "parts", PARTS))
    assert len(by_parts) > 10
    assert plan(tmp_path, *method(tmp_path / "names", "[given, twice]")) == by_parts
    lists = ("rollout=[given,ahead]", "rollout.samples=2", "prompts=[seed,fresh]", "dsl=[given,two]")
    assert plan(tmp_path, *SELF_LABELLING, *lists) == by_parts


def test_the_last_name_is_repeated_and_a_list_says_when_noise_starts(tmp_path: Path) -> None:
    """``npo=[off,trainable]`` means noise from iteration 1 on."""
    by_start = plan(tmp_path, "iterations=3", "npo.start=1")
    assert plan(tmp_path, "iterations=3", "npo=[off,trainable]") == by_start
    assert plan(tmp_path, "iterations=3", "npo=[off,off,trainable]") != by_start
    assert "npo.start=2" in refusal(tmp_path, "npo=[off,trainable]", "npo.start=2")


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ("[given, twise]", ["rollout=twise", "Did you mean twice?", "ahead, given", "twice"]),
        ("[given, twice, twice]", ["rollout", "3 values", "iterations=2"]),
    ],
)
def test_lists_in_a_file_are_refused_by_name(rollout: str, words: list[str], tmp_path: Path) -> None:
    told = refusal(tmp_path, *method(tmp_path, rollout))
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollout=[givn,ahead]"], ["rollout=givn", "Did you mean given?", "ahead, given"]),
        (["objective=[logistic,ipo,orpo]", "npo=off"], ["objective", "3 values", "iterations=2"]),
        (["method=spa", "rollout=[given,ahead]"], ["rollout=[given,ahead]", "method=spa gives rollout as a list"]),
    ],
)
def test_lists_on_the_command_line_are_refused_by_name(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    told = refusal(tmp_path, *arguments)
    assert all(word in told for word in words), told


def test_several_options_in_a_defaults_list_are_refused(tmp_path: Path) -> None:
    """Hydra would mix their settings."""
    own = method(tmp_path, PARTS)
    mixed = "# @package _global_\ndefaults:\n  - override /prompts: [seed, fresh]\n"
    (tmp_path / "own" / "method" / "mine.yaml").write_text(mixed, encoding="utf-8")
    assert "prompts: has several options in a defaults list" in refusal(tmp_path, *own)
