"""What a caller can set for the server."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_fields
from ..errors import SettingsError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def _option(default: Any, text: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, who may use it, and how much it takes on. Raises SettingsError.

    api_key: what clients must send as `Authorization: Bearer KEY`; None: nothing. model_name: what the model is called;
    None: as its folder. rows: texts that are generated together. queue: texts that wait for a row; a request that finds
    no room is answered 429. timeout_s: how long a request may take, waiting included. cache_mb: memory for texts that
    were read, which later prompts begin with; 0 is off. origins: web pages that may use the server (CORS). hosts: names
    that a request's Host may have; none: any, but on the loopback interface its own names alone. body_mb: of a
    request's body at most. drain_s: how long running requests may go on when the server is asked to end. stuck_s: a
    step that takes longer makes /health say so.
    """

    host: str = _option("127.0.0.1", "listen at this address; 0.0.0.0 is every interface", "ADDRESS")
    port: int = _option(8000, "listen at this port; 0 is a free one", "N")
    api_key: str | None = _option(None, "clients must send this key, or that in @FILE", "KEY")
    model_name: str | None = _option(None, "call the model so; without it as its folder is called", "NAME")
    rows: int = _option(8, "generate so many texts at once, at most", "N")
    queue: int = _option(128, "let so many texts wait; more are answered 429", "N")
    timeout_s: float = _option(600.0, "seconds that a request may take, waiting included", "S")
    cache_mb: int = _option(512, "megabytes for texts that later prompts may begin with; 0 is off", "MB")
    origins: Sequence[str] = _option((), "web pages that may use the server, such as https://example.org", "ORIGIN")
    hosts: Sequence[str] = _option((), "names that a request may call the server by; on loopback its own are", "HOST")
    body_mb: float = _option(8.0, "megabytes of a request, at most", "MB")
    drain_s: float = _option(30.0, "seconds that running requests may go on after SIGTERM or Ctrl-C", "S")
    stuck_s: float = _option(120.0, "a step that takes so many seconds makes /health say so", "S")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("origins", "hosts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 <= self.port <= 65535:
            raise SettingsError("port", self.port, "it must be 0 (a free one) to 65535")
        for name in ("rows", "queue"):
            if getattr(self, name) < 1:
                raise SettingsError(name, getattr(self, name), "it must be at least 1")
        if self.cache_mb < 0:
            raise SettingsError("cache_mb", self.cache_mb, "it must be 0 (off) or above")
        for name in ("timeout_s", "body_mb", "stuck_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(name, getattr(self, name), "it must be above 0")
        if not 0 <= self.drain_s < math.inf:
            raise SettingsError("drain_s", self.drain_s, "it must be 0 or above")
        if self.api_key is not None:
            object.__setattr__(self, "api_key", self.api_key.strip())
            if not self.api_key or not self.api_key.isascii() or not self.api_key.isprintable():
                raise SettingsError("api_key", "not shown", "it must be visible ASCII characters")
        for origin in self.origins:
            if origin != "*" and "://" not in origin:
                raise SettingsError("origins", origin, "an origin is such as https://example.org; * is any")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def host_names(self) -> frozenset[str] | None:
        """Names that a request's Host may have; None: any."""
        if self.on_loopback:
            return frozenset({*LOOPBACK_NAMES, self.host, *map(str.lower, self.hosts)})
        return frozenset(map(str.lower, self.hosts)) or None
