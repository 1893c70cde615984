"""Ask a server for the responses of one stage, all with the weights of one policy.

A reply is written to disk when it arrives, so a killed stage asks only for what is missing. The policy in this process
scores the responses, in the pass that all responses need. The difference between engine and this process is measured
token by token; it shows if the server has other weights, such as those of an earlier iteration.
"""

import asyncio
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnpo import disk
from dnpo.connection import Connection, Failure, pause, receive
from dnpo.errors import EngineError
from dnpo.generate import Ahead, Sampling
from dnpo.generate.server import PART, Server
from dnpo.generate.server.contact import KEPT, LARGEST_REPLY, explain, find_model
from dnpo.generate.server.launching import Launched, free_port
from dnpo.generate.server.reading import Asked, Drawn, Unfinished, prompt_logps, read_reply
from dnpo.policy.model import Policy
from dnpo.records import Prompt, Response
from dnpo.seeding import derive
from dnpo.store import Report, write_json

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PROBES, PROBE_TOKENS = 4, 8  # prompts of the check at the start, and tokens after each
PROBE_SLACK = 4.0  # factor for the check at the start, whose tokens are few and unlikely
ENOUGH = 256  # tokens of which the mean difference is judged alone; fewer are judged with all before
# What the model's folder may set otherwise on the server (generation_config.json); these values change nothing.
PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Differences:
    """Absolute differences of log-probabilities, engine against this process, in nats.

    Attributes:
        tokens: number of tokens.
        total: sum over the tokens.
        greatest: the largest of a token.
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
        self._connection: Connection | None = None  # once it has passed the check
        self._model = ""
        self._drawn: list[Drawn] = []  # that were not compared yet
        self._files: list[Path] = []  # where they are
        folder.mkdir(exist_ok=True)

    def close(self) -> None:
        """End the server, if this session started one."""
        if self._launched is not None:
            self._launched.close()
            self._launched = None
        self._connection = None

    # --- what a stage calls

    def complete(
        self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling, limit: int, seed: int, report: Report
    ) -> list[list[int]]:
        """Complete each prompt, up to and including a stop token or cut at the limit.

        Args:
            rows: prompts, each with the number of its sample; samples of one request are consecutive.
            sampling: temperature, truncation, and how many requests are written into one file.
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
                self._start([request["prompt"] for request in some][:PROBES])
                found |= self._ask(missing, path, report)
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
                f"{PART}.{problem}: log-probabilities of {self._where()} differ from this policy's by {here}; "
                f"{_REASONS} These responses are not used"
            )
        name = _hash([path.name for path in self._files])
        write_json(self.folder / f"{name}.json", {"tokens": here.tokens, "sum": here.total, "greatest": here.greatest})

    def measured(self) -> Differences:
        """The differences of all responses of the stage so far, those of a killed run included."""
        files = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        return sum((Differences(each["tokens"], each["sum"], each["greatest"]) for each in files), Differences())

    # --- the server

    def _start(self, prompts: Sequence[list[int]]) -> None:
        """Start the server or connect to it, and check that it has the policy, once."""
        if self._connection is not None:
            return
        server, port = self.server, free_port()
        base_url = server.base_url or f"http://127.0.0.1:{port}/v1"
        connection = Connection(base_url, server.key_from, headers=server.headers or {}, timeout=server.timeout)
        if server.launch is not None:
            command = server.command(str(self._whole()), port)
            self._launched = Launched(command, self.folder / "server.log", connection)
        self._model = find_model(server, connection, self._launched)
        self._connection = connection
        try:
            self._probe(prompts)
        except BaseException:
            self._connection = None
            raise

    def _whole(self) -> Path:
        """A folder with the policy's whole weights, written if there is none."""
        if self.saved is not None:
            return self.saved
        if hasattr(self.policy.model, "peft_config"):
            raise EngineError(
                "generate=server: the policy has adapters that are not merged into its weights, which a server cannot "
                "be given; sample in this process (generate.engine=null)"
            )
        folder = self.folder / "policy"
        self.policy.save(folder)
        return folder

    def _probe(self, prompts: Sequence[list[int]]) -> None:
        """Check that the server has the policy: log-probabilities of known prompts, and of some tokens after them."""
        found, greedy = Differences(), Sampling(temperature=0.0)
        requests = [{**self._request(ids, 1, greedy, PROBE_TOKENS, 0), "prompt_logprobs": 1} for ids in prompts]
        raws = asyncio.run(self._round(dict(enumerate(requests)), None, None))
        drawn = {i: read_reply(raw, self._asked(requests[i]))[0] for i, raw in raws.items()}
        rows = [ids[1:] + drawn[i].tokens for i, ids in enumerate(prompts)]
        with self.policy.evaluating():
            _, scores = self.policy.score_tokens([ids[:1] for ids in prompts], rows)
        for i, ids in enumerate(prompts):
            theirs = [*(self._of_prompt(raws[i], ids)), *drawn[i].logps]
            ours = scores[i][len(scores[i]) - len(theirs) :]
            each = [abs(one - other) for one, other in zip(theirs, ours, strict=True)]
            found += Differences(len(each), sum(each), max(each))
        if found.mean > PROBE_SLACK * self.server.max_mean_difference:
            raise EngineError(
                f"{PART}: {self._where()} has another model than the policy that responds: its log-probabilities of "
                f"the first prompts differ by {found}; {_REASONS}"
            )

    def _of_prompt(self, raw: bytes, prompt: list[int]) -> list[float]:
        try:
            return prompt_logps(raw, prompt)
        except EngineError as error:
            raise self._named(error) from None

    # --- requests

    def _request(self, prompt: list[int], count: int, sampling: Sampling, limit: int, seed: int) -> dict[str, Any]:
        """The body of a request, but for the model's name."""
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

    def _asked(self, request: Mapping[str, Any]) -> Asked:
        return Asked(request["prompt"], request["n"], request["max_tokens"], self.stops, self.vocabulary, self._model)

    def _ask(self, requests: Mapping[int, dict[str, Any]], path: Path, report: Report) -> dict[int, list[Drawn]]:
        """Ask until everything is answered; replies are appended to a file as they come."""
        raws = asyncio.run(self._round(requests, path, report))
        return {i: read_reply(raw, self._asked(requests[i])) for i, raw in raws.items()}

    async def _round(
        self, requests: Mapping[int, dict[str, Any]], path: Path | None, report: Report | None
    ) -> dict[int, bytes]:
        """Send requests, many at once, and return the replies, each of which can be read."""
        connection = self._connection
        assert connection is not None, "_start has been called"
        waiting, raws = list(requests.items())[::-1], dict[int, bytes]()

        async def work(client: "AsyncOpenAI") -> None:
            while waiting:
                i, request = waiting.pop()
                raws[i] = await self._send(client, connection, request)
                if path is not None and report is not None:
                    drawn = read_reply(raws[i], self._asked(request))
                    _append(path, i, drawn)
                    report.advance(len(drawn))

        async with connection.client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(min(self.server.concurrency, len(waiting)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return raws

    async def _send(self, client: "AsyncOpenAI", connection: Connection, request: Mapping[str, Any]) -> bytes:
        """Send one request until its reply can be read.

        Raises:
            EngineError: the reply cannot be used, the server refuses, has ended, or does not answer in time.
        """
        server, began, attempts = self.server, time.monotonic(), 0
        body = {"model": self._model, **request}
        while True:
            attempts += 1
            left = began + server.deadline - time.monotonic()
            call = client.completions.with_streaming_response.create(
                model=self._model, prompt=request["prompt"], extra_body=body
            )
            reply = await receive(call, min(server.timeout, left), LARGEST_REPLY)
            wait = None
            if isinstance(reply, bytes):
                try:
                    read_reply(reply, self._asked(request))
                    return reply
                except Unfinished as why:
                    reason = str(why)
                except EngineError as error:
                    raise self._named(error) from None
            elif isinstance(reply, Failure):
                reason = reply.text
                if reason == "no reply in time":
                    reason = f"no reply within {PART}.timeout={server.timeout:g} s"
            elif reply.passes:
                reason, wait = connection.describe(reply), reply.wait
            else:
                raise EngineError(explain(server, connection, reply, self._model))
            if self._launched is not None:
                self._launched.check()
            rest = pause(attempts, wait)
            if time.monotonic() + rest >= began + server.deadline:
                raise EngineError(
                    f"{PART}.deadline={server.deadline:g}: given up after {attempts} attempt"
                    f"{'s' * (attempts != 1)} at a request to {self._where()}: {reason}. {KEPT}"
                )
            await asyncio.sleep(rest)

    def _named(self, error: EngineError) -> EngineError:
        return EngineError(f"{PART}: {self._where()}: {error}. {KEPT}")

    def _where(self) -> str:
        place = "the launched server" if self.server.launch is not None else f"the server at {self.server.base_url}"
        return f"{place} ({self._model})" if self._model else place

    def _warn_of_equal_samples(self, rows: Sequence[tuple[Prompt, int]], sampling: Sampling) -> None:
        """Warn if all samples of each prompt are equal, for example because a server uses one seed for a request."""
        by_prompt: dict[str, set[tuple[int, ...]]] = {}
        for (prompt, _), drawn in zip(rows, self._drawn, strict=True):
            by_prompt.setdefault(prompt.id, set()).add(tuple(drawn.tokens))
        counts = Counter(prompt.id for prompt, _ in rows)
        several = [id for id, count in counts.items() if count > 1]
        if sampling.temperature > 0 and len(several) > 1 and all(len(by_prompt[id]) == 1 for id in several):
            self.report.note(
                f"warning: all samples of each of {len(several):,} prompts are equal: {self._where()} may use one seed "
                "for all completions of a request (n)"
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
    """Add the reply to one request to a file, at once and in one write."""
    row = [number, [each.tokens for each in drawn], [[float(f"{x:.8g}") for x in each.logps] for each in drawn]]
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
