"""A client of the server's application in the same process: each of its requests can be watched, and left in the
middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from runtime import Model
from runtime.server.app import Server
from runtime.server.settings import ServeSettings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Reply:
    """An answer as it comes. leave: set to close the connection."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.content = b""
        self.ended = False
        self.leave = asyncio.Event()
        self.came = asyncio.Event()

    @property
    def body(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """The data of all events; [DONE] as it is."""
        text = self.content.decode()
        assert text.endswith("\n\n") or not text
        lines = [line for line in text.split("\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        said = [line.removeprefix("data: ") for line in lines]
        return [each if each == "[DONE]" else json.loads(each) for each in said]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.002)


class Client:
    """Sends requests to a server that runs."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, pieces: int = 1
    ) -> Reply:
        """Begin a request. body: JSON, or bytes as they are, sent in so many pieces."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        said = {"host": "127.0.0.1:8000", "content-type": "application/json"} | (headers or {})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "scheme": "http",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in said.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        size = -(-len(content) // pieces) or 1
        parts = [content[start : start + size] for start in range(0, max(len(content), 1), size)]
        reply = Reply()

        async def receive() -> dict[str, Any]:
            if parts:
                return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            await reply.leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.content += message.get("body", b"")

        async def run() -> None:
            try:
                await self.server.app(scope, receive, send)
            except RuntimeError:  # which Starlette raises again after its answer
                assert reply.status == 500
            finally:
                reply.ended = True

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return reply

    async def send(self, method: str, path: str, body: Any = None, **more: Any) -> Reply:
        """A request and its whole answer."""
        reply = self.start(method, path, body, **more)
        await reply.until(lambda: reply.ended)
        return reply

    async def post(self, path: str, body: Any = None, **more: Any) -> Reply:
        return await self.send("POST", path, body, **more)

    async def get(self, path: str, **more: Any) -> Reply:
        return await self.send("GET", path, **more)

    @property
    def free(self) -> bool:
        """Whether no text is anywhere."""
        scheduler = self.server.scheduler
        return not (scheduler._running or scheduler._queue or scheduler._batch.active or scheduler._batch.waiting)


@asynccontextmanager
async def serving(model: Model, **settings: Any) -> AsyncIterator[Client]:
    server = Server(model, ServeSettings(**{"model_name": "tiny"} | settings))
    async with server.app.router.lifespan_context(server.app):
        yield Client(server)


def run(model: Model, talk: Callable[[Client], Awaitable[None]], **settings: Any) -> None:
    """Let a client talk with a server of its own."""

    async def both() -> None:
        async with serving(model, **settings) as client:
            await talk(client)

    asyncio.run(both())
