"""Ask a server for the responses of one stage, all with the weights of one policy.

A reply is written to disk when it arrives, so a killed stage asks only for missing ones. The policy in this process
scores the responses, in a pass that all responses need anyway. The difference between engine and this process is
measured token by token; it shows if the server has other weights, such as those of an earlier iteration.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dnpo import disk
from dnpo.connection import Connection
from dnpo.errors import EngineError
from dnpo.generate import Ahead, Sampling
from dnpo.generate.server import PART, Server
from dnpo.generate.server.asking import Asker
from dnpo.generate.server.contact import find_model
from dnpo.generate.server.launching import Launched, free_port
from dnpo.generate.server.reading import Drawn, Reply
from dnpo.policy.model import Policy
from dnpo.records import Prompt, Response
from dnpo.seeding import derive
from dnpo.store import Report, write_json

PROBES, PROBE_TOKENS = 4, 8  # number of prompts of the check at the start, and maximum number of tokens after each
PROBE_SLACK = 4.0  # factor for the check at the start, whose tokens are few and unlikely
ENOUGH = 256  # with fewer new tokens, their mean difference is checked only together with all earlier tokens
# Parameters that the model's folder may set on the server (generation_config.json); these values have no effect.
PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Differences:
    """Absolute differences of log-probabilities between engine and this process, in nats.

    Attributes:
        tokens: number of tokens.
        total: sum over the tokens.
        greatest: the largest difference of a token.
    """

    tokens: int = 0
    total: float = 0.0
    greatest: float = 0.0

    def __add__(self, other: "Differences") -> "Differences":
        return Differences(self.tokens + other.tokens, self.total + other.total, max(self.greatest, other.greatest))

    @property
    def mean(self) -> float:
        """The mean over the tokens."""
        return self.total / max(self.tokens, 1)

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats a token on average, {self.greatest:.2g} at most, over {self.tokens:,} tokens"


class Session:
    """Gives a stage responses of a policy; implements :class:`dnpo.generate.hf.Engine`.

    Args:
        server: the settings.
        policy: the policy that responds.
        saved: a folder with its whole weights, if there is one.
        folder: the stage's folder for replies and the server's log.
        report: receives notes.
    """

    def __init__(self, server: Server, policy: Policy, saved: Path | None, folder: Path, report: Report) -> None:
        self.server, self.policy, self.saved, self.folder, self.report = server, policy, saved, folder, report
        self.stops = frozenset(policy.stop_ids)
        self.vocabulary = len(policy.head.weight_VH)
        self._launched: Launched | None = None
        self._asker: Asker | None = None  # once the server has passed the check
        self._drawn: list[Drawn] = []  # completions that are not compared yet
        self._files: list[Path] = []  # the files of these completions
        folder.mkdir(exist_ok=True)

    def close(self) -> None:
        """End the server, if this session started one."""
        if self._launched is not None:
            self._launched.close()
        self._launched = self._asker = None

    # --- what a stage calls

    def complete(
        self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling, limit: int, seed: int, report: Report
    ) -> list[list[int]]:
        """Complete each prompt, up to and including a stop token or cut at the limit.

        Args:
            rows: prompts, each with the number of its sample; samples of one request are consecutive.
            sampling: temperature, truncation, and the number of requests in one file.
            limit: maximum number of completion tokens.
            seed: decides the samples, together with the prompts' ids.
            report: advanced with every response.
        """
        requests = [
            self._request(prompt.token_ids, count, sampling, limit, derive(seed, "sample", prompt.id, first))
            for prompt, first, count in _group(rows)
        ]
        size = Ahead.like(sampling).shard_size
        self._drawn, self._files = [], []
        for some in (requests[first : first + size] for first in range(0, len(requests), size)):
            path = self.folder / f"{_hash(some)}.jsonl"
            found = _read(path)
            report.advance(sum(len(found[i]) for i in found))
            missing = {i: request for i, request in enumerate(some) if i not in found}
            if missing:

                def keep(number: int, reply: Reply, path: Path = path) -> None:
                    _append(path, number, reply.drawn)
                    report.advance(len(reply.drawn))

                asker = self._start([request["prompt"] for request in some[:PROBES]], min(limit, PROBE_TOKENS))
                found |= {i: reply.drawn for i, reply in asker.ask(missing, keep).items()}
            self._drawn += [each for i in range(len(some)) for each in found[i]]
            self._files.append(path)
        self._warn_of_equal_samples(rows, sampling)
        return [each.tokens for each in self._drawn]

    def compare(self, responses: Sequence[Response], scores: Sequence[Sequence[float]]) -> None:
        """Compare the engine's log-probabilities of the last completions with those of the policy here.

        Args:
            responses: the responses that were made of the completions; a last token may have been replaced.
            scores: the policy's log-probability of each of their tokens.

        Raises:
            EngineError: they differ by more than the settings allow; the completions are discarded.
        """
        differences = [
            abs(theirs - ours)
            for drawn, response, row in zip(self._drawn, responses, scores, strict=True)
            for token, kept, theirs, ours in zip(drawn.tokens, response.token_ids, drawn.logps, row, strict=False)
            if token == kept
        ]
        here = Differences(len(differences), sum(differences), max(differences, default=0.0))
        judged = [self.measured() + here, *([here] if here.tokens >= ENOUGH else [])]
        server, problem = self.server, ""
        if max(each.mean for each in judged) > server.max_mean_difference:
            problem = f"max_mean_difference={server.max_mean_difference:g}"
        elif server.max_difference is not None and here.greatest > server.max_difference:
            problem = f"max_difference={server.max_difference:g}"
        if problem:
            for path in self._files:
                path.unlink(missing_ok=True)
            raise EngineError(
                f"{PART}.{problem}: log-probabilities of {self._name()} differ from this policy's by {here}; "
                f"{_REASONS} These responses are not used"
            )
        name = _hash([path.name for path in self._files])
        write_json(self.folder / f"{name}.json", {"tokens": here.tokens, "sum": here.total, "greatest": here.greatest})

    def measured(self) -> Differences:
        """The differences of all responses of the stage so far, including those of a killed run."""
        files = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        return sum((Differences(each["tokens"], each["sum"], each["greatest"]) for each in files), Differences())

    # --- the server

    def _start(self, prompts: Sequence[list[int]], limit: int) -> Asker:
        """Start or find the server, and check with some prompts that it has the policy; done once."""
        if self._asker is not None:
            return self._asker
        server, port = self.server, free_port()
        base_url = server.base_url or f"http://127.0.0.1:{port}/v1"
        connection = Connection(base_url, server.key_from, headers=server.headers or {}, timeout=server.timeout)
        if server.launch is not None:
            command = server.command(str(self._whole()), port)
            self._launched = Launched(command, self.folder / "server.log", connection)
        model = find_model(server, connection, self._launched)
        asker = Asker(server, connection, self._launched, model, self.stops, self.vocabulary)
        self._probe(asker, prompts, limit)
        self._asker = asker
        return asker

    def _whole(self) -> Path:
        """A folder with the policy's whole weights, written if there is none."""
        if self.saved is not None:
            return self.saved
        if hasattr(self.policy.model, "peft_config"):
            raise EngineError(
                "generate=server: the policy has adapters that are not merged into its weights, and a server cannot "
                "load these; sample in this process (generate.engine=null)"
            )
        folder = self.folder / "policy"
        self.policy.save(folder)
        return folder

    def _probe(self, asker: Asker, prompts: Sequence[list[int]], limit: int) -> None:
        """Check that the server has the policy, by log-probabilities of prompts and of a few tokens after them."""
        found, greedy = Differences(), Sampling(temperature=0.0)
        requests = [{**self._request(ids, 1, greedy, limit, 0), "prompt_logprobs": 1} for ids in prompts]
        replies = asker.ask(dict(enumerate(requests)), lambda _number, _reply: None)
        rows = [ids[1:] + replies[i].drawn[0].tokens for i, ids in enumerate(prompts)]
        with self.policy.evaluating():
            _, scores = self.policy.score_tokens([ids[:1] for ids in prompts], rows)
        for i, row in enumerate(scores):
            theirs = replies[i].prompt + replies[i].drawn[0].logps
            each = [abs(one - other) for one, other in zip(theirs, row[len(row) - len(theirs) :], strict=True)]
            found += Differences(len(each), sum(each), max(each))
        if found.mean > PROBE_SLACK * self.server.max_mean_difference:
            raise EngineError(
                f"{PART}: {asker.name} may not have the policy that responds: its log-probabilities of the first "
                f"prompts differ by {found}; {_REASONS}"
            )

    # --- requests

    def _request(self, prompt: list[int], count: int, sampling: Sampling, limit: int, seed: int) -> dict[str, Any]:
        """The body of a request, without the model's name."""
        return {
            "prompt": prompt,
            "n": count,
            "seed": seed,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
            **PLAIN,
            "max_tokens": limit,
            "stop_token_ids": sorted(self.stops),
            "logprobs": 1,
            "return_token_ids": True,
            "add_special_tokens": False,
        }

    def _name(self) -> str:
        return "the server" if self._asker is None else self._asker.name  # none if all replies are on the disk

    def _warn_of_equal_samples(self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling) -> None:
        """Warn if all samples of each prompt are equal, for example because a server uses one seed for them."""
        by_prompt: dict[str, set[tuple[int, ...]]] = {}
        for (prompt, _), drawn in zip(rows, self._drawn, strict=True):
            by_prompt.setdefault(prompt.id, set()).add(tuple(drawn.tokens))
        counts = Counter(prompt.id for prompt, _ in rows)
        several = [id for id, count in counts.items() if count > 1]
        if sampling.temperature > 0 and len(several) > 1 and all(len(by_prompt[id]) == 1 for id in several):
            self.report.note(
                f"warning: all samples of each of {len(several):,} prompts are equal: {self._name()} may use one seed "
                f"for all completions of a request (n). Take another version of it and change {PART}.version, so that "
                f"these samples are not reused, or sample in this process ({PART}=null)"
            )


_REASONS = (
    "it may have other weights (an earlier iteration's?) or another tokenizer, compute in a coarser type, or be set to "
    "give log-probabilities after temperature and truncation (vLLM: --logprobs-mode)."
)


def _group(rows: Sequence[tuple[Prompt, int]]) -> list[tuple[Prompt, int, int]]:
    """Join consecutive samples of a prompt: the prompt, the first sample's number, and how many there are."""
    groups = groupby(enumerate(rows), key=lambda each: (each[1][0].id, each[1][1] - each[0]))
    found = [[row for _, row in some] for _, some in groups]
    return [(some[0][0], some[0][1], len(some)) for some in found]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _append(path: Path, number: int, drawn: Sequence[Drawn]) -> None:
    """Append the reply to one request to a file, in a single write."""
    row = [number, [each.tokens for each in drawn], [each.logps for each in drawn]]
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, f"{json.dumps(row)}\n".encode())
    finally:
        os.close(handle)


def _read(path: Path) -> dict[int, list[Drawn]]:
    """The replies in a file by request; an incomplete last line is removed."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        aside = disk.name_aside(path)
        aside.write_bytes(whole)
        disk.replace(aside, path)
    found = {}
    for line in whole.splitlines():
        number, tokens, logps = json.loads(line)
        found[number] = [Drawn(*both) for both in zip(tokens, logps, strict=True)]
    return found
