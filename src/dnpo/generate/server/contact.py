"""Find a server's model, and advise on its refusals."""

import asyncio
import json
import time
from collections.abc import Sequence

from dnpo.connection import Connection, receive
from dnpo.connection.refusals import Refusal
from dnpo.errors import EngineError
from dnpo.generate.server import PART, Server
from dnpo.generate.server.launching import Launched

LARGEST_REPLY = 1 << 28  # bytes
LOOK = 0.2  # seconds between checks of a server that starts
QUIET = 10.0  # seconds that one such check may take
KEPT = "Received replies are kept: the same command asks only for the rest"


def find_model(server: Server, connection: Connection, launched: Launched | None = None) -> str:
    """Wait until a server answers, and return the name of its model.

    Args:
        server: the settings.
        connection: the server's address and keys.
        launched: the server, if it was started just now; any other server must answer at once.

    Raises:
        EngineError: the server does not answer, lacks the model, or has several and none is named.
    """
    names = asyncio.run(_wait_for_names(server, connection, launched))
    listed = ", ".join(names) or "none"
    if server.model is not None:
        if server.model not in names:
            raise EngineError(f"{PART}.model={server.model}: the server has no such model, but {listed}")
        return server.model
    if len(names) != 1:
        raise EngineError(f"{PART}.model: the server has {len(names)} models ({listed}); give the name of one")
    return names[0]


async def _wait_for_names(server: Server, connection: Connection, launched: Launched | None) -> Sequence[str]:
    until = time.monotonic() + server.start_timeout
    async with connection.client() as client:
        while True:
            if launched is not None:
                launched.check()
            reply = await receive(client.models.with_streaming_response.list(), QUIET, LARGEST_REPLY)
            if isinstance(reply, bytes):
                return _read_names(reply)
            if isinstance(reply, Refusal) and not reply.passes:
                raise EngineError(explain(server, connection, reply))
            reason = connection.describe(reply) if isinstance(reply, Refusal) else reply.text
            if launched is None:
                raise EngineError(f"{PART}.base_url={connection.base_url}: no server answers there ({reason})")
            if time.monotonic() > until:
                raise EngineError(
                    f"{PART}.start_timeout={server.start_timeout:g}: the launched server does not answer ({reason})."
                    f"{launched.tail()}"
                )
            await asyncio.sleep(LOOK)


def _read_names(raw: bytes) -> list[str]:
    try:
        return [str(model["id"]) for model in json.loads(raw)["data"]]
    except (ValueError, LookupError, TypeError):
        raise EngineError(f"{PART}: the server's list of models cannot be read; expected /v1/models") from None


def explain(server: Server, connection: Connection, refusal: Refusal, model: str = "the server") -> str:
    """Explain a refusal that is not temporary, and what to do about it."""
    where, text = f"{model} at {connection.base_url}", connection.describe(refusal)
    if refusal.status in (401, 403):
        return (
            f"{PART}: {where} does not accept the key in {server.key_from} ({text}); set that environment variable, or "
            f"name another in {PART}.key_from. {KEPT}"
        )
    if refusal.status == 404:
        return f"{PART}: {where}: not found ({text}); check {PART}.base_url and {PART}.model. {KEPT}"
    return (
        f"{PART}: {where} refuses a request ({text}); if it finds a prompt too long or a token unknown, it has a "
        f"smaller context (vLLM: --max-model-len) or another tokenizer than the policy. {KEPT}"
    )
