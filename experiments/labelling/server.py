"""The page and its five addresses. Nothing in them is a path, and the page asks nobody else for anything."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import URL
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from experiments.labelling.choices import checked_name
from experiments.labelling.pairs import MEDIA_TYPES
from experiments.labelling.session import Session
from lightning_modules.errors import ConfigError, DataError, UserError

PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    # Only what this server sends is loaded, and no other page may frame it.
    "content-security-policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
Handler = Callable[[Request], Awaitable[Response]]


def application(session: Session, token: str | None) -> Starlette:
    """The web application.

    Args:
        session: answers everything.
        token: whoever asks has to know it; None for a server that only this machine reaches.
    """

    def state(request: Request) -> Response:
        return JSONResponse(session.state(checked_name(request.query_params.get("annotator"))))

    async def choose(request: Request) -> Response:
        annotator, key, answer = await _texts(request, "annotator", "pair", "answer")
        return JSONResponse(await run_in_threadpool(session.choose, checked_name(annotator), key, answer))

    async def undo(request: Request) -> Response:
        annotator, key = await _texts(request, "annotator", "pair")
        return JSONResponse(await run_in_threadpool(session.undo, checked_name(annotator), key))

    def picture(request: Request) -> Response:
        path = session.picture(request.path_params["key"], request.path_params["side"])
        if not path.is_file():
            return _refusal(f"{path} is gone", 404)
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix.lower()])

    return Starlette(
        routes=[
            *(Route(f"/{name}", _file(name or "page.html", kind)) for name, kind in PAGE.items()),
            Route("/state", state),
            Route("/choice", choose, methods=["POST"]),
            Route("/undo", undo, methods=["POST"]),
            Route("/picture/{key}/{side}", picture),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guard(token))],
        exception_handlers={UserError: _tell},
    )


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    content = (Path(__file__).parent / name).read_bytes()
    return lambda request: Response(content, media_type=kind)


def _tell(request: Request, error: Exception) -> Response:
    return _refusal(str(error), 507 if isinstance(error, DataError) else 400)


def _refusal(text: str, status: int) -> Response:
    return JSONResponse({"error": text}, status)


async def _texts(request: Request, *names: str) -> list[str]:
    """Fields of a JSON body. A foreign page can send no JSON without asking, and nothing here would allow it.

    Raises:
        ConfigError: no JSON object that has them as texts.
    """
    body: Any = None
    if request.headers.get("content-type", "").split(";")[0] == "application/json":
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            body = None
    values = [body.get(name) for name in names] if isinstance(body, dict) else []
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) < len(names):
        raise ConfigError(f"expected a JSON object with the texts {', '.join(names)}")
    return texts


def _guard(token: str | None) -> Callable[[Request, Handler], Awaitable[Response]]:
    """Lets through who knows the token, or without one who asks for this machine by its own name.

    The second refuses a foreign page whose name was made to point here (DNS rebinding).
    """

    async def guarded(request: Request, handler: Handler) -> Response:
        cookie = f"label_token_{request.url.port}"
        given = request.query_params.get("token")
        if token is None:
            if request.url.hostname not in LOCAL_NAMES:
                return PlainTextResponse("This page is reached as 127.0.0.1 or localhost.\n", 403)
        elif not any(_same(word, token) for word in (given, request.cookies.get(cookie))):
            return PlainTextResponse("Open the address that the command printed, with its token.\n", 403)
        elif given is not None and request.url.path == "/":
            # The token leaves the address bar; the cookie has it from here on.
            response: Response = RedirectResponse(_without_token(request.url), 303)
            response.set_cookie(cookie, token, httponly=True, samesite="lax")
            response.headers.update(HEADERS)
            return response
        response = await handler(request)
        response.headers.update(HEADERS)
        return response

    return guarded


def _same(word: str | None, token: str) -> bool:
    return word is not None and secrets.compare_digest(word.encode(), token.encode())


def _without_token(url: URL) -> str:
    rest = url.remove_query_params("token")
    return "./" + (f"?{rest.query}" if rest.query else "")
