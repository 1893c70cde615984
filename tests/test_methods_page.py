"""docs/methods.md has every method of conf/method, with its command and its option in each group."""

import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dnpo.settings import conf_folder, locate

CONF = conf_folder()
PAGE = (Path(__file__).resolve().parent.parent / "docs" / "methods.md").read_text()
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
PARTS = {"prompts": "prompts", "judge": "judge", "labels": "dsl", "curriculum": "curriculum"}
PARTS |= {"objective": "objective", "noise": "npo"}
LOGISTIC = {"dpo": "logistic"}  # what an option's word is where it differs from its name


def sections() -> dict[str, str]:
    """The text below the heading of each method."""
    return dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S))


def words(section: str) -> dict[str, str]:
    """The table of a section: the option of each group."""
    head, _, row = [line for line in section.splitlines() if line.startswith("|")]
    return dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)), strict=True))


def composed(method: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[f"method={method}"], return_hydra_config=True)


def test_the_page_has_every_method_and_no_other() -> None:
    assert sorted(sections()) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_its_command_its_parts_and_an_expectation(method: str) -> None:
    section, config = sections()[method], composed(method)
    assert f"\n    python -m dnpo.train method={method}\n" in section
    assert "\nExpected: " in section
    said, choices = words(section), config.hydra.runtime.choices
    assert (said["start"], said["reference"]) == (config.start, config.reference)
    target = config.objective.get("_target_") if isinstance(config.objective, DictConfig) else None
    rewards = target is not None and hasattr(locate("objective", target), "train")  # and no pairs, so no labels
    asked = rewards or choices.dsl not in ("off", "given")  # otherwise labels read no scores, whatever the judge
    for place, part in PARTS.items():
        word = LOGISTIC.get(choices[part], choices[part])
        if (part == "judge" and not asked) or (word == "off" and (part != "dsl" or rewards)):
            assert said[place] == "–"
        elif word not in (None, "null"):  # one for each iteration, which the page spells out
            assert said[place] == word, place
    if choices.rollout == "given":
        assert said["rollout"] == "given"
    elif choices.rollout == "ahead":
        assert int(said["rollout"].split(",")[0]) == config.rollout.samples


@pytest.mark.parametrize("method", METHODS)
def test_the_file_of_a_method_begins_with_its_command(method: str) -> None:
    head = (CONF / "method" / f"{method}.yaml").read_text().split("\ndefaults:")[0]
    assert head.startswith("# @package _global_\n# ")
    assert re.search(rf"^#   python -m dnpo\.train method={method}\b", head, re.M)
