"""Completion of verbs and settings in a shell.

eval "$(dnpo completion bash)"                  # in ~/.bashrc
eval "$(dnpo completion zsh)"                   # in ~/.zshrc
dnpo completion fish | source                   # in ~/.config/fish/config.fish
"""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

from dnpo.commands.grammar import COMPLETES, HELP, take_folder
from dnpo.commands.verbs import VERBS
from dnpo.errors import SettingsError
from dnpo.escape import say
from dnpo.settings import conf_folder

BASH = r"""_dnpo() {
    local line=${COMP_LINE:0:COMP_POINT} word=${COMP_WORDS[COMP_CWORD]} IFS=$'\n'
    local given=${line##* }
    case $word in [=@:]) word= ;; esac
    COMPREPLY=($(dnpo completion query "$line" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"${given%"$word"}"}")
}
complete -o nospace -o default -o bashdefault -F _dnpo dnpo
"""
ZSH = r"""(( $+functions[compdef] )) || { autoload -U compinit && compinit }
_dnpo() {
    local -a found=("${(@f)$(dnpo completion query "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    if [[ -n $found ]]; then
        compadd -S '' -- ${(M)found:#*[=.@]}
        compadd -- ${found:#*[=.@]}
    else
        compset -P '*='
        _files
    fi
}
compdef _dnpo dnpo
"""
FISH = r"""function _dnpo
    set -l found (dnpo completion query (commandline -cp | string collect) 2>/dev/null)
    if set -q found[1]
        printf '%s\n' $found
    else
        set -l name (string match -r '^[^=]*=' -- (commandline -ct))
        printf '%s\n' "$name"(__fish_complete_path (string replace -- "$name" '' (commandline -ct)))
    end
end
complete -c dnpo -f -a '(_dnpo)'
"""
FOLDER = "--config-dir="
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
COMPOSED = {  # verbs whose settings Hydra composes and lists
    "train": "dnpo.commands.train",
    "sweep": "dnpo.commands.train",
    "evaluate": "dnpo.commands.evaluate",
    "leaderboard": "dnpo.commands.leaderboard",
    "judge agreement": "dnpo.commands.agreement",
    "judge fit": "dnpo.commands.reward",
}
USAGE = """usage: dnpo completion bash|zsh|fish

Print a script that completes verbs, settings and options in a shell.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dnpo completion``.

    Args:
        arguments: the command's; None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if len(given) == 2 and given[0] == "query":
        sys.stdout.write("".join(f"{each}\n" for each in complete(given[1])))
    elif len(given) == 1 and given[0] in SCRIPTS:
        sys.stdout.write(SCRIPTS[given[0]])
    else:
        asked = bool(HELP & set(given))
        say(USAGE + (__doc__ or "").partition("\n")[2].rstrip(), error=not asked)
        sys.exit(0 if asked else 2)


def complete(line: str) -> list[str]:
    """The words with which the last word of a command line can be completed.

    Args:
        line: the line up to the cursor, such as ``dnpo train met``.
    """
    *before, word = line.split(" ")[1:] or [""]
    before = [each for each in before if each]
    own, before = _take_folder(before)
    name = next((name for name in (" ".join(before[:2]), *before[:1]) if name in VERBS), "")
    if not name:
        verbs = [each.split() for each in VERBS]
        found = [each[len(before)] for each in verbs if each[: len(before)] == before and len(each) > len(before)]
    elif name in COMPOSED:
        given = [*VERBS[name].before, *own, "-sc", "query=bash"]
        found = [each for part in _ask(COMPOSED[name], given, f"dnpo {word}") for each in part.split()]
        found += _options("sweep") if name == "sweep" else ()
        found += [FOLDER] if word.startswith("-") else ()
    elif name in ("methods", "doctor", "completion"):  # these have no settings
        methods = [*_options("method", *own), *([FOLDER] if word.startswith("-") else ())]
        found = {"methods": methods, "doctor": [], "completion": list(SCRIPTS)}[name]
    else:
        verb = VERBS[name]
        found = list(_ask(verb.module, [*verb.before, *before[len(name.split()) :]], line))
    return sorted({each for each in found if each and each.startswith(word)})


def _take_folder(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into the option of the user's folder of settings, as one word, and all others."""
    try:
        with redirect_stderr(io.StringIO()):
            folder, others = take_folder(words)
    except (SettingsError, SystemExit):  # there is no such folder, or not yet: it is what is completed
        return [], [each for each in words if each.partition("=")[0] not in ("--config-dir", "-cd")]
    return [f"{FOLDER}{folder}"] if folder else [], others


def _options(part: str, *own: str) -> list[str]:
    folders = [conf_folder(), *(Path(each.removeprefix(FOLDER)) for each in own)]
    return [file.stem for folder in folders for file in (folder / part).glob("*.yaml")]


def _ask(module: str, arguments: Sequence[str], line: str) -> Iterator[str]:
    """Call a command so that it prints the possible completions, and return the lines."""
    printed = io.StringIO()
    os.environ |= {"COMP_LINE": line, COMPLETES: "1"}
    try:
        with redirect_stdout(printed), redirect_stderr(io.StringIO()):
            import_module(module).main(list(arguments))
    except SystemExit:
        pass
    finally:
        for name in ("COMP_LINE", COMPLETES):
            os.environ.pop(name, None)
    yield from printed.getvalue().splitlines()
