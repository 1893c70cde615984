"""Completion of verbs and settings, also by real shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dnpo.cli import main
from dnpo.commands.completion import COMPOSED, SCRIPTS, complete
from dnpo.commands.verbs import VERBS


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("dnpo tr", ["train"]),
        ("dnpo judge ", ["agreement", "fit", "ledger"]),
        ("dnpo train method=dp", ["method=dpo"]),
        ("dnpo train seed=1 trainer.ke", ["trainer.keep="]),
        ("dnpo sweep abl", ["ablation"]),
        ("dnpo sweep method=dp", ["method=dpo"]),
        ("dnpo evaluate agai", ["against="]),
        ("dnpo leaderboard include", ["include_path="]),
        ("dnpo judge fit ba", ["base=", "batch_size="]),
        ("dnpo export RUN format=", ["format=gguf", "format=transformers"]),
        ("dnpo export RUN publ", ["public=false", "public=true"]),
        ("dnpo store ", ["list", "publish", "remove", "verify"]),
        ("dnpo store remove a", ["apply=false", "apply=true"]),
        ("dnpo figures sw", ["sweep="]),
        ("dnpo methods os", ["osp"]),
        ("dnpo completion ", ["bash", "fish", "zsh"]),
        ("dnpo doctor ", []),
        ("dnpo nothing ", []),
        ("dnpo train method=nothing", []),
    ],
)
def test_completions_of_a_command_line(line: str, found: list[str]) -> None:
    assert complete(line) == found


@pytest.mark.parametrize("name", [*COMPOSED, "methods"])
def test_a_folder_of_settings_can_be_given_to_verbs_with_options(name: str) -> None:
    assert complete(f"dnpo {name} --conf") == ["--config-dir="]
    assert "--config-dir=" not in complete(f"dnpo {name} ")
    assert complete(f"dnpo {name} --config-dir=nowhe") == [], "the shell completes folders"
    assert complete(f"dnpo {name} --config-dir nowhe") == []


@pytest.mark.parametrize("given", ["--config-dir=own", "--config-dir own", "-cd own"])
def test_options_in_a_folder_of_settings_are_completed(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own" / "method").mkdir(parents=True)
    (tmp_path / "own" / "method" / "brief.yaml").write_text("# @package _global_\n")
    monkeypatch.chdir(tmp_path)
    assert complete(f"dnpo train {given} method=bri") == ["method=brief"]
    assert complete(f"dnpo methods {given} bri") == ["brief"]
    assert complete("dnpo train method=bri") == []


def test_the_first_word_is_a_verb() -> None:
    assert complete("dnpo ") == sorted({name.split()[0] for name in VERBS})
    assert complete("dnpo") == complete("dnpo ")


@pytest.mark.parametrize("name", sorted({*VERBS} - {*COMPOSED}))
def test_completing_a_verb_does_not_run_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = complete(f"dnpo {name} ")
    assert "" not in words
    assert all(" " not in word for word in words)
    assert words or name in ("doctor", "judge ledger")
    assert not list(tmp_path.iterdir())


def test_every_script_asks_for_completions(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in SCRIPTS:
        with pytest.raises(SystemExit) as stopped:
            main(["completion", shell])
        assert not stopped.value.code
        assert "dnpo completion query" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "csh"])
    assert stopped.value.code == 2
    assert "bash|zsh|fish" in capsys.readouterr().err


def run(name: str, script: str, folder: Path) -> list[str]:
    """The lines that a script prints in a shell, in which ``dnpo`` is this one."""
    shell = shutil.which(name)
    if shell is None:
        pytest.skip(f"there is no {name}")
    program = folder / "dnpo"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dnpo "$@"\n')
    program.chmod(0o755)
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "ZDOTDIR": str(folder), "XDG_CONFIG_HOME": str(folder)}
    done = subprocess.run(
        [shell, "-c", script], capture_output=True, text=True, timeout=120, cwd=folder, env={**os.environ, **own}
    )
    assert not done.returncode, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "words", "reply"),
    [
        ("dnpo tr", ["dnpo", "tr"], ["train"]),
        ("dnpo train method=dp", ["dnpo", "train", "method", "=", "dp"], ["dpo"]),  # bash breaks words at =
        ("dnpo export RUN format=", ["dnpo", "export", "RUN", "format", "="], ["gguf", "transformers"]),
    ],
)
def test_bash_completes(line: str, words: list[str], reply: list[str], tmp_path: Path) -> None:
    array = " ".join(f"'{word}'" for word in words)
    script = (
        'eval "$(dnpo completion bash)"\n'
        f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({array}) COMP_CWORD={len(words) - 1}\n"
        '_dnpo; printf "%s\\n" "${COMPREPLY[@]}"; complete -p dnpo\n'
    )
    *found, rule = run("bash", script, tmp_path)
    assert [each for each in found if each] == reply
    assert "-F _dnpo dnpo" in rule


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "word", "ends", "continues"),
    [
        ("", "tr", ["train"], []),
        ("train", "method=dp", ["method=dpo"], []),
        ("train", "trainer.ke", [], ["trainer.keep="]),
        ("export RUN", "format=", ["format=gguf", "format=transformers"], []),
    ],
)
def test_zsh_completes(before: str, word: str, ends: list[str], continues: list[str], tmp_path: Path) -> None:
    script = (
        'eval "$(dnpo completion zsh)"\n'
        "compadd() {\n"
        "  local kind=ends\n"
        "  if [[ $1 == -S ]] { kind=continues; shift 2 }\n"
        "  shift\n"
        '  for each { print -r -- "$kind $each" }\n'
        "}\n"
        f"words=(dnpo {before} '{word}') CURRENT=$#words PREFIX='{word}'\n"
        "_dnpo; print -r -- $_comps[dnpo]\n"
    )
    *found, completer = run("zsh", script, tmp_path)
    assert found == [*(f"continues {each}" for each in continues), *(f"ends {each}" for each in ends)]
    assert completer == "_dnpo"


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("dnpo tr", ["train"]),
        ("dnpo train method=dp", ["method=dpo"]),
        ("dnpo export RUN format=", ["format=gguf", "format=transformers"]),
        ("dnpo sample RUN prompts=so", ["prompts=some.txt"]),  # a file
    ],
)
def test_fish_completes(line: str, reply: list[str], tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("A prompt\n")
    assert run("fish", f"dnpo completion fish | source; complete -C '{line}'", tmp_path) == reply
