"""Send requests to a server, many at once, each until its reply can be read."""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dnpo.connection import Connection, Failure, pause, receive
from dnpo.errors import EngineError
from dnpo.generate.server import PART, Server
from dnpo.generate.server.contact import KEPT, LARGEST_REPLY, explain
from dnpo.generate.server.launching import Launched
from dnpo.generate.server.reading import Asked, Reply, Unfinished, read_reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Request = Mapping[str, Any]  # the body, without the model's name


@dataclass(frozen=True)
class Asker:
    """A server that has been found.

    Attributes:
        server: the settings.
        connection: its address and keys.
        launched: the server, if the stage has started it.
        model: its model's name.
        stops: tokens that end a completion.
        vocabulary: size of the policy's vocabulary.
    """

    server: Server
    connection: Connection
    launched: Launched | None
    model: str
    stops: Collection[int]
    vocabulary: int

    def ask(self, requests: Mapping[int, Request], note: Callable[[int, Reply], None]) -> dict[int, Reply]:
        """Send requests until all are answered.

        Args:
            requests: the requests by number.
            note: called with every reply when it arrives.

        Raises:
            EngineError: a reply cannot be used, the server refuses, has ended, or does not answer in time.
        """
        return asyncio.run(self._ask(requests, note))

    async def _ask(self, requests: Mapping[int, Request], note: Callable[[int, Reply], None]) -> dict[int, Reply]:
        waiting, replies = list(requests.items())[::-1], dict[int, Reply]()

        async def work(client: "AsyncOpenAI") -> None:
            while waiting:
                i, request = waiting.pop()
                replies[i] = await self._send(client, request)
                note(i, replies[i])

        async with self.connection.client() as client:
            workers = [asyncio.create_task(work(client)) for _ in range(min(self.server.concurrency, len(waiting)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return replies

    async def _send(self, client: "AsyncOpenAI", request: Request) -> Reply:
        server, began, attempts = self.server, time.monotonic(), 0
        while True:
            attempts += 1
            left = began + server.deadline - time.monotonic()
            found = await self._attempt(client, request, min(server.timeout, left))
            if isinstance(found, Reply):
                return found
            if self.launched is not None:
                self.launched.check()
            rest = pause(attempts, found.wait)
            if time.monotonic() + rest >= began + server.deadline:
                times = f"{attempts} attempt{'s' * (attempts != 1)}"
                raise EngineError(
                    f"{PART}.deadline={server.deadline:g}: given up after {times} at a request to {self.name}: "
                    f"{found.reason}. {KEPT}"
                )
            await asyncio.sleep(rest)

    async def _attempt(self, client: "AsyncOpenAI", request: Request, seconds: float) -> "Reply | _Trouble":
        # everything is passed as extra_body, since servers accept parameters that the client does not know
        body = {"model": self.model, **request}
        call = client.completions.with_streaming_response.create(
            model=self.model, prompt=request["prompt"], extra_body=body
        )
        reply = await receive(call, seconds, LARGEST_REPLY)
        if isinstance(reply, Failure):
            late = f"no reply within {PART}.timeout={self.server.timeout:g} s"
            return _Trouble(late if reply.late else reply.text)
        if not isinstance(reply, bytes):
            if reply.passes:
                return _Trouble(self.connection.describe(reply), reply.wait)
            raise EngineError(explain(self.server, self.connection, reply, self.model))
        asked = Asked(request["prompt"], request["n"], request["max_tokens"], self.stops, self.vocabulary, self.model)
        try:
            return read_reply(reply, asked)
        except Unfinished as why:
            return _Trouble(str(why))
        except EngineError as error:
            raise EngineError(f"{PART}: {self.name}: {error}. {KEPT}") from None

    @property
    def name(self) -> str:
        """The server, for messages."""
        place = "the launched server" if self.launched is not None else f"the server at {self.connection.base_url}"
        return f"{place} ({self.model})"


@dataclass(frozen=True)
class _Trouble:
    """The reason to repeat an attempt, and the seconds that the server asks to wait."""

    reason: str
    wait: float | None = None
