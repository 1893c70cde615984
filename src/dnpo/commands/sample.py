"""Sample responses of a policy of a finished run to your own prompts: ``dnpo sample RUN prompts=FILE``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dnpo import disk
from dnpo.commands.grammar import Parser, parse, program
from dnpo.errors import DataError, DnpoError, SettingsError
from dnpo.escape import announce, say, tell
from dnpo.wording import plural

if TYPE_CHECKING:
    from dnpo.running.card import SavedPolicy
    from dnpo.running.talk import Speaker


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``dnpo sample``. Errors that the user can correct become one line and exit status 1.

    Args:
        arguments: the command's; None: those of the process.
    """
    parser = Parser(
        prog=program("dnpo.commands.sample", "sample"),
        description="Sample responses of a policy of a finished run, as JSON lines.",
    )
    add_sampling(parser)
    parser.add_argument("--prompt", help="a prompt")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="lines of text, or .jsonl with prompt or messages")
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write them; by default the screen")
    given = parse(parser, arguments)
    try:
        _sample(given)
    except DnpoError as error:
        say(f"error: {error}", error=True)
        sys.exit(1)
    except KeyboardInterrupt:
        tell("\nInterrupted. Nothing was written.")
        sys.exit(130)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a policy and say how to sample."""
    parser.add_argument("run", type=Path, help="the run's folder, such as outputs/DATE/TIME")
    parser.add_argument(
        "--iteration", metavar="K", help="sft, or a number; by default the last, or the best of a run with keep=best"
    )
    parser.add_argument("--store", type=Path, help="where the store is now, if it has moved")
    parser.add_argument("--temperature", type=float, help="0 is greedy; by default the run's")
    parser.add_argument("--top-k", type=int, help="only the k likeliest tokens, 0 for all; by default the run's")
    parser.add_argument(
        "--top-p", type=float, help="only the likeliest tokens with this probability; by default the run's"
    )
    parser.add_argument("--max-tokens", type=int, default=0, help="length of a response; by default the run's")
    parser.add_argument("--seed", type=int, default=0, help="decides the samples (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")


def announce_policies(given: argparse.Namespace, iterations: Sequence[str | None]) -> None:
    """Say at once which policies of the run are loaded."""
    announce(f"loading {' and '.join(map(name_policy, iterations))} of {given.run}")


def name_policy(iteration: str | None) -> str:
    """Name a policy of a run as in a sentence; None is the one that the run keeps."""
    if iteration is None:
        return "the policy"
    return "the fine-tuned policy" if iteration == "sft" else f"iteration {iteration}"


def open_policies(given: argparse.Namespace, iterations: Sequence[str | None]) -> "tuple[list[Speaker], SavedPolicy]":
    """Load policies of the run; also return the first one's entry in the run's summary."""
    from dnpo.running.console import silence_libraries
    from dnpo.running.export import find_policy, read_summary
    from dnpo.running.talk import choose_sampling, open_speaker

    if given.max_tokens < 0:
        raise SettingsError(f"max_tokens={given.max_tokens}: expected at least 1, or 0 for the run's limit")
    saved = [
        find_policy(read_summary(given.run), iteration, given.store, setting)
        for setting, iteration in zip(("iteration", "against"), iterations, strict=False)
    ]
    sampling = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    samples = getattr(given, "samples", 1)
    for each in saved:
        choose_sampling(each, samples, **sampling)
    from dnpo.policy.model import device_of  # heavy, so a wrong run, iteration or setting is reported before

    silence_libraries()
    speakers = [
        open_speaker(
            given.run,
            iteration,
            given.store,
            device=str(device_of(given.device)),
            samples=samples,
            max_tokens=given.max_tokens,
            **sampling,
        )
        for iteration in iterations
    ]
    return speakers, saved[0]


def chosen(speaker: "Speaker") -> str:
    """Describe how it samples."""
    sampling = speaker.sampling
    if not sampling.temperature:
        return "greedy"
    cuts = [f"top_k={sampling.top_k}"] * bool(sampling.top_k) + [f"top_p={sampling.top_p:g}"] * (sampling.top_p < 1)
    return ", ".join([f"temperature {sampling.temperature:g}", *cuts])


def _sample(given: argparse.Namespace) -> None:
    if (given.prompt is None) == (given.prompts is None):
        raise SettingsError("give either prompt='…' or prompts=FILE")
    announce_policies(given, [given.iteration])
    from dnpo.running.talk import read_conversations, user

    conversations = [[user(given.prompt)]] if given.prompts is None else read_conversations(given.prompts)
    if given.out is not None and given.out.exists():
        raise DataError(f"out={given.out}: exists already; expected a new file")
    (speaker,), _ = open_policies(given, [given.iteration])
    responses = speaker.respond(conversations, given.seed)
    lines = [
        json.dumps(
            {
                "prompt": messages,
                "sample": each.sample,
                "response": each.text,
                "policy": speaker.name,
                "finish": each.finish,
                "tokens": each.tokens,
                "logprob": each.logprob,
            },
            ensure_ascii=False,
        )
        for messages, several in zip(conversations, responses, strict=True)
        for each in several
    ]
    if given.out is None:
        say("\n".join(lines))
        return
    aside = disk.name_aside(given.out)
    try:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        disk.replace(aside, given.out)
    except OSError as error:
        raise DataError(f"out={given.out}: {error.strerror}; expected a file that can be written") from error
    finally:
        aside.unlink(missing_ok=True)
    many = f"{plural(len(lines), 'response')} of {speaker.name} to {plural(len(conversations), 'prompt')}"
    tell(f"{given.out}: {many}, {chosen(speaker)}")
