"""The ASGI application: which path leads where, and what stands before all of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import IMSMRuntimeError
from ..generation.generation import Model
from ..generation.openai_rows import CHAT, COMPLETION, EMBEDDING, BodyError
from .arrivals import GoneError
from .endpoints import Endpoints
from .metrics import Metrics
from .scheduler import Scheduler
from .security import ApiError, HostGuard, KeyGuard, refusal
from .settings import ServeSettings

CLIENT_GONE = 499
"""What is counted where a client has closed the connection; it sees no answer."""
log = logging.getLogger("imsm.server")
Endpoint = Callable[[Request], Awaitable[Response | ASGIApp]]


class Server:
    """A model behind an ASGI application, `app`, whose lifespan starts and ends the scheduler."""

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        self.metrics = Metrics()
        self.scheduler = Scheduler(model, settings, self.metrics)
        name = settings.model_name or model.session.folder.name
        self.endpoints = Endpoints(model, settings, self.scheduler, self.metrics, name)
        self.app = Starlette(
            routes=_routes(self.endpoints, self.metrics),
            middleware=_middleware(settings),
            exception_handlers={HTTPException: _http_error, Exception: _unforeseen},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.scheduler.start()
        try:
            yield
        finally:
            self.scheduler.stop()
            self.endpoints.close()


def _routes(endpoints: Endpoints, metrics: Metrics) -> list[Route]:
    paths: list[tuple[str, str, Endpoint]] = [
        ("POST", CHAT, endpoints.chat),
        ("POST", COMPLETION, endpoints.completion),
        ("POST", EMBEDDING, endpoints.embeddings),
        ("GET", "/v1/models", endpoints.models),
        ("GET", "/v1/models/{name:path}", endpoints.one_model),
        ("GET", "/health", endpoints.health),
        ("POST", "/tokenize", endpoints.tokenize),
        ("POST", "/detokenize", endpoints.detokenize),
        ("POST", "/apply-template", endpoints.apply_template),
        ("GET", "/metrics", endpoints.prometheus),
        ("GET", "/props", endpoints.props),
        ("GET", "/slots", endpoints.slots),
    ]
    return [Route(path, _told(path, endpoint, metrics), methods=[method]) for method, path, endpoint in paths]


def _told(path: str, endpoint: Endpoint, metrics: Metrics) -> Endpoint:
    """An endpoint whose errors are answers, and whose answers are counted."""

    async def answered(request: Request) -> Response | ASGIApp:
        try:
            found = await endpoint(request)
        except ApiError as error:
            found = error.response()
        except BodyError as error:
            status = 404 if error.code == "model_not_found" else 400
            found = ApiError(status, error.body).response()
        except (GoneError, ClientDisconnect):
            found = Response(status_code=CLIENT_GONE)
        except IMSMRuntimeError as error:
            log.error("%s: %s", path, error)
            found = refusal(500, "the model failed; the server's log tells why", "model_error").response()
        if isinstance(found, Response):
            metrics.requests.labels(path, str(found.status_code)).inc()
            return found
        return _Counted(found, path, metrics)

    return answered


class _Counted:
    """A stream whose status is counted when it is known."""

    def __init__(self, app: ASGIApp, path: str, metrics: Metrics) -> None:
        self._app, self._path, self._metrics = app, path, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = CLIENT_GONE

        async def noted(message: dict[str, object]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(str(message["status"]))
            await send(message)

        try:
            await self._app(scope, receive, noted)  # type: ignore[arg-type]
        finally:
            self._metrics.requests.labels(self._path, str(status)).inc()


def _middleware(settings: ServeSettings) -> list[Middleware]:
    """From the outside: the Host, then other pages' preflight requests, which have no key, then the key."""
    found = []
    if settings.host_names is not None:
        found.append(Middleware(HostGuard, names=settings.host_names))
    if settings.origins:
        found.append(
            Middleware(
                CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        )
    if settings.api_key is not None:
        found.append(Middleware(KeyGuard, key=settings.api_key))
    return found


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path", 405: f"{request.method} is not what this path takes"}
    message = what.get(error.status_code, str(error.detail))
    return refusal(error.status_code, message, "http_error", error.headers).response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    return refusal(500, "the server failed; its log tells why", "internal_error").response()
