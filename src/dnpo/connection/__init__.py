"""Connect to an OpenAI-compatible server: addresses, keys, the client, and a single request.

Judges and engines share this code. Keys come from the environment and are used in requests only.
"""

import asyncio
import os
import random
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dnpo.connection.refusals import Refusal, find_refusal, read_refusal
from dnpo.errors import SettingsError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LONGEST_KEPT = 2000  # characters of a server's text
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between attempts


class Connection:
    """One address, with the environment variables that hold its keys.

    Args:
        base_url: the address, including ``/v1``.
        key_from: environment variable with the key.
        headers: further headers, each with the environment variable that holds its value.
        timeout: seconds of one attempt.
    """

    def __init__(self, base_url: str, key_from: str, *, headers: Mapping[str, str], timeout: float) -> None:
        self.base_url, self.key_from, self.headers, self.timeout = base_url, key_from, headers, timeout

    def client(self) -> "AsyncOpenAI":
        """A client for one event loop, without automatic retries."""
        from openai import AsyncOpenAI

        key = os.environ.get(self.key_from) or "none"
        headers = {name: os.environ.get(variable, "") for name, variable in self.headers.items()}
        return AsyncOpenAI(
            api_key=key, base_url=self.base_url, max_retries=0, timeout=self.timeout, default_headers=headers
        )

    def clean(self, text: str) -> str:
        """A server's text without the keys, which servers may repeat in errors; a long text loses its middle."""
        for variable in (self.key_from, *self.headers.values()):
            key = os.environ.get(variable, "")
            text = text.replace(key, "[key]") if len(key) > 3 else text
        half = LONGEST_KEPT // 2
        return text if len(text) <= LONGEST_KEPT else f"{text[:half]} … {text[-half:]}"

    def describe(self, refusal: Refusal) -> str:
        """A refusal in one line."""
        text = self.clean(refusal.text)[:300] or self.clean(refusal.codes)[:100] or "no text"
        return f"HTTP {refusal.status}: {text}"


@dataclass(frozen=True)
class Failure:
    """An attempt that got no reply at all.

    Attributes:
        text: what happened.
        billed: whether the request was sent and may have been answered.
        late: whether time ran out.
        unreachable: whether no connection was made at all.
    """

    text: str
    billed: bool = False
    late: bool = False
    unreachable: bool = False


async def receive(stream: AbstractAsyncContextManager[Any], seconds: float, largest: int) -> bytes | Refusal | Failure:
    """Send a request once and read the whole reply. With status 200, an error in the body counts as a refusal.

    Args:
        stream: a request of the client, ``with_streaming_response``.
        seconds: how long to wait for the last byte.
        largest: maximum number of bytes of a reply.
    """
    import httpx2
    import openai

    try:
        async with asyncio.timeout(seconds):
            async with stream as response:
                raw = bytearray()
                async for piece in response.iter_bytes():
                    raw += piece
                    if len(raw) > largest:
                        return Failure("a reply that does not end", billed=True)
        may_refuse = b'"choices"' not in raw or b'"error"' in raw or b'"base_resp"' in raw
        hidden = find_refusal(bytes(raw), response.headers) if may_refuse else None
        return hidden if hidden is not None and hidden.status else bytes(raw)
    except (TimeoutError, openai.APITimeoutError):
        return Failure("no reply in time", billed=True, late=True)
    except openai.APIStatusError as error:
        reply = error.response
        return read_refusal(error.status_code, reply.headers, reply.content)
    except (openai.APIConnectionError, httpx2.TransportError, httpx2.DecodingError, OSError) as error:
        cause = error.__cause__ or error
        return Failure(
            f"the connection failed ({type(cause).__name__})", unreachable=isinstance(cause, httpx2.ConnectError)
        )


def pause(attempts: int, wait: float | None = None) -> float:
    """Seconds to wait before the next attempt, randomised, so that retries after simultaneous failures spread out.

    Args:
        attempts: number of attempts so far; the pause doubles after each.
        wait: seconds that the server asks to wait, which then replace the doubled pause.
    """
    doubled = min(FIRST_PAUSE * 2.0 ** min(attempts - 1, 10), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
    return doubled if wait is None else wait + random.uniform(0.0, min(doubled, 1.0))


def check_address(name: str, url: str, part: str, example: str) -> None:
    """Refuse an address that is invalid or contains a secret.

    Args:
        name: the setting within its part.
        part: dotted name of the part, for the advice.
        example: an address.

    Raises:
        SettingsError: names the setting, and shows no secret.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise SettingsError(
            f"{name}: has a user name, password or query in it ({parts.scheme}://…@{parts.hostname}); settings are "
            "saved in a run's files, so give the address alone, and the key in an environment variable "
            f"({part}.key_from, {part}.headers)"
        )
    try:
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is not a number
        sound = False
    if not sound:
        raise SettingsError(f"{name}={url}: expected an address such as {example}")


def find_bad_key(part: str, option: str, key_from: str, headers: Mapping[str, str]) -> str | None:
    """What is wrong with the keys in the environment; None if they can be sent. The main key may be absent.

    Args:
        part: dotted name of the part, such as ``judge``.
        option: how the part was chosen, such as ``judge=openai``.
    """
    for setting, variable in {"": key_from, **headers}.items():
        held = os.environ.get(variable, "")
        if setting and not held:
            return (
                f"{part}.headers.{setting}: its value is not the name of an environment variable; export the header's "
                "value in a variable, and give the variable's name"
            )
        if not held.isascii() or not held.isprintable() or (" " in held and not setting):
            return (
                f"{option}: the value of environment variable {variable} is not a {'header' if setting else 'key'} "
                "(it has blanks, line ends or letters beyond ASCII); export the value alone"
            )
    return None


def address_of(url: str) -> str:
    """An address in one spelling: without a slash at the end, and without the default port of its scheme."""
    parts = urlsplit(url)
    port = "" if parts.port in (None, {"http": 80, "https": 443}.get(parts.scheme)) else f":{parts.port}"
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"
