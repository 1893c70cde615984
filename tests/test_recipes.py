"""The recipes of docs/develop.md, executed unchanged in a folder outside the repository."""

import csv
import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.commands import Done, run_command, succeed, summary

FILE = Path(__file__).resolve().parent.parent / "docs" / "develop.md"
BLOCK = re.compile(r"(?:^ {4}.*\n(?:(?:[ \t]*\n)+(?= {4}))?)+", re.MULTILINE)
NAME = re.compile(r"(?:# @package _global_\n)?# (\S+\.(?:py|yaml))\n")
RECIPES = {"method": "method=brief", "judge": "judge=overlap", "data source": "data=sums", "measure": "eval=openings"}


class Recipe(NamedTuple):
    """The files of a recipe by their paths, and its commands."""

    files: dict[str, str]
    commands: list[list[str]]

    def write(self, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    def arguments(self, module: str) -> list[str]:
        """The arguments of its first command with this module."""
        return next(words[3:] for words in self.commands if words[:3] == ["python", "-m", module])


def read_recipe(heading: str) -> Recipe:
    section = FILE.read_text().split(f"### Add a {heading}", 1)[1].split("\n## ")[0].split("\n### ")[0]
    blocks = [textwrap.dedent(found[0]) for found in BLOCK.finditer(section)]
    files = {name[1]: block for block in blocks if (name := NAME.match(block))}
    lines = [line.split(" #")[0].split() for block in blocks if not NAME.match(block) for line in block.splitlines()]
    return Recipe(files, [words for words in lines if words])


def run(folder: Path, *headings: str, more: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """Run recipes together at the smoke scale; the table."""
    recipes = [read_recipe(heading) for heading in headings]
    for recipe in recipes:
        recipe.write(folder)
    arguments = dict.fromkeys(word for recipe in recipes for word in recipe.arguments("dnpo.train"))
    succeed(folder, *arguments, "scale=smoke", "tracking=off", *more)
    table: list[dict[str, float]] = summary(folder)["table"]
    return table


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_is_complete(heading: str, tmp_path: Path) -> None:
    recipe = read_recipe(heading)
    assert sorted(Path(name).suffix for name in recipe.files) == [".py", ".yaml"]
    assert RECIPES[heading] in recipe.arguments("dnpo.train")
    recipe.write(tmp_path)
    printed = succeed(tmp_path, *recipe.arguments("dnpo.train"), "scale=smoke", "plan=true")
    assert "evaluate" in printed
    assert not (tmp_path / "store").exists()


def test_settings_of_a_recipe_are_checked(tmp_path: Path) -> None:
    read_recipe("method").write(tmp_path)
    for wrong in ("objective.room=-1", "+dsl.bye=3"):
        done: Done = run_command(tmp_path, "dnpo.train", "--config-dir=conf", "method=brief", "scale=smoke", wrong)
        assert done.returncode == 1
        assert wrong.lstrip("+").split("=")[0] in done.stderr


@pytest.mark.long
def test_a_method_with_its_own_labeller_and_objective(finished: Path) -> None:
    table = run(finished, "method")
    assert table[1]["pairs/flipped"] == 0, "before acts_from labels are by origin"
    assert table[2]["pairs/flipped"] > 0


@pytest.mark.long
def test_a_judge_a_data_source_and_a_measure(tmp_path: Path) -> None:
    table = run(tmp_path, "data source", "judge", "measure", more=("iterations=1", "sft.steps=20"))
    for row in table:
        assert row["eval/score_human"] == 100, "a human response shares all its words with itself"
        assert 0 <= row["eval/score"] <= 100
        assert 0 < row["openings/distinct"] <= 1


@pytest.mark.long
def test_a_figure_reads_what_was_tracked(smoke: Path, tmp_path: Path) -> None:
    mine, checkout = tmp_path / "mine", tmp_path / "checkout"
    shutil.copytree(smoke, mine, symlinks=True)
    checkout.mkdir()
    recipe = read_recipe("figure")
    recipe.write(mine)
    done = run_command(checkout, "analysis.command", *recipe.arguments("analysis"), "--no-log")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.suffix for path in (mine / "figures").glob("fig20_length.*")} == {
        ".png",
        ".svg",
        ".csv",
        ".pdf",
        ".tex",
    }
    rows = list(csv.DictReader((mine / "figures" / "fig20_length.csv").open()))
    tracked = {str(row["iteration"]): row["eval/tokens"] for row in summary(mine)["table"]}
    assert {row["iteration"]: float(row["mean"]) for row in rows} == pytest.approx(tracked)
