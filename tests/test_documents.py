"""The README and docs/: every command is accepted, every link has a target, figures agree."""

import argparse
import itertools
import re
import runpy
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from analysis import command as figures
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

import dnpo as laboratory
from dnpo.cli import main as dnpo
from dnpo.commands import agreement, common, evaluate, leaderboard, reward, train
from dnpo.commands.grammar import find_dashes, with_dashes
from dnpo.commands.verbs import VERBS
from dnpo.settings import check, check_values, conf_folder, locate
from tests.commands import SMOKE, TINY

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS = 900  # of the README, as `wc -w` counts them
METHODS = sorted(path.stem for path in (conf_folder() / "method").glob("*.yaml"))
PROGRAM = r"(?:[A-Z_]+=\S+ )*(?:srun )?(?:/\S+/)?(?:python -m|pip|dnpo|pytest|mlflow|make|zensical|benchmarks/gpu\.sh)"
STARTS = re.compile(rf"{PROGRAM} (?=\S)")
BLOCK = re.compile(r"(?:^ {4}.*\n(?:\n+(?= {4}))?)+", re.MULTILINE)
INLINE = re.compile(rf"`({PROGRAM}\s[^`…]+)`")
NAME = re.compile(r"python -m [\w.]+|dnpo( [a-z]+)+")  # in a sentence: the command, not a call of it
FILE = re.compile(r"(?:# @package _global_\n)?# \S+\.(?:py|yaml)\n")  # a recipe's file
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INTERVAL = re.compile(r"[+−]?\d+\.\d+ \([+−]?\d+\.\d+ to [+−]?\d+\.\d+\)")
ELSEWHERE = {"hydra/launcher=ray"}  # needs a separate environment


# --- commands


def commands(page: Path) -> Iterator[str]:
    """The commands of a page: lines of its blocks, and whole commands within sentences."""
    text = page.read_text()
    for block in BLOCK.findall(text):
        lines = re.sub(r"\\\n\s*", " ", re.sub(r"^ {4}", "", block, flags=re.MULTILINE))
        if not FILE.match(lines):
            yield from (re.sub(r"\s+# .*", "", line).strip() for line in lines.splitlines() if STARTS.match(line))
    for found in INLINE.findall(BLOCK.sub("", text)):
        line = " ".join(found.split())
        yield f"{line} --help" if NAME.fullmatch(line) else line


DOCUMENTED = list(dict.fromkeys((page.relative_to(ROOT), line) for page in PAGES for line in commands(page)))


class _ParsedError(Exception):
    """Ends a command once its arguments are accepted."""


@pytest.fixture
def until_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands compose and check their settings, or parse their arguments, and do no work."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*parser_and_arguments: Any) -> NoReturn:
        parse_args(*parser_and_arguments)
        raise _ParsedError

    def check_jobs(
        config: str, called: Any, body: Any, interrupted: str = "", arguments: Any = None, idle: Sequence[str] = ()
    ) -> NoReturn:
        given = sys.argv[1:] if arguments is None else arguments
        if "--help" not in given:
            check_settings(config, list(given))
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(common, "run", check_jobs)


def check_settings(config: str, arguments: list[str]) -> None:
    """Compose every job of a command and check its settings."""
    assert find_dashes(arguments) is None
    overrides = [each for each in arguments if not each.startswith("-")]
    jobs: Sequence[Sequence[str]] = [overrides]
    if "-m" in arguments:
        jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), max_batch_size=None)[0]
    for job in jobs:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            CHECKS[config](compose(config, overrides=list(job)))


def check_fit(cfg: DictConfig) -> None:
    from dnpo.judges.reward.fitting import fit

    tree = common.plain(cfg)
    check_values("data", reward.Preferences, tree.pop("data"))
    check_values("", fit, tree)


def check_leaderboard(cfg: DictConfig) -> None:
    tree = common.plain(cfg)
    parts, shared = leaderboard.PARTS, leaderboard.COMMON
    check_values("", leaderboard.top_settings, {key: tree[key] for key in shared})
    own = {key: tree[key] for key in tree if key not in (*shared, *parts)}
    leaderboard.Leaderboard(**check_values("", leaderboard.Leaderboard, own))
    for name in parts:
        check(name, tree[name])


def check_train(cfg: DictConfig) -> None:
    """Check the settings, and that labels by score have a judge, which the gate would miss."""
    train.check_settings(cfg)
    tree = common.plain(cfg)

    def targets(name: str) -> list[Any]:
        some = tree[name] if isinstance(tree[name], list) else [tree[name]]
        return [locate(name, each["_target_"]) for each in some]

    needed = any(getattr(each, "needs_scores", False) for each in targets("dsl"))
    assert not needed or all(getattr(each, "gives_scores", True) for each in targets("judge"))


CHECKS: dict[str, Any] = {
    "train": check_train,
    "evaluate": evaluate.check_settings,
    "agreement": agreement._check,
    "reward": check_fit,
    "leaderboard": check_leaderboard,
}


def try_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check one command.

    Raises:
        AssertionError: the program would refuse it, or this function does not know the program.
    """
    if words[0].endswith("python") and words[1] == "-m":
        words = words[2:]
        if words[0] not in ("pip", "pytest", "venv"):
            return call_module(words, monkeypatch)
    program, rest = Path(words[0]).name, words[1:]
    if program == "dnpo":
        name = next(name for name in (" ".join(rest[:2]), rest[0]) if name in VERBS or name.startswith("-"))
        if name == "figures":
            check_figures(rest[1:])
        assert status(lambda: dnpo(rest)) == 0
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"(?:dnpo|\.)\[(.+?)\]", " ".join(rest))
        assert set(named) <= set(extras), named
        assert all((ROOT / path).is_file() for option, path in itertools.pairwise(rest) if option == "-c")
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest
    elif program == "mlflow":
        from mlflow.cli import cli

        found = cli.get_command(None, rest[0])  # type: ignore[arg-type]
        assert found is not None
        found.make_context(rest[0], rest[1:])
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    elif program == "zensical":
        assert rest[0] in ("build", "serve")
    elif program == "gpu.sh":
        assert rest[0] in (ROOT / "benchmarks" / "gpu.py").read_text()
    else:
        assert program == "venv", words


def call_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m MODULE ARGUMENT …``, as far as its arguments are parsed."""
    name, rest = words[0], words[1:]
    if name == "analysis":
        check_figures(rest)
    monkeypatch.setattr(sys, "argv", [name, *rest])
    assert status(lambda: runpy.run_module(name, run_name="__main__")) == 0


def status(call: Callable[[], object]) -> object:
    """The exit status of a command, 0 if it got as far as the fixture lets it."""
    try:
        call()
    except _ParsedError:
        return 0
    except SystemExit as ended:
        return ended.code or 0
    return 0


def check_figures(arguments: list[str]) -> None:
    """Check the names of figures and tables."""
    if "--help" not in arguments:
        dashed = list(with_dashes(figures.parser(), arguments))
        figures.resolve(figures.parser().parse_known_args(dashed)[0].names, [])


@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # a module that is run was imported before
@pytest.mark.usefixtures("until_parsed")
@pytest.mark.parametrize(("page", "line"), DOCUMENTED, ids=str)
def test_a_documented_command_is_accepted(
    page: Path, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in re.split(r" && | ; |; ", line):
        words = shlex.split(part.partition(" > ")[0])
        while re.match(r"[A-Z_]+=|srun$", words[0]):
            words.pop(0)
        if ELSEWHERE & set(words) or any(word.startswith(("--config-dir", "also=")) for word in words):
            continue  # test_recipes.py executes the latter two
        try_command(words, monkeypatch)


def test_a_wrong_command_is_not_accepted(until_parsed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [
        *("dnpo train npo.alhpa=1", "dnpo sweep mian", "dnpo figures fig99", "dnpo store lst", "dnpo judge fit lr=x"),
        *("python -m dnpo.nothing", "make nothing", "python -m benchmarks.step --nothing", "unknown program"),
        *("pip install 'dnpo[nothing]'", "dnpo evaluate model.pth=x", "mlflow nothing"),
    ]
    for line in wrong:
        with pytest.raises((Exception, SystemExit)) as raised:
            try_command(shlex.split(line), monkeypatch)
        assert getattr(raised.value, "code", 1) != 0, line


def test_every_method_has_a_documented_command() -> None:
    words = {word for _, line in DOCUMENTED for word in line.split()}
    for method in METHODS:
        assert any(re.search(rf"method=\S*\b{method}\b", word) for word in words), method


def test_the_python_of_a_page_runs(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "reading-a-run.md").read_text())
    (code,) = [textwrap.dedent(block) for block in blocks if "import dnpo" in block]
    compose_settings = laboratory.compose
    there = (*SMOKE, *TINY, f"store={tiny / 'store'}", "verify=sizes")  # in the store, so nothing is computed
    monkeypatch.setattr(laboratory, "compose", lambda *given: compose_settings(*dict.fromkeys((*given, *there))))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert list(names["result"].table.index) == ["SFT", 0, 1]


# --- links, words, figures


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Zensical make them."""
    headings = re.findall(r"^#+ +(.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT / "docs") or page.parent == ROOT, f"{page.name}: {target} is outside docs/"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_and_in_the_lists() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [name for entry in settings["nav"] for name in entry.values()]
    pages = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert sorted(listed) == sorted([*pages, *(page.name for page in (ROOT / "docs").glob("*.ipynb"))])
    for front, folder in ((ROOT / "README.md", "docs/"), (ROOT / "docs" / "index.md", "")):
        linked = {target.partition("#")[0] for target in LINK.findall(front.read_text())}
        assert {f"{folder}{name}" for name in pages} - {f"{folder}index.md"} <= linked, front.name


def test_every_picture_is_shown() -> None:
    shown = {Path(target).name for page in PAGES for target in LINK.findall(page.read_text())}
    assert {path.name for path in (ROOT / "docs" / "pictures").iterdir()} <= shown


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= WORDS


def test_the_readme_has_the_two_commands_first() -> None:
    first, second = list(commands(ROOT / "README.md"))[:2]
    assert first.startswith('python -m pip install -c constraints.txt -e ".[dev]" && python -m dnpo.train')
    assert second.startswith("python -m pytest")


def test_the_readme_has_every_method_in_its_table() -> None:
    rows = [line.split("|")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == METHODS


def test_every_result_of_the_readme_is_on_a_page_of_results() -> None:
    shown = INTERVAL.findall(" ".join((ROOT / "README.md").read_text().split()))
    assert len(shown) >= 5
    results = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "methods.md"))
    assert [each for each in shown if each not in results.replace(" points (", " (")] == []
