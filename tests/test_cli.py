"""``dnpo VERB …``: one command, one grammar, its help."""

import argparse
import gc
import itertools
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import pytest
import yaml
from omegaconf import OmegaConf

from dnpo import __version__, cli
from dnpo.commands.common import refuse_dashes
from dnpo.commands.explain import describe
from dnpo.commands.grammar import Parser, find_dashes, parse
from dnpo.commands.verbs import VERBS
from dnpo.errors import SettingsError
from dnpo.settings import is_part, locate, setting_names
from tests.commands import SMOKE, TINY, run_command

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 79


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def dnpo(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(cwd, "dnpo.cli", *arguments)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help_fits_one_screen_and_names_every_verb(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = dnpo(tmp_path, *arguments)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= WIDTH
    for verb in VERBS:
        assert any(line.strip().startswith(f"{verb} ") for line in lines), verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(tmp_path: Path, verb: str, narrow: None) -> None:
    done = dnpo(tmp_path, *verb.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        ("store nope", 2, "(choose from 'list', 'verify', 'remove', 'publish')"),
        (
            "judge fit data.path=none.jsonl base=nowhere lr=1e-3 out=reward epochs=1 seed=1",
            1,
            "out=reward epochs=1 seed=1 error:",
        ),
    ],
    ids=["arguments", "first line"],
)
def test_lines_are_broken_between_words_on_a_terminal(tmp_path: Path, given: str, status: int, words: str) -> None:
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 60))
    command = [sys.executable, "-m", "dnpo", *given.split()]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, cwd=tmp_path, stdout=its, stderr=its, env=environment, check=False, timeout=120)
    os.close(its)
    lines = os.read(ours, 10_000).decode().splitlines()
    os.close(ours)
    assert done.returncode == status
    assert max(map(len, lines)) < 60
    assert words in " ".join(" ".join(lines).split())


def test_ctrl_c_during_imports_is_answered_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 130
    assert capsys.readouterr().out.strip() == "Interrupted."


def shown_settings(text: str) -> dict[str, str]:
    """The description of each setting in a help text."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("  ") and " = " in line[:60] and not line.startswith("   "):
            name, _, rest = line.strip().partition(" = ")
            found[name] = rest
        elif line.startswith(" " * 30) and name:
            found[name] += " " + line.strip()
        else:
            name = ""
    return found


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The settings of a parser and of the parsers of its verbs."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions_of(each)
        else:
            yield action


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("sweep", "methods", "completion", "doctor")])
def test_every_setting_in_the_help_of_every_verb_has_words(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default alone does not say what a setting is. The verbs left out have none of their own."""
    parsers: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, given: list[str]) -> None:
        parsers.append(self)
        raise SystemExit(0)

    monkeypatch.setattr(Parser, "parse_args", keep)
    words = shown_settings(dnpo(tmp_path, *verb.split(), "--help").stdout)
    for action in (action for parser in parsers for action in actions_of(parser)):
        words["/".join(action.option_strings) or action.dest] = "= " + (action.help or "")
    assert words
    described = {name: re.sub(r"^\S*|\(?default: \S+", "", text) for name, text in words.items()}
    assert {name for name, text in described.items() if not re.search(r"[a-z]{2}", text)} == set()


def test_help_shows_a_list_of_words_as_a_setting(tmp_path: Path, narrow: None) -> None:
    done = dnpo(tmp_path, "leaderboard", "--help")
    assert shown_settings(done.stdout)["benchmarks"].startswith("[arc,truthfulqa,")
    assert "for each iteration" not in done.stdout


@pytest.mark.parametrize("verb", ["evaluate", "leaderboard"])
def test_help_leaves_out_settings_without_effect(verb: str, tmp_path: Path) -> None:
    text = dnpo(tmp_path, verb, "--help").stdout
    shown = shown_settings(text)
    assert "model.path" in shown
    assert "model=" not in text, "it is no option there"
    assert [name for name in shown if name.startswith(("sft", "model.lora"))] == []


@pytest.mark.parametrize(
    "choices",
    [
        (),
        ("judge=openai", "rollout=live", "npo=off"),
        ("method=spa",),
        ("data=jsonl", "model=local", "launch=torchrun"),
    ],
)
def test_help_of_a_run_explains_every_setting_of_the_chosen_options(
    tmp_path: Path, choices: tuple[str, ...], narrow: None
) -> None:
    done = dnpo(tmp_path, "train", *choices, "--help")
    assert done.returncode == 0, done.stderr
    shown = shown_settings(done.stdout)
    assert "\njudge@second_judge=off\n  judge@second_judge=choice | code | " in done.stdout
    for choice in choices:
        place, _, option = choice.partition("=")
        if place == "method":
            continue
        assert f"\n{choice}\n" in done.stdout
        settings = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / place / f"{option}.yaml"))
        assert isinstance(settings, dict)
        for setting, value in settings.items():
            if setting not in ("_target_", "defaults", "start") and not is_part(value):
                assert any(name == f"{place}.{setting}" or name.startswith(f"{place}.{setting}.") for name in shown), (
                    setting
                )
    assert [name for name, text in shown.items() if len(text.split()) < 3] == []
    assert max(map(len, done.stdout.splitlines())) <= 100  # long addresses and lists of numbers are not wrapped


def test_a_sweep_of_values_is_explained_too(tmp_path: Path) -> None:
    done = dnpo(tmp_path, "train", "judge=longer", "npo.alpha=0.1,0.2", "--help")
    assert "\njudge=longer\n" in done.stdout


def test_the_docstring_of_every_part_in_conf_describes_each_of_its_settings() -> None:
    lacking, alike = [], set()
    for file in (ROOT / "conf").glob("*/**/*.yaml"):
        tree = OmegaConf.to_container(OmegaConf.load(file))
        targets = [tree["_target_"]] if isinstance(tree, dict) and "_target_" in tree else []
        for target in targets:
            if str(target).startswith("dnpo."):
                part = locate("part", str(target))
                lacking += [(target, name) for name in setting_names(part) if not describe(part).get(name)]
                words = [text for name, text in describe(part).items() if name in setting_names(part)]
                alike |= {(target, text) for text in words if words.count(text) > 1}
                assert not re.search(r"\bNone\b", " ".join(describe(part).values())), "settings say null"
    assert sorted(set(lacking)) == []
    assert alike == set()


# --- verbs ------------------------------------------------------------------------------------------------------------


def test_run_and_sweep_start_the_main_job_and_plan_leaves_no_folder(tmp_path: Path) -> None:
    settings = ("scale=smoke", "plan=true")
    one = dnpo(tmp_path, "train", *settings)
    assert one.returncode == 0
    assert one.stdout == run_command(tmp_path, "dnpo.train", *settings).stdout
    several = dnpo(tmp_path, "sweep", "alpha", *settings)
    assert several.stdout.count("Plan") == 5  # the values of α in sweeps/alpha.yaml
    given = dnpo(tmp_path, "sweep", "npo.alpha=0.01,0.1", *settings)
    assert given.stdout.count("Plan") == 2
    checked = dnpo(tmp_path, "train", "scale=smoke", "check=true", "tracking=off")
    assert checked.returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("store",)] == []


HEAVY = ("torch", "transformers", "pytorch_lightning", "mlflow", "sklearn", "datasets")
IMPORTED = f"""
import sys
from dnpo.train import main
main()
print("imported:", *sorted(set(sys.modules) & {set(HEAVY)}))
"""


def test_a_plan_and_a_finished_run_import_no_heavy_library(tiny: Path, tmp_path: Path) -> None:
    """So they take about as long as importing torch, or less."""
    shutil.copytree(tiny / "store", tmp_path / "store")
    for words in (("plan=true",), (*SMOKE, *TINY)):
        command = [sys.executable, "-c", IMPORTED, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("\nimported:\n"), done.stdout


def test_a_job_does_not_look_for_garbage_during_imports(tmp_path: Path) -> None:
    before = gc.get_threshold()
    gc.set_threshold(700)
    try:
        assert dnpo(tmp_path, "train", "scale=smoke", "plan=true").returncode == 0
        assert gc.get_threshold()[0] >= 10_000
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("module", ["dnpo", "dnpo.train"])
def test_no_last_collection_delays_the_end(module: str, tmp_path: Path) -> None:
    """Objects are frozen before the interpreter collects; a handler registered earlier runs later, and counts them."""
    count = "import atexit, gc, runpy, sys; atexit.register(lambda: print('frozen', gc.get_freeze_count()))"
    code = f"{count}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", code, *(["train"] if module == "dnpo" else []), "scale=smoke", "plan=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout.split("frozen")[1]) > 10_000


@pytest.mark.parametrize("verb", [name for name, each in VERBS.items() if each.module.startswith("analysis")])
def test_figures_and_claims_say_what_they_do_before_their_imports(verb: str, tmp_path: Path) -> None:
    """Python lists on the standard error what it has imported, in the order of time."""
    command = [sys.executable, "-X", "importtime", "-m", "dnpo", *verb.split(), "uri=sqlite:///none.db"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    told, imported = done.stderr.index(f"dnpo {__version__}: {verb} uri="), done.stderr.index(" scipy.stats\n")
    assert told < imported


def test_methods_are_listed_with_their_sources_and_explained(tmp_path: Path, narrow: None) -> None:
    text = dnpo(tmp_path, "methods").stdout
    assert max(map(len, text.splitlines())) <= WIDTH
    for file in (ROOT / "conf" / "method").glob("*.yaml"):
        listed = re.search(rf"^{file.stem} .*(?:\n  .*)*", text, re.MULTILINE)
        assert listed is not None
        assert listed[0].endswith("]"), f"{file.stem} has no source in the list"
        one = dnpo(tmp_path, "methods", file.stem).stdout
        assert f"python -m dnpo.train method={file.stem}" in one
        assert "Expected" in one
        assert max(len(line) for line in one.splitlines() if not line.startswith(" ")) <= WIDTH
        for line, following in itertools.pairwise(one[: one.index("Its settings:")].splitlines()):
            if line and following and not re.match(r"  (\d\.|python)|Deviation|Expected", following):
                assert len(line) + len(following.split()[0]) >= WIDTH - 1, f"{line!r} ends before it is full"
    assert "[Chen et al. 2024]" in text
    own = tmp_path / "own"
    (own / "method").mkdir(parents=True)
    (own / "method" / "brief.yaml").write_text("# @package _global_\n# Shorter responses (me 2026).\nseed: 3\n")
    (own / "method" / "silent.yaml").write_text("seed: 4\n")
    listed = dnpo(tmp_path, "methods", "--config-dir=own").stdout.splitlines()
    mine = [" ".join(line.split()) for line in listed if line.startswith(("brief", "silent"))]
    assert mine == ["brief Shorter responses. [me 2026]", "silent"]
    assert any(line.startswith("spin ") for line in listed)
    assert f"dnpo train --config-dir={own} method=NAME" in listed[-3]
    assert "seed: 3" in dnpo(tmp_path, "methods", "brief", "--config-dir", "own").stdout
    missing = dnpo(tmp_path, "methods", "--config-dir=none")
    assert (missing.returncode, "--config-dir=none: expected a folder" in missing.stderr) == (1, True)
    wrong = dnpo(tmp_path, "methods", "spinn")
    assert wrong.returncode == 1
    assert "Did you mean spin" in wrong.stderr


def test_the_doctor_names_what_is_installed_and_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    well = dnpo(tmp_path, "doctor")
    assert well.returncode == 0, well.stdout
    assert "torch" in well.stdout
    assert "sk-secret" not in well.stdout
    assert "OPENAI_API_KEY       set" in well.stdout
    from dnpo.commands import doctor

    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"peft": None, "mlflow": "2.0"}.get(name, found(name)))
    ill = dnpo(tmp_path, "doctor")
    assert ill.returncode == 1
    assert "peft: missing" in ill.stdout
    assert "mlflow: unsuitable" in ill.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("swep",), "Did you mean sweep?"),
        (("method=spin",), "dnpo train method=spin"),
        (("judge",), "dnpo judge agreement|fit|ledger"),
        (("judge", "agre"), "dnpo judge agreement|fit|ledger"),
    ],
)
def test_a_verb_that_does_not_exist_gets_advice(tmp_path: Path, given: tuple[str, ...], message: str) -> None:
    done = dnpo(tmp_path, *given)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("given", [("--version",), ("train", "--version"), ("evaluate", "--version")])
def test_the_version_is_the_packages(tmp_path: Path, given: tuple[str, ...]) -> None:
    assert dnpo(tmp_path, *given).stdout == f"dnpo {__version__}\n"


# --- one grammar ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ("train", ["--seed", "1"], "--seed 1: settings are written without dashes: seed=1"),
        ("train", ["--seed=1"], "--seed=1: settings are written without dashes: seed=1"),
        ("train", ["--seed"], "--seed: settings are written without dashes: seed=…"),
        ("train", ["--plan"], "--plan: settings are written without dashes: plan=true"),
        ("train", ["--data", "jsonl"], "without dashes: data=jsonl"),
        ("train", ["seed=3", "--npo.alpha", "0.1"], "without dashes: npo.alpha=0.1"),
        ("train", ["--store.root", "a b"], "without dashes: store.root='a b'"),
        ("train", ["--plan", "method=spin"], "without dashes: plan=true"),
        ("train", ["method=spin", "--npo.alpha", "0.1"], "npo.alpha: a setting of npo="),
        ("train", ["--jobs", "2"], "dashes. jobs: unknown setting. With --help, the command lists all settings."),
        ("train", ["-j", "2"], "-j 2: settings are written without dashes. j: unknown setting. With --help,"),
        ("train", ["--iteration=3"], "iteration: unknown setting. Did you mean iterations"),
        ("train", ["--judge.base-url=x"], "judge.base_url: a setting of judge=openai"),
        ("evaluate", ["--against", "human"], "without dashes: against=human"),
        ("evaluate", ["--iterations", "2"], "dashes. iterations: unknown setting."),
    ],
)
def test_settings_with_dashes_get_a_hint_that_the_verb_takes(config: str, given: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        refuse_dashes(config, given)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [["-m", "a=1"], ["--multirun", "a=1"], ["--config-dir", "x"], ["--cfg", "job"], ["-cjob"], ["-cd=x"], ["a=--b"]],
)
def test_hydras_options_with_dashes_are_accepted(given: list[str]) -> None:
    assert find_dashes(given) is None


def parser() -> argparse.ArgumentParser:
    found = Parser(prog="dnpo verb")
    found.add_argument("names", nargs="*")
    found.add_argument("--out", type=Path)
    found.add_argument("--no-log", action="store_true")
    found.add_argument("--apply", action="store_true")
    found.add_argument("--sweep", action="append", default=[])
    found.add_argument("--tag", action="append", default=[], metavar="NAME=VALUE")
    found.add_argument("--runs", nargs="+", default=[])
    return found


@pytest.mark.parametrize(
    ("with_equals", "with_dashes"),
    [
        (["out=folder"], ["--out", "folder"]),
        (["out=a=b"], ["--out", "a=b"]),
        (["apply=true"], ["--apply"]),
        (["apply=false"], []),
        (["log=false"], ["--no-log"]),
        (["log=true"], []),
        (["sweep=main,alpha"], ["--sweep", "main", "--sweep", "alpha"]),
        (["runs=a,b"], ["--runs", "a", "b"]),
        (["tag=npo.alpha=0.1,0.2"], ["--tag", "npo.alpha=0.1,0.2"]),
        (["one", "two", "out=x"], ["one", "two", "--out", "x"]),
        (["--tag", "data.train=4800"], ["--tag", "data.train=4800"]),
    ],
)
def test_both_spellings_mean_the_same(with_equals: list[str], with_dashes: list[str]) -> None:
    assert parse(parser(), with_equals) == parse(parser(), with_dashes)


def test_help_and_errors_write_settings_without_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(parser(), ["--help"])
    usage, *lines = capsys.readouterr().out.splitlines()
    assert usage == "usage: dnpo verb [names ...] [setting=value] …"
    found = [line.split()[0] for line in lines if re.match(r"  \S", line)]
    settings = ["out=OUT", "log=false", "apply=true", "sweep=SWEEP,…", "tag=NAME=VALUE,…", "runs=RUNS,…"]
    assert found == ["names", "-h,", *settings]
    with pytest.raises(SystemExit):
        parse(parser(), ["runs=", "--out"])
    assert "argument out: expected one argument" in capsys.readouterr().err
    needs = parser()
    needs.add_argument("--no-later", required=True, metavar="DAY", choices=("monday", "friday"))
    with pytest.raises(SystemExit):
        parse(needs, [])
    text = capsys.readouterr().err.strip()
    assert re.search(r"usage: dnpo verb .* later=DAY \[.*\n.*required: later$", text, re.DOTALL)


def test_a_file_with_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=1").mkdir()
    assert parse(parser(), ["seed=1"]).names == ["seed=1"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ou=x", "Did you mean out?"),
        ("apply=perhaps", "apply=true or apply=false"),
        ("seed=1", "no setting seed here"),
        ("--seed", "--seed: settings are written without dashes, and there is no setting seed here."),
        (
            "--tagg=1",
            "--tagg=1: settings are written without dashes, and there is no setting tagg here. Did you mean tag?",
        ),
    ],
)
def test_wrong_settings_are_named(given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(parser(), [given])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_settings_of_a_subcommand_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    assert dnpo(tmp_path, "store", "list", "store=store").returncode == 0
    wrong = dnpo(tmp_path, "store", "list", "apply=true")
    assert "there is no setting apply here" in wrong.stderr


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_figures_claims_and_sweeps_work_from_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    built, site, empty = (tmp_path / name for name in ("built", "site", "empty"))
    empty.mkdir()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    assert sorted(path.name.split("-")[0] for path in site.iterdir()) == ["dnpo", "dnpo"]  # itself and its metadata
    assert (site / "dnpo" / "py.typed").is_file()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "DNPO_CONF"}
        environment |= {"PYTHONPATH": str(site)}
        command = [sys.executable, "-m", "dnpo", *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=120)

    figures = run("figures", "list=true")
    assert "fig05_benchmark" in figures.stdout, figures.stderr
    claims = run("claims", "exploratory=true")
    assert "there is no such database" in claims.stderr
    sweep = run("sweep", "alpha", "plan=true", "scale=smoke")
    assert sweep.stdout.count("Plan") == 5, sweep.stderr
    assert list(empty.iterdir()) == []


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == str(citation["version"]) == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_words_of_values_and_of_keys_are_explained_apart() -> None:
    Word = Literal["prompt", "answer"]

    def part(
        *,
        columns: Mapping[Word, str | list[str]] | None = None,
        turns: Word = "prompt",
        each: dict[str, Word] | None = None,
        several: list[Word] | None = None,
        free: Mapping[str, int] | None = None,
    ) -> None: ...

    assert describe(part) == {
        "columns": "fields: prompt, answer",
        **dict.fromkeys(("turns", "each", "several"), "one of prompt, answer"),
    }


def test_the_fields_of_data_are_not_explained_as_values() -> None:
    text = describe(locate("data", "dnpo.data.files.JsonLines"))["columns"]
    assert "fields: id, prompt" in text
    assert "one of" not in text
