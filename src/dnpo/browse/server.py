"""Serve the page to a browser on this machine. Everything is read-only."""

import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import uvicorn
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dnpo import palette
from dnpo.browse.held import Held, HeldQuery
from dnpo.browse.pairs import AllPairs, PairsQuery
from dnpo.browse.runs import Run, digest
from dnpo.browse.texts import visible
from dnpo.errors import DataError, DnpoError, SettingsError

HERE = Path(__file__).parent
LOOPBACK = "127.0.0.1"
HOSTS = [LOOPBACK, "localhost"]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Query = TypeVar("Query", bound=BaseModel)
ASIDE = ("view", "runs", "row")  # parameters of a link that do not belong to a query for rows


def make_app(runs: Sequence[Run]) -> Starlette:
    """Make the application that shows these runs.

    Only requests that name the loopback address as their host are answered. So a page elsewhere cannot read the rows,
    even if its own name is made to resolve to this machine.

    Raises:
        DnpoError: the held-out rows cannot be read.
    """
    held, pairs = Held(runs), AllPairs(runs)
    page, style = _render(runs, held, pairs), palette.write_css() + (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")

    def rows(request: Request) -> Response:
        given = {name: value for name, value in request.query_params.items() if name not in ASIDE}
        if _shows_pairs(request):
            return JSONResponse(pairs.show_page(_parse(PairsQuery, given)))
        return JSONResponse(held.show_page(_parse(HeldQuery, given)))

    def row(request: Request) -> Response:
        number = request.query_params.get("row", "")
        if not number.isdecimal():
            raise DataError(f"row={number}: expected a number")
        shown = pairs.of(request.query_params.get("of", "")) if _shows_pairs(request) else held
        return JSONResponse(shown.show_row(int(number)))

    routes = [
        Route("/", partial(_answer, HTMLResponse(page)), methods=["GET"]),
        Route("/page.css", partial(_answer, Response(style, media_type="text/css")), methods=["GET"]),
        Route("/page.js", partial(_answer, Response(script, media_type="text/javascript")), methods=["GET"]),
        Route("/rows", rows, methods=["GET"]),
        Route("/row", row, methods=["GET"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Headers), Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)],
        exception_handlers={DnpoError: _refuse, HTTPException: _refuse},
    )
    return app


class _Headers:
    """Adds ``HEADERS`` to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _answer(response: Response, request: Request) -> Response:
    return response


def _shows_pairs(request: Request) -> bool:
    view = request.query_params.get("view", "held")
    if view not in ("held", "pairs"):
        raise DataError(f"view={view}: expected held or pairs")
    return view == "pairs"


def _parse(kind: type[Query], given: Mapping[str, str]) -> Query:
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise DataError(f"{name}={first['input']}: {_expected(kind, name)}") from error


def _expected(kind: type[BaseModel], name: str) -> str:
    """Say what is allowed for a part of an address."""
    field = kind.model_fields.get(name)
    if field is None:
        return f"there is no such part of an address; the parts are {', '.join(kind.model_fields)}"
    if get_origin(field.annotation) is Literal:
        return f"expected {', '.join(filter(None, get_args(field.annotation)))}"
    return "expected a whole number from 1 on"


def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return PlainTextResponse(error.detail, error.status_code)
    return PlainTextResponse(visible(str(error)), 400)


def _render(runs: Sequence[Run], held: Held, pairs: AllPairs) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    first, second = held.usual
    return environment.get_template("page.html.j2").render(
        names=[run.name for run in runs],
        digest=digest(runs),
        judges=len({run.scored_by() for run in runs}),
        policies=[(policy.key, held.title(policy)) for policy in held.policies],
        usual=(first.key, second.key),
        sources=[
            (
                key,
                f"{runs[each.run].name} · iteration {each.iteration}"
                if len(runs) > 1
                else f"iteration {each.iteration}",
            )
            for key, each in pairs.sources.items()
        ],
    )


def listen(port: int) -> socket.socket:
    """Open a socket on the loopback.

    Args:
        port: 0 for any that is free.

    Raises:
        SettingsError: the port cannot be used.
    """
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((LOOPBACK, port))
    except (OSError, OverflowError) as error:
        opened.close()
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"port={port}: {why}; port=0 takes one that is free") from error
    return opened


def make_server(app: Starlette) -> uvicorn.Server:
    """Make the server that answers a browser."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="off")
    return uvicorn.Server(config)


def serve(app: Starlette, opened: socket.socket) -> None:
    """Answer requests until the process is interrupted."""
    with suppress(KeyboardInterrupt):
        make_server(app).run(sockets=[opened])
