"""Who may use the server: the names that it is called by, the key, and how large a body may be.

Plain ASGI around the application; every refusal is an error body as OpenAI's API has it.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..generation.openai_answers import error_body
from ..json_checks import parse_json

OPEN_PATHS = ("/health",)
"""What needs no key."""
BODY_SECONDS = 60.0
"""How long a client may take to send a body."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(body["error"]["message"])
        self.status, self.body, self.headers = status, body, headers

    def response(self) -> JSONResponse:
        """As an answer of its own."""
        return JSONResponse(self.body, self.status, self.headers)


def refusal(status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> ApiError:
    """An error that no field of the body is to blame for."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ApiError(status, error_body(message, kind=kind, code=code), headers)


class HostGuard:
    """Refuses requests whose Host is not the server's: a web page whose name was made to lead here (DNS rebinding)
    sends its own."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _host_name(Headers(scope=scope).get("host", "")) not in self.names:
            error = refusal(403, "the request's Host is no name of this server; --hosts adds names", "host_not_allowed")
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


class KeyGuard:
    """Refuses requests without the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            # Compared in a time that does not tell how much of it is right.
            right = hmac.compare_digest(key.strip().encode("latin-1"), self.key)
            if scheme.lower() != "bearer" or not right:
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                error = refusal(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def read_body(request: Request, most_bytes: int) -> bytes:
    """A request's body. Raises ApiError if it is too large, too slow to come, or of another type than JSON's: web pages
    of others can send anything else without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refusal(415, "the body's Content-Type must be application/json", "unsupported_media_type")
    too_large = refusal(413, f"the body is larger than {most_bytes} bytes", "body_too_large", {"Connection": "close"})
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most_bytes:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                content += piece
                if len(content) > most_bytes:
                    raise too_large
    except TimeoutError:
        raise refusal(408, f"the body did not come within {BODY_SECONDS:g} s", "body_timeout") from None
    return bytes(content)


def parsed(content: bytes) -> Any:
    """What a body says. Raises ApiError for what is no JSON."""
    try:
        return parse_json(content)
    except ValueError as error:
        message = f"the body is no JSON: {error}"
        raise ApiError(400, error_body(message, code="invalid_json")) from error


def _host_name(host: str) -> str:
    """A Host without its port, in small letters."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
