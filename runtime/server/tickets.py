"""Texts on their way through the scheduler, and what comes of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import ArtifactError, IMSMRuntimeError, ProviderError
from ..generation.results import Chunk
from ..generation.settings import GenerationSettings


class Failure(NamedTuple):
    """Why a text ends without an answer. status: HTTP's; code: one word for programs."""

    status: int
    code: str
    message: str


class Arrival(NamedTuple):
    """A chunk of a text. held: tokens of its prompt that the prefix cache had."""

    chunk: Chunk
    held: int


class RefusedError(Exception):
    """Texts that are not taken on. retry_s: when to try again, if ever."""

    def __init__(self, failure: Failure, retry_s: int | None = None) -> None:
        super().__init__(failure.message)
        self.failure, self.retry_s = failure, retry_s


class Text(NamedTuple):
    """What is to be generated after a prompt's token ids."""

    ids: Sequence[int]
    settings: GenerationSettings


@dataclass(eq=False)
class Ticket:
    """A text on its way. deliver: is called in the scheduler's thread. phase: queued, reading, writing or ended."""

    text: Text
    deliver: Callable[[Arrival | Failure], object]
    deadline: float
    begun: float = field(default_factory=time.monotonic)
    last: float = 0.0
    new: int = 0
    held: int = 0
    phase: str = "queued"


def tell(ticket: Ticket, arrival: Arrival | Failure) -> None:
    """Deliver what came of a text."""
    with contextlib.suppress(RuntimeError):  # its event loop is closed
        ticket.deliver(arrival)


def failure_of(error: BaseException) -> Failure:
    """What a client is told of an error: what it can change, and of the others that there was one."""
    if isinstance(error, ArtifactError | ProviderError) or not isinstance(error, IMSMRuntimeError):
        return Failure(500, "model_error", "the model failed; the server's log tells why")
    return Failure(400, "invalid_request", str(error))
