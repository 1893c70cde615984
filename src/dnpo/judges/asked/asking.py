"""Ask an endpoint a round of questions: many in parallel, each until it is answered or fails.

Workers take questions from a queue. A slot is held only while a question is in flight, so workers that wait between
attempts do not block others. They wait as long as the server asks, or twice as long after each attempt.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dnpo.connection import Failure, pause, receive
from dnpo.connection.refusals import Refusal
from dnpo.errors import JudgeError, SettingsError
from dnpo.judges import too_many
from dnpo.judges.asked.endpoint import Endpoint
from dnpo.judges.asked.ledger import Answer, Ledger, Question
from dnpo.judges.asked.prices import tokens_about
from dnpo.store import Report

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LARGEST_REPLY = 1 << 20  # bytes; a verdict has a few hundred
LATE = 10  # seconds; how long an interrupted round waits for replies
WORKERS = 16  # per slot
LOOK = 0.3  # seconds between checks of questions that other runs are asking
MENDABLE = {400, 404, 405, 415, 422, 500, 501}  # statuses with which servers refuse a parameter
FORBIDDEN = 5  # a round ends after this many refusals with status 403 or 404, if there was no answer


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits on asking, as in :class:`~dnpo.judges.asked.openai.OpenAI`.

    Attributes:
        reconnects: whether to try again where no connection can be made.
    """

    concurrency: int
    requests_per_minute: int | None
    tokens_per_minute: int | None
    timeout: float
    deadline: float
    max_replies: int
    max_cost: float | None
    max_unscored: float
    reconnects: bool = True


async def ask_one_by_one(
    endpoint: Endpoint,
    limits: Limits,
    questions: Sequence[Question],
    ledger: Ledger,
    report: Report | None,
    total: int,
) -> dict[str, str]:
    """Ask questions one by one, many in parallel, and return the reasons of failures by key.

    Args:
        questions: one or more different questions.
        ledger: stores answers as they arrive.
        report: advanced with every finished question; None: no display.
        total: number of all questions, including answered ones, for ``max_unscored``.

    Raises:
        SettingsError: a question has more tokens than ``tokens_per_minute``.
        JudgeError: the endpoint cannot be used at all, ``max_cost`` is reached, or too many questions have failed.
    """
    return await _Round(endpoint, limits, questions, ledger, report, total).ask_all()


class _Round:
    """A round of questions. Workers take questions from a queue, and share slots and budget."""

    def __init__(
        self,
        endpoint: Endpoint,
        limits: Limits,
        questions: Sequence[Question],
        ledger: Ledger,
        report: Report | None,
        total: int,
    ) -> None:
        self.endpoint, self.limits, self.ledger, self.report, self.total = endpoint, limits, ledger, report, total
        self.keys = [question.key for question in questions]
        self.row = deque(questions)
        self.elsewhere: deque[Question] = deque()  # another run is asking these now
        self.reasons: dict[str, str] = {}
        self.error: str | None = None
        self.stopped = asyncio.Event()
        self.slots = asyncio.Semaphore(limits.concurrency)
        self.spent, self.flying = ledger.sum_costs(), 0.0
        self.forbidden, self.has_answers = 0, total > len(questions)
        self.served, self.conceded = ledger.served(questions[0]), len(endpoint.concessions)
        self.largest = max(tokens_about(q) + endpoint.max_tokens for q in questions)
        if limits.tokens_per_minute is not None and self.largest >= limits.tokens_per_minute:
            raise SettingsError(
                f"judge.tokens_per_minute={limits.tokens_per_minute}: the longest question alone has about "
                f"{self.largest:,} tokens; raise it"
            )

    async def ask_all(self) -> dict[str, str]:
        """Ask until no question is left, and return the reasons of failures by key."""
        try:
            async with self.endpoint.client() as client:
                while self.row and self.error is None:
                    await self._empty_row(client)
                    while self.elsewhere and not self.row and self.error is None:
                        await self._sleep(LOOK)
                        self._look_elsewhere()
        finally:
            self.ledger.release(self.keys)
        if self.error is not None:
            raise JudgeError(self.error)
        return self.reasons

    async def _empty_row(self, client: "AsyncOpenAI") -> None:
        """Ask the questions in the queue."""
        # There are more workers than slots, so that the slots stay full while workers wait between attempts.
        count = min(WORKERS * self.limits.concurrency, len(self.row))
        workers = [asyncio.create_task(self._work(client)) for _ in range(count)]
        try:
            done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            if any(worker.exception() for worker in done):
                self.stopped.set()
        except asyncio.CancelledError:
            self.stopped.set()
            raise
        finally:
            # Interrupted, stopped or done: replies in flight are paid for, so wait a moment for them.
            _, late = await asyncio.wait(workers, timeout=LATE)
            for worker in late:
                worker.cancel()
        await asyncio.gather(*workers)

    def _look_elsewhere(self) -> None:
        """Collect the answers of other runs, and take over the questions that they gave up."""
        of = {question.key: question for question in self.elsewhere}
        mine, answered, others = self.ledger.claim(list(of))
        self.row.extend(of[key] for key in mine)
        self.elsewhere = deque(of[key] for key in others)
        for key in answered:
            self.ledger.hit(of[key], 1)
            self._advance()

    def _stop(self, error: str) -> None:
        self.error = self.error or error
        self.stopped.set()

    async def _sleep(self, seconds: float) -> None:
        """Sleep; return at once when there is nothing more to wait for."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), seconds)

    async def _work(self, client: "AsyncOpenAI") -> None:
        while self.row and not self.stopped.is_set():
            question = self.row.popleft()
            mine, answered, _ = self.ledger.claim([question.key])
            if answered:
                self.ledger.hit(question, 1)
                self._advance()
            elif not mine:
                self.elsewhere.append(question)
            else:
                await self._call(client, question)

    async def _call(self, client: "AsyncOpenAI", question: Question) -> None:
        """Send one question until it is answered or must be given up."""
        limits, attempts, replies, began = self.limits, 0, 0, 0.0
        reasons: dict[str, None] = {}  # in order, each once; all are kept, since the last may be only a lack of time
        while True:
            async with self.slots:
                await self._turn(question)
                if self.stopped.is_set():
                    return
                began = began or time.monotonic()
                attempts += 1
                outcome = await self._attempt(client, question, began + limits.deadline - time.monotonic())
            if isinstance(outcome, Answer):
                replies += 1
                self.spent += outcome.cost or 0.0
                answer = replace(outcome, attempts=attempts)
                if answer.value is not None:
                    self.ledger.record(question, answer)
                    self._see(answer)
                    self._advance()
                    return
                # a reply without counted tokens is not a completion: the server may need a moment
                reason, wait = answer.reason, 0.0 if answer.tokens_in else pause(replies)
                if replies >= limits.max_replies:
                    self._give_up(
                        question, replace(answer, reason=f"{reason} ({replies} repl{'y' if replies == 1 else 'ies'})")
                    )
                    return
                self.ledger.note_cost(question, answer)
            elif outcome.stop:
                self._stop(outcome.text)
                return
            elif not outcome.again:
                self._give_up(question, Answer(None, attempts=attempts, reason=outcome.text))
                return
            else:
                reason, wait = outcome.text, pause(attempts, outcome.wait)
                if outcome.billed:
                    lost = Answer(
                        None, cost=self.endpoint.price(question), reason=f"{outcome.text}; it may have been billed"
                    )
                    self.spent += lost.cost or 0.0
                    self.ledger.note_cost(question, lost)
            reasons[reason] = None
            if time.monotonic() + wait >= began + limits.deadline:
                all_reasons = ", then ".join(list(reasons)[-3:])
                late = f"given up after judge.deadline={limits.deadline:g} s, at attempt {attempts}: {all_reasons}"
                self._give_up(question, Answer(None, attempts=attempts, reason=late))
                return
            await self._sleep(wait)

    async def _turn(self, question: Question) -> None:
        """Wait until the limits on rates allow sending, and check the budget."""
        endpoint, limits = self.endpoint, self.limits
        if limits.requests_per_minute is not None or limits.tokens_per_minute is not None:
            request = 60.0 / limits.requests_per_minute if limits.requests_per_minute else 0.0
            size = tokens_about(question) + endpoint.max_tokens
            # minus the largest question, so that the last question of a minute is within the limit
            tokens = 60.0 * size / (limits.tokens_per_minute - self.largest) if limits.tokens_per_minute else 0.0
            await self._sleep(self.ledger.slot(f"{endpoint.base_url} {endpoint.model}", request, tokens))
        if limits.max_cost is None:
            return
        self.spent = self.ledger.sum_costs()  # other jobs of a sweep spend too
        if self.spent + self.flying + (endpoint.price(question) or 0.0) > limits.max_cost:
            self._stop(
                f"judge.max_cost={limits.max_cost:g}: ${self.spent:.4f} is spent, and another question could pass the "
                f"limit; about {len(self.row) + 1:,} are left. Every answer is kept: run the same command again (it "
                "may then spend as much again), and only the rest is asked"
            )

    async def _attempt(self, client: "AsyncOpenAI", question: Question, left: float) -> "Answer | _Trouble":
        """Send a question once, and wait at most ``left`` seconds."""
        endpoint, started = self.endpoint, time.monotonic()
        body, expected = endpoint.body(question), endpoint.price(question) or 0.0
        # the whole body is an extra body, since servers accept more parameters than the client
        request = client.chat.completions.with_streaming_response.create(
            model=endpoint.model, messages=body["messages"], extra_body=body
        )
        self.flying += expected
        try:
            reply = await receive(request, min(self.limits.timeout, left), LARGEST_REPLY)
        finally:
            self.flying -= expected
        if isinstance(reply, Refusal):
            return self._judge_refusal(reply, body)
        if isinstance(reply, Failure):
            again = self.limits.reconnects or not reply.unreachable
            return _Trouble(reply.text, again=again, billed=reply.billed)
        return replace(endpoint.read(reply, question), latency=time.monotonic() - started)

    def _judge_refusal(self, refusal: Refusal, body: Mapping[str, object]) -> "_Trouble":
        endpoint, status = self.endpoint, refusal.status
        text = endpoint.describe(refusal)
        where = f"{endpoint.model} at {endpoint.base_url}"
        if refusal.is_about_money:
            return _Trouble(
                f"judge: the account behind {endpoint.key_from} has no credit left ({text}). Every answer so far is "
                "kept: run the same command when it has some",
                stop=True,
            )
        if status in MENDABLE and endpoint.give_way(refusal.words, body):
            self._say_concessions()
            return _Trouble(text, again=True, wait=0.0)
        if status in (401, 403, 404) and self._is_hopeless(status):
            if status == 404:
                return _Trouble(f"judge: {where}: not found ({text}); check judge.model and judge.base_url", stop=True)
            return _Trouble(
                f"judge: {where} does not accept the key in {endpoint.key_from} ({text}); set that environment "
                "variable, or name another in judge.key_from. Every answer so far is kept",
                stop=True,
            )
        if refusal.passes:
            return _Trouble(text, again=True, wait=refusal.wait)
        return _Trouble(text)

    def _is_hopeless(self, status: int) -> bool:
        """Whether a refusal concerns all questions: always with status 401, else after several and no answer."""
        if status == 401:
            return True
        self.forbidden += 1
        answered = self.has_answers or self.endpoint.has_answered
        return not answered and self.forbidden >= min(FORBIDDEN, self.total)

    def _say_concessions(self) -> None:
        for concession in self.endpoint.concessions[self.conceded :]:
            self._note(f"the judge at {self.endpoint.base_url} refuses a parameter, so dnpo {concession}")
        self.conceded = len(self.endpoint.concessions)

    def _see(self, answer: Answer) -> None:
        """Warn if the server reports a model that it has not reported before."""
        if answer.served and answer.served not in self.served:
            if self.served:
                self._note(f"warning: {tell_swap(self.endpoint, self.served[-1], answer.served)}")
            self.served.append(answer.served)

    def _note(self, text: str) -> None:
        if self.report is not None:
            self.report.note(text)

    def _advance(self) -> None:
        if self.report is not None:
            self.report.advance()
            if self.endpoint.tariff is not None:
                self.report.status(f"${self.spent:,.2f}")

    def _give_up(self, question: Question, answer: Answer) -> None:
        self.ledger.record(question, answer)
        self.reasons[question.key] = answer.reason
        self._advance()
        limit = self.limits.max_unscored
        if self.total > 1 and len(self.reasons) > limit * self.total:
            self._stop(too_many(len(self.reasons), self.total, limit, list(self.reasons.values()), "questions"))


@dataclass(frozen=True)
class _Trouble:
    """The reason why an attempt failed, and what to do next.

    Attributes:
        again: whether to try this question again.
        stop: whether to give up the whole round.
        wait: seconds that the server asks to wait.
        billed: whether the provider may bill it: the question was sent and may have been answered.
    """

    text: str
    again: bool = False
    stop: bool = False
    wait: float | None = None
    billed: bool = False


def tell_swap(endpoint: Endpoint, before: str, now: str) -> str:
    """The warning that a server reports another model than before."""
    return (
        f"the judge {endpoint.model} at {endpoint.base_url} calls itself {now!r} in its replies, and called itself "
        f"{before!r} before; if the weights there were swapped, judge.version=… keeps their answers apart"
    )
