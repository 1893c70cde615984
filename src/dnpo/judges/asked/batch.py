"""Judge by a provider's batch API: all questions at once, within a day, at a lower price.

The ledger records a batch as soon as the provider has it, with a hash of its questions. So the batch is found again
after a kill, or by another run that needs the same answers, and nothing is submitted twice.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dnpo.connection.refusals import Refusal, read_refusal
from dnpo.errors import JudgeError
from dnpo.judges.asked.endpoint import Endpoint
from dnpo.judges.asked.ledger import Answer, Ledger, Question
from dnpo.store import Report
from dnpo.wording import plural

if TYPE_CHECKING:
    from openai import AsyncOpenAI

QUESTIONS, BYTES = 20_000, 100 << 20  # in one batch; OpenAI takes 50,000 and 200 MB
TROUBLES = 20  # consecutive checks of an endpoint that does not answer
OVER = ("completed", "failed", "expired", "cancelled")


async def ask_in_batches(
    endpoint: Endpoint,
    questions: Sequence[Question],
    ledger: Ledger,
    report: Report,
    *,
    seconds: float,
    max_cost: float | None,
) -> dict[str, str]:
    """Submit the questions that no run has submitted, wait for all batches, and return the failures' reasons by key.

    Args:
        questions: different questions without an answer.
        ledger: stores batches and answers.
        report: advanced with every finished question.
        seconds: time between checks of the batches.
        max_cost: US dollars that the run may spend; None for no limit.

    Raises:
        JudgeError: a batch failed as a whole, the endpoint has no batch API, or ``max_cost`` does not suffice.
    """
    round_ = _Batches(endpoint, {q.key: q for q in questions}, ledger, report, max_cost)
    async with endpoint.client() as client:
        try:
            return await round_.ask_all(client, seconds)
        finally:
            ledger.release(round_.left)


class _Batches:
    def __init__(
        self,
        endpoint: Endpoint,
        questions: dict[str, Question],
        ledger: Ledger,
        report: Report,
        max_cost: float | None,
    ) -> None:
        self.endpoint, self.questions, self.ledger, self.report = endpoint, questions, ledger, report
        self.max_cost = max_cost
        self.left = set(questions)
        self.seen: set[str] = set()  # questions in a batch of this or another run
        self.reasons: dict[str, str] = {}

    async def ask_all(self, client: "AsyncOpenAI", seconds: float) -> dict[str, str]:
        import openai

        troubles = 0
        while True:
            try:
                await self._look(client)
                troubles = 0
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                troubles += 1
                if _is_about_money(error) or troubles > TROUBLES:
                    raise JudgeError(self._explain(error)) from None
                self.report.note(f"{type(error).__name__}; looking again in {seconds:g} s")
            except openai.APIError as error:
                raise JudgeError(self._explain(error)) from None
            if not self.left:
                return self.reasons
            await asyncio.sleep(seconds)

    def _explain(self, error: Exception) -> str:
        refusal = _refusal_of(error)
        message = self.endpoint.clean(refusal.text if refusal else "")[:300] or self.endpoint.clean(str(error))[:300]
        return (
            f"judge.batch=true: {self.endpoint.base_url} refuses ({message}). Every answer so far is kept. Correct "
            "this, or ask one by one with judge.batch=false"
        )

    async def _look(self, client: "AsyncOpenAI") -> None:
        """Collect finished batches; submit questions that are in no batch."""
        address = self.endpoint.base_url
        for batch, questions in self.ledger.batches(address).items():
            keys = {q.key for q in questions}
            if self.left & keys:
                self.seen |= keys
                await self._collect(client, batch, {q.key: q for q in questions})
        self._settle(self.ledger.answers(sorted(self.left)), {})
        waiting = {q.key for questions in self.ledger.batches(address).values() for q in questions}
        self._settle({}, dict.fromkeys(self.left & self.seen - waiting, "it failed in a batch of another run"))
        mine, _, _ = self.ledger.claim(sorted(self.left - waiting))
        for some in self._portions(mine):
            await self._submit(client, some)
        self.ledger.release(mine)

    def _settle(self, values: dict[str, float], reasons: dict[str, str]) -> None:
        done = self.left & (set(values) | set(reasons))
        self.reasons |= {key: reasons[key] for key in done if key in reasons}
        self.left -= done
        self.report.advance(len(done))

    def _portions(self, keys: Sequence[str]) -> Iterator[list[str]]:
        some: list[str] = []
        size = 0
        for key in keys:
            length = len(self._line(key))
            if some and (len(some) == QUESTIONS or size + length > BYTES):
                yield some
                some, size = [], 0
            some.append(key)
            size += length
        if some:
            yield some

    def _line(self, key: str) -> bytes:
        body = self.endpoint.body(self.questions[key])
        line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"

    async def _submit(self, client: "AsyncOpenAI", keys: list[str]) -> None:
        digest = hashlib.sha256("".join(keys).encode()).hexdigest()
        found = await self._find_submitted(client, digest)
        if found is None:
            cost = sum(map(self._price, keys))
            spent = self.ledger.sum_costs() + self._sum_waiting()
            if self.max_cost is not None and spent + cost > self.max_cost:
                raise JudgeError(
                    f"judge.max_cost={self.max_cost:g}: ${spent:.4f} is spent or on its way, and a batch of "
                    f"{plural(len(keys), 'question')} would cost about ${cost:.4f}; it is not sent. "
                    "Raise the limit"
                )
            upload = ("questions.jsonl", b"".join(map(self._line, keys)))
            file = await client.files.create(file=upload, purpose="batch")
            made = await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"dnpo": digest[:64]},
            )
            found = made.id
            about = "" if self.endpoint.tariff is None else f", about ${cost:.2f}"
            self.report.note(
                f"batch {found} submitted: {plural(len(keys), 'question')}{about}; it may take a day, and a rerun "
                "finds it again"
            )
        self.ledger.remember_batch(self.endpoint.base_url, found, [self.questions[key] for key in keys])

    def _price(self, key: str) -> float:
        return self.endpoint.price(self.questions[key], batch=True) or 0.0

    def _sum_waiting(self) -> float:
        """The estimated cost in US dollars of unfinished batches, for questions of this round."""
        waiting = [q.key for some in self.ledger.batches(self.endpoint.base_url).values() for q in some]
        return sum(self._price(key) for key in waiting if key in self.questions)

    async def _find_submitted(self, client: "AsyncOpenAI", digest: str) -> str | None:
        """Find the batch with these questions that a run submitted before it was killed, if there is one."""
        async for batch in client.batches.list(limit=100):
            if self.ledger.was_collected(self.endpoint.base_url, str(batch.id)):
                continue  # its failed questions are asked again, in another batch
            if (batch.metadata or {}).get("dnpo") == digest[:64]:
                return None if batch.status in OVER[1:] else str(batch.id)
        return None

    async def _collect(self, client: "AsyncOpenAI", name: str, questions: dict[str, Question]) -> None:
        """Record the results of a finished batch in the ledger."""
        import openai

        try:
            batch = await client.batches.retrieve(name)
        except openai.NotFoundError:
            self.report.note(f"batch {name} is no longer known there; its questions are asked again")
            self.ledger.forget_batch(self.endpoint.base_url, name)
            self.seen -= set(questions)
            return
        if batch.status not in OVER:
            counts = batch.request_counts
            if counts is not None:
                self.report.status(f"batch {batch.status}: {counts.completed + counts.failed:,}/{counts.total:,}")
            return
        reasons = dict.fromkeys(questions, f"not among the results of the batch, which is {batch.status}")
        for file in (batch.output_file_id, batch.error_file_id):
            if file is None:
                continue
            content = (await client.files.content(file)).content
            for line in content.splitlines():
                try:
                    self._read(json.loads(line), questions, reasons)
                except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
                    self.report.note(f"batch {name}: a broken line in {file}")
        self.ledger.forget_batch(self.endpoint.base_url, name)
        self.report.status("" if self.endpoint.tariff is None else f"${self.ledger.sum_costs():,.2f}")
        if batch.status == "failed":
            errors = "; ".join(str(e.message) for e in (batch.errors.data or [])) if batch.errors else ""
            raise JudgeError(f"judge.batch=true: batch {name} failed: {self.endpoint.clean(errors)[:300]}")
        self._settle({}, {key: reason for key, reason in reasons.items() if reason})

    def _read(self, line: dict[str, Any], questions: dict[str, Question], reasons: dict[str, str]) -> None:
        """Read one line of a result file: record an answer in the ledger, or a failure in the reasons."""
        key = line.get("custom_id")
        if key not in reasons:
            return
        response = line.get("response") or {}
        if response.get("status_code") != 200:
            error = line.get("error") or response.get("body") or {}
            refusal = read_refusal(int(response.get("status_code") or 0), {}, json.dumps(error).encode())
            text = self.endpoint.clean(refusal.text)[:300]
            status = f"HTTP {refusal.status}" if refusal.status else refusal.codes
            answer = Answer(None, reason=f"{status}: {text}")
        else:
            question = self.questions.get(key, questions[key])  # with messages, in case the server counts no tokens
            answer = self.endpoint.read(json.dumps(response["body"]).encode(), question, batch=True)
        self.ledger.record(questions[key], answer)
        reasons[key] = answer.reason


def _refusal_of(error: Exception) -> Refusal | None:
    """The server's refusal within an error of the client; None if there is no reply."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        return None
    return read_refusal(error.status_code, error.response.headers, error.response.content)


def _is_about_money(error: Exception) -> bool:
    refusal = _refusal_of(error)
    return refusal is not None and refusal.is_about_money
