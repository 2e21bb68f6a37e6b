"""Texts of one request as its coroutine sees them: chunks, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.types import Receive

from .scheduler import Scheduler
from .security import ApiError, refusal
from .tickets import Arrival, Failure, RefusedError, Text


class GoneError(Exception):
    """The client has closed the connection."""


class Arrivals:
    """The texts of a request while it is answered. Leaving the block cancels what is not done.

    Raises ApiError for a text that fails and GoneError for a client that leaves, while iterated over. held: by the
    number of a text, the tokens of its prompt that were read before.
    """

    def __init__(self, scheduler: Scheduler, texts: Sequence[Text], receive: Receive) -> None:
        self.held: dict[int, int] = {}
        self._scheduler, self._texts, self._receive = scheduler, texts, receive
        self._came: asyncio.Queue[tuple[int, Arrival | Failure | None]] = asyncio.Queue()

    async def __aenter__(self) -> Arrivals:
        """Raises ApiError where the texts are not taken on."""
        loop, came = asyncio.get_running_loop(), self._came

        def deliver(number: int, arrival: Arrival | Failure) -> None:
            loop.call_soon_threadsafe(came.put_nowait, (number, arrival))

        try:
            self._tickets = self._scheduler.submit(self._texts, deliver)
        except RefusedError as error:
            raise _error_of(error.failure, error.retry_s) from error
        self._watch = asyncio.create_task(self._wait_for_the_end())
        return self

    async def __aexit__(self, *_: Any) -> None:
        self._watch.cancel()
        self._scheduler.cancel(self._tickets)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Arrival]]:
        left = len(self._texts)
        while left:
            number, arrival = await self._came.get()
            if arrival is None:
                raise GoneError
            if isinstance(arrival, Failure):
                raise _error_of(arrival)
            self.held[number] = arrival.held
            left -= arrival.chunk.finish_reason is not None
            yield number, arrival

    async def _wait_for_the_end(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._came.put_nowait((0, None))


def _error_of(failure: Failure, retry_s: int | None = None) -> ApiError:
    headers = None if retry_s is None else {"Retry-After": str(retry_s)}
    return refusal(failure.status, failure.message, failure.code, headers)
