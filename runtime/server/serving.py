"""The application behind uvicorn, in a process that ends gracefully."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from ..errors import SettingsError
from ..generation.generation import Model
from ..interrupts import handled_by
from .app import Server
from .settings import ServeSettings

KEEP_ALIVE_S = 75
"""How long a connection may idle: longer than clients keep theirs, so that none writes into one that is closed."""
LAST_WORDS_S = 10
"""After what still runs was ended, how long answers may take to go out."""


class _Uvicorn(uvicorn.Server):
    """Ends on a first signal when what runs has ended; on a second one that is ended, and on a third one connections
    are not waited for."""

    def __init__(self, config: uvicorn.Config, server: Server, drain_s: float, where: str) -> None:
        super().__init__(config)
        self._signals = 0
        self._server, self._drain_s, self._where = server, drain_s, where

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._where, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with handled_by(self.handle_exit):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._server.scheduler.drain(self._drain_s if self._signals == 1 else 0)
        self.should_exit = True
        if self._signals > 2:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it tells of what it leaves as a traceback
            self.force_exit = True


def bound_socket(settings: ServeSettings) -> socket.socket:
    """A socket at the settings' address, which does not listen yet. Raises SettingsError if there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SettingsError("host", settings.host, f"it is no address to listen at: {why}") from error
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        name = "port" if error.errno is not None and error.strerror == "Address already in use" else "host"
        value: Any = getattr(settings, name)
        raise SettingsError(name, value, f"the server cannot listen there: {error.strerror}") from error
    return made


def serve(model: Model, settings: ServeSettings, at: socket.socket) -> None:
    """Serve a model until a signal ends it. at: from `bound_socket`."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    server = Server(model, settings)
    host, port = at.getsockname()[:2]
    config = uvicorn.Config(
        server.app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_s) + LAST_WORDS_S,
    )
    address = f"[{host}]" if ":" in host else host
    where = f"serving {server.endpoints.name} at http://{address}:{port}"
    _Uvicorn(config, server, settings.drain_s, where).run([at])
    server.scheduler.stop(LAST_WORDS_S)
