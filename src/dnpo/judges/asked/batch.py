"""Judging through a provider's batch API: everything at once, within a day, at a lower price.

A batch is remembered in the ledger from the moment the provider has it, and carries a hash of its questions there, so
that a run that was killed, or one that needs the same answers, finds it again and submits nothing twice.
"""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dnpo.errors import JudgeError
from dnpo.judges.asked.ledger import Answer, Ledger, Question
from dnpo.store import Report

if TYPE_CHECKING:
    from dnpo.judges.asked.openai import OpenAI

QUESTIONS, BYTES = 20_000, 100 << 20  # in one batch; OpenAI takes 50,000 and 200 MB
TROUBLES = 20  # looks in a row at an endpoint that does not answer
OVER = ("completed", "failed", "expired", "cancelled")


async def ask_in_batches(
    judge: "OpenAI", questions: Sequence[Question], ledger: Ledger, report: Report
) -> dict[str, str]:
    """Submit what nobody has submitted, wait for all of it, and give the reasons of failures by key.

    Raises:
        JudgeError: a batch failed as a whole, the endpoint has no batch API, or ``max_cost`` does not suffice.
    """
    round_ = _Round(judge, {q.key: q for q in questions}, ledger, report)
    async with judge.client() as client:
        try:
            return await round_.all(client)
        finally:
            ledger.release(round_.left)


class _Round:
    def __init__(self, judge: "OpenAI", questions: dict[str, Question], ledger: Ledger, report: Report) -> None:
        self.judge, self.questions, self.ledger, self.report = judge, questions, ledger, report
        self.left = set(questions)
        self.seen: set[str] = set()  # in a batch, whoever submitted it
        self.reasons: dict[str, str] = {}

    async def all(self, client: Any) -> dict[str, str]:
        import openai

        troubles = 0
        while True:
            try:
                await self._look(client)
                troubles = 0
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError) as error:
                troubles += 1
                if "insufficient_quota" in str(error) or troubles > TROUBLES:
                    raise JudgeError(self._said(error)) from None
                self.report.note(f"{type(error).__name__}; looking again in {self.judge.batch_poll:g} s")
            except openai.APIError as error:
                raise JudgeError(self._said(error)) from None
            if not self.left:
                return self.reasons
            await asyncio.sleep(self.judge.batch_poll)

    def _said(self, error: Exception) -> str:
        said = self.judge.clean(" ".join(str(error).split()))[:300]
        return (
            f"judge.batch=true: {self.judge.base_url} refuses ({said}). Every answer so far is kept; mend it, or ask "
            "one by one with judge.batch=false"
        )

    async def _look(self, client: Any) -> None:
        """Collect what is done; submit what no batch has."""
        endpoint = self.judge.base_url
        for batch, questions in self.ledger.batches(endpoint).items():
            keys = {q.key for q in questions}
            if self.left & keys:
                self.seen |= keys
                await self._collect(client, batch, {q.key: q for q in questions})
        self._settle(self.ledger.answers(sorted(self.left)), {})
        waiting = {q.key for questions in self.ledger.batches(endpoint).values() for q in questions}
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
        body = self.judge.body(self.questions[key])
        line = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"

    async def _submit(self, client: Any, keys: list[str]) -> None:
        judge = self.judge
        digest = hashlib.sha256("".join(keys).encode()).hexdigest()
        found = await self._submitted_before(client, digest)
        if found is None:
            cost = sum(judge.price(self.questions[key]) or 0.0 for key in keys)
            spent = self.ledger.spent() + self._committed()
            if judge.max_cost is not None and spent + cost > judge.max_cost:
                raise JudgeError(
                    f"judge.max_cost={judge.max_cost:g}: ${spent:.4f} is spent or on its way, and a batch of "
                    f"{len(keys):,} questions would cost about ${cost:.4f}; nothing of it is sent. Raise the limit"
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
            about = "" if judge.prices is None else f", about ${cost:.2f}"
            self.report.note(
                f"batch {found} submitted: {len(keys):,} questions{about}; it may take a day, and a rerun "
                "finds it again"
            )
        self.ledger.submitted(judge.base_url, found, [self.questions[key] for key in keys])

    def _committed(self) -> float:
        """US dollars that batches on their way will cost, about: those that have questions of this round."""
        waiting = [q.key for some in self.ledger.batches(self.judge.base_url).values() for q in some]
        return sum(self.judge.price(self.questions[key]) or 0.0 for key in waiting if key in self.questions)

    async def _submitted_before(self, client: Any, digest: str) -> str | None:
        """The batch with these very questions that a run submitted and was killed before it could say so."""
        async for batch in client.batches.list(limit=100):
            if self.ledger.was_collected(self.judge.base_url, str(batch.id)):
                continue  # what failed in it is asked again, in another
            if (batch.metadata or {}).get("dnpo") == digest[:64]:
                return None if batch.status in OVER[1:] else str(batch.id)
        return None

    async def _collect(self, client: Any, name: str, questions: dict[str, Question]) -> None:
        """Write down what a finished batch brought."""
        import openai

        try:
            batch = await client.batches.retrieve(name)
        except openai.NotFoundError:
            self.report.note(f"batch {name} is not known there any more; what it asked is asked again")
            self.ledger.collected(self.judge.base_url, name)
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
        self.ledger.collected(self.judge.base_url, name)
        self.report.status("" if self.judge.prices is None else f"${self.ledger.spent():,.2f}")
        if batch.status == "failed":
            errors = "; ".join(str(e.message) for e in (batch.errors.data or [])) if batch.errors else ""
            raise JudgeError(f"judge.batch=true: batch {name} failed: {self.judge.clean(errors)[:300]}")
        self._settle({}, {key: reason for key, reason in reasons.items() if reason})

    def _read(self, line: dict[str, Any], questions: dict[str, Question], reasons: dict[str, str]) -> None:
        """One line of a result file: an answer goes into the ledger, a failure among the reasons."""
        key = line.get("custom_id")
        if key not in reasons:
            return
        response = line.get("response") or {}
        if response.get("status_code") != 200:
            said = line.get("error") or (response.get("body") or {}).get("error") or {}
            text = self.judge.clean(str(said.get("message")))[:300]
            status = f"HTTP {response['status_code']}" if response.get("status_code") else str(said.get("code"))
            answer = Answer(None, reason=f"{status}: {text}")
        else:
            question = self.questions.get(key, questions[key])  # with messages, should the server count no tokens
            answer = self.judge.read(json.dumps(response["body"]).encode(), question)
        self.ledger.record(questions[key], answer)
        reasons[key] = answer.reason
