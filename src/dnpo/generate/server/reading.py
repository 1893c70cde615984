"""Read the replies of an engine, and refuse replies that are not exactly the requested samples.

An error gives what was received, what was requested, and what to change. Nothing is repaired: with one token more or
less, training would read tokens that were not sampled.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dnpo.errors import EngineError

DIGITS = 8  # decimals of a log-probability that are kept
SLACK = 1e-3  # how far above 0 rounding may put a log-probability


@dataclass(frozen=True)
class Asked:
    """The request that a reply must match.

    Attributes:
        prompt: token ids.
        count: number of completions.
        limit: maximum number of tokens of each.
        stops: tokens that end a completion.
        vocabulary: size of the policy's vocabulary.
        model: the model's name.
    """

    prompt: list[int]
    count: int
    limit: int
    stops: Collection[int]
    vocabulary: int
    model: str


@dataclass(frozen=True)
class Drawn:
    """A completion: its token ids, and the engine's log-probability of each."""

    tokens: list[int]
    logps: list[float]


@dataclass(frozen=True)
class Reply:
    """A reply to one request.

    Attributes:
        drawn: the completions, in the order of their numbers.
        prompt: the engine's log-probabilities of the prompt's tokens, without the first; empty if it gives none.
    """

    drawn: list[Drawn]
    prompt: list[float]


class Unfinished(Exception):
    """A reply that is incomplete or reports that the engine did not finish; the request can be sent again."""


def read_reply(raw: bytes, asked: Asked) -> Reply:
    """Read a reply.

    Raises:
        Unfinished: the reply is broken, or the engine gave up.
        EngineError: the reply cannot be used; names what is wrong with it.
    """
    reply = _parse(raw)
    served = reply.get("model")
    if isinstance(served, str) and served != asked.model:
        raise EngineError(f"the reply is by the model {served}, but {asked.model} was asked")
    choices = sorted(reply["choices"], key=lambda choice: _whole(choice.get("index")) or 0)
    if len(choices) != asked.count:
        raise EngineError(f"{len(choices)} completions came back, but n={asked.count} were asked for")
    usage = reply.get("usage")
    read = _whole(usage.get("prompt_tokens")) if isinstance(usage, Mapping) else None
    if read is not None and read != len(asked.prompt):
        raise EngineError(_other_prompt(f"{read:,} tokens", len(asked.prompt)))
    return Reply([_read_choice(choice, asked) for choice in choices], _read_prompt(choices[0], asked.prompt))


def _read_prompt(choice: Mapping[str, Any], prompt: Sequence[int]) -> list[float]:
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list):
        return []
    if len(rows) != len(prompt):
        raise EngineError(_other_prompt(f"prompt_logprobs of {len(rows):,} tokens", len(prompt)))
    found = []
    for token, row in list(zip(prompt, rows, strict=True))[1:]:
        entry = row.get(str(token)) if isinstance(row, Mapping) else None
        value = entry.get("logprob") if isinstance(entry, Mapping) else None
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise EngineError(_other_prompt(f"prompt_logprobs without token {token}", len(prompt)))
        found.append(float(value))
    return found


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(raw)
        choices = reply["choices"]
        sound = isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise Unfinished("a broken reply") from None
    if not sound:
        raise Unfinished("a broken reply")
    return dict(reply)


def _read_choice(choice: Mapping[str, Any], asked: Asked) -> Drawn:
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
        raise Unfinished(f"the engine ended a completion by {str(finish)[:100]}")
    tokens = _read_tokens(choice, asked)
    _check_end(tokens, finish, asked)
    table = choice.get("logprobs")
    logps = table.get("token_logprobs") if isinstance(table, Mapping) else None
    if not isinstance(logps, list) or len(logps) != len(tokens):
        there = f"{len(logps):,}" if isinstance(logps, list) else "no"
        raise EngineError(f"{there} log-probabilities (logprobs.token_logprobs) of {len(tokens):,} tokens came back")
    for token, logp in zip(tokens, logps, strict=True):
        if not isinstance(logp, int | float) or not math.isfinite(logp) or logp > SLACK:
            raise EngineError(f"the log-probability of token {token} is {logp!r}; expected a number of at most 0")
    return Drawn(tokens, [float(f"{logp:.{DIGITS}g}") for logp in logps])


def _read_tokens(choice: Mapping[str, Any], asked: Asked) -> list[int]:
    tokens = choice.get("token_ids")
    if not isinstance(tokens, list) or not tokens:
        raise EngineError(
            "no token ids came back (token_ids), so the sampled tokens are not known; expected a server that knows "
            "return_token_ids, such as vLLM from 0.10.2 on"
        )
    wrong = [token for token in tokens if (number := _whole(token)) is None or not 0 <= number < asked.vocabulary]
    if wrong:
        raise EngineError(
            f"token {wrong[0]!r} is not in the policy's vocabulary of {asked.vocabulary:,}: the server has another "
            "model or tokenizer"
        )
    sent = choice.get("prompt_token_ids")
    if isinstance(sent, list) and sent != asked.prompt:
        raise EngineError(_other_prompt(f"{len(sent):,} tokens", len(asked.prompt)))
    if len(tokens) > asked.limit:
        if tokens[: len(asked.prompt)] == asked.prompt:
            raise EngineError("the prompt's tokens came back before the completion; the server must not echo them")
        raise EngineError(f"{len(tokens):,} tokens came back, but max_tokens={asked.limit:,} was asked for")
    return tokens


def _check_end(tokens: Sequence[int], finish: str, asked: Asked) -> None:
    stop = next((number for number, token in enumerate(tokens) if token in asked.stops), None)
    if stop is not None and stop < len(tokens) - 1:
        raise EngineError(
            f"a completion continues for {len(tokens) - 1 - stop:,} tokens after stop token {tokens[stop]}; the server "
            "must not ignore end-of-sequence"
        )
    if finish == "stop" and stop is None:
        raise EngineError(
            f"a completion of {len(tokens):,} tokens ended (finish_reason=stop) without one of the stop tokens "
            f"{', '.join(map(str, sorted(asked.stops)))}: the server leaves it out, or has other stop tokens or texts"
        )
    if finish == "length" and stop is None and len(tokens) < asked.limit:
        raise EngineError(
            f"a completion was cut at {len(tokens):,} tokens, but max_tokens={asked.limit:,} was asked for: the "
            f"server's context has no room for them after a prompt of {len(asked.prompt):,} tokens (vLLM: "
            "--max-model-len)"
        )


def _other_prompt(what: str, count: int) -> str:
    return (
        f"the server read another prompt: {what}, but {count:,} tokens were sent; it must neither cut prompts nor add "
        "tokens (vLLM: add_special_tokens, truncate_prompt_tokens)"
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
