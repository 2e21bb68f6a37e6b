"""The one thread that runs the model: texts wait in a queue, are generated together, and leave.

Other threads submit and cancel texts, and are told what came of them; only the thread touches the batch.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..engine.prefix_cache import PrefixCache
from ..errors import IMSMRuntimeError
from ..generation.batching import Batch, Event
from ..generation.generation import Model
from .metrics import Metrics
from .settings import ServeSettings
from .tickets import Arrival, Failure, RefusedError, Text, Ticket, failure_of, tell

ALONE_MS = 250.0
"""How long a step may read a prompt while no text is written: until then nobody is heard."""
MOST_FAILURES = 3
"""Steps that fail one after the other before the model counts as broken."""
LONGEST_RETRY_S = 60
log = logging.getLogger("imsm.server")


class Scheduler:
    """Generates the texts of all clients in one batch. `start` it; `stop` ends it."""

    def __init__(self, model: Model, settings: ServeSettings, metrics: Metrics) -> None:
        self.model, self.settings, self.metrics = model, settings, metrics
        self.prefixes = PrefixCache(model.session, settings.cache_mb * 2**20) if settings.cache_mb else None
        self._batch = self._new_batch()
        self._queue: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._cancelled: list[Ticket] = []
        self._changed = threading.Condition()
        self._ends: float | None = None  # when what still runs is ended
        self._stopped = False
        self._failures = 0
        self._step_began: float | None = None
        self._seconds_per_text = 1.0
        self._thread = threading.Thread(target=self._run, name="imsm-scheduler", daemon=True)
        metrics.watch("waiting_texts", "Texts in the queue", lambda: len(self._queue))
        metrics.watch("running_texts", "Texts that are read or written", lambda: len(self._running))
        if self.prefixes is not None:
            metrics.watch("prefix_cache_bytes", "Bytes of texts that are kept", lambda: self.prefixes.nbytes)  # type: ignore[union-attr]

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, texts: Sequence[Text], deliver: Callable[[int, Arrival | Failure], object]) -> list[Ticket]:
        """Let texts wait for their turn, all of them or none. deliver: is given a text's number and what came of it,
        in the scheduler's thread. Raises RefusedError."""
        deadline = time.monotonic() + self.settings.timeout_s

        def told(number: int) -> Callable[[Arrival | Failure], object]:
            return lambda arrival: deliver(number, arrival)

        tickets = [Ticket(text, told(number), deadline) for number, text in enumerate(texts)]
        with self._changed:
            if self._ends is not None or self._stopped:
                raise RefusedError(self._end_failure())
            if len(self._queue) + len(tickets) > self.settings.queue:
                wait = math.ceil(self._seconds_per_text * (len(self._queue) + 1) / self.settings.rows)
                message = f"{len(self._queue)} texts wait already, and no more than {self.settings.queue} may"
                raise RefusedError(Failure(429, "queue_full", message), min(max(wait, 1), LONGEST_RETRY_S))
            self._queue.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Let texts leave whose client is gone; nothing is delivered for them any more."""
        with self._changed:
            self._cancelled += [ticket for ticket in tickets if ticket.phase != "ended"]
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Take nothing on any more, end what waits, and after so many seconds what runs."""
        with self._changed:
            ends = time.monotonic() + seconds
            self._ends = ends if self._ends is None else min(self._ends, ends)
            self._changed.notify()

    def stop(self, timeout: float | None = None) -> None:
        """End everything at once, and wait for the thread."""
        self.drain(0)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def trouble(self) -> str | None:
        """Why nothing can be generated; None if all is well."""
        began = self._step_began
        if self._ends is not None:
            return "the server is about to end"
        if not self._thread.is_alive():
            return "the model's thread has ended"
        if began is not None and time.monotonic() - began > self.settings.stuck_s:
            return f"a step of the model takes longer than {self.settings.stuck_s:g} s"
        return None

    def slots(self) -> list[dict[str, Any]]:
        """What every row does."""
        running = [*self._running][: self.settings.rows]
        found = [
            {
                "id": number,
                "is_processing": True,
                "state": ticket.phase,
                "prompt_tokens": len(ticket.text.ids),
                "cached_tokens": ticket.held,
                "new_tokens": ticket.new,
                "memory_bias": ticket.text.settings.memory_bias,
            }
            for number, ticket in enumerate(running)
        ]
        free = range(len(running), self.settings.rows)
        return [*found, *({"id": number, "is_processing": False, "state": "free"} for number in free)]

    def _new_batch(self) -> Batch:
        return Batch(self.model, self.settings.rows, alone_ms=ALONE_MS, prefixes=self.prefixes)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException:  # what Rust calls a panic is no Exception
            log.exception("the model's thread has ended")
        finally:
            with self._changed:
                self._stopped = True
                left = [*self._running, *self._queue]
                self._queue.clear()
            for ticket in left:
                self._end(ticket, self._end_failure())

    def _turn(self) -> bool:
        """One step of the batch, and before it who comes and who leaves; False at the end."""
        with self._changed:
            while not (self._queue or self._running or self._cancelled or self._ends is not None):
                self._changed.wait()
            cancelled, self._cancelled = self._cancelled, []
        for ticket in cancelled:
            self._end(ticket, None)
        now = time.monotonic()
        if self._ends is not None:
            for ticket in [*self._queue, *(self._running if now >= self._ends else ())]:
                self._end(ticket, self._end_failure())
            if not self._running:
                return False
        for ticket in [*self._queue, *self._running]:
            if now >= ticket.deadline:
                message = f"the request took longer than {self.settings.timeout_s:g} s"
                self._end(ticket, Failure(504, "timeout", message))
        self._admit()
        if self._running:
            self._step()
        return True

    def _admit(self) -> None:
        """Let texts into the batch while it has room."""
        while len(self._running) < self.settings.rows:
            with self._changed:
                if not self._queue:
                    return
                ticket = self._queue.popleft()
                self._running.append(ticket)
                ticket.phase = "reading"
            try:
                self._batch.add(ticket, list(ticket.text.ids), ticket.text.settings)
            except IMSMRuntimeError as error:
                self._end(ticket, failure_of(error))

    def _step(self) -> None:
        self._step_began = time.monotonic()
        try:
            events = self._batch.step()
        except BaseException as error:
            self._failures += 1
            self.metrics.step_failures.inc()
            log.exception("a step of the model failed")
            if self._failures >= MOST_FAILURES:
                raise
            for ticket in [*self._running]:
                self._running.remove(ticket)
                self._end(ticket, failure_of(error))
            self._batch = self._new_batch()
            return
        finally:
            self._step_began = None
        self._failures = 0
        for event in events:
            self._pass_on(event)

    def _pass_on(self, event: Event) -> None:
        ticket: Ticket = event.key
        if event.chunk is None:
            assert event.error is not None
            self._end(ticket, failure_of(event.error))
            return
        now = time.monotonic()
        if ticket.phase == "reading":
            ticket.phase, ticket.held = "writing", event.held
            self.metrics.prompt_tokens.inc(len(ticket.text.ids))
            self.metrics.held_tokens.inc(event.held)
            self.metrics.first_token.observe(now - ticket.begun)
        else:
            self.metrics.between_tokens.observe(now - ticket.last)
        ticket.last = now
        ticket.new += event.chunk.token is not None
        self.metrics.new_tokens.inc(event.chunk.token is not None)
        if event.chunk.finish_reason is not None:
            self._leave(ticket, event.chunk.finish_reason)
            self._seconds_per_text += 0.2 * (now - ticket.begun - self._seconds_per_text)
            self.metrics.whole.observe(now - ticket.begun)
        tell(ticket, Arrival(event.chunk, event.held))

    def _end(self, ticket: Ticket, failure: Failure | None) -> None:
        """A text leaves before its end; its row is free."""
        if ticket.phase == "ended":
            return
        if ticket in self._running:
            self._batch.cancel(ticket)
        self._leave(ticket, "cancelled" if failure is None else failure.code)
        if failure is not None:
            tell(ticket, failure)

    def _leave(self, ticket: Ticket, how: str) -> None:
        with self._changed:
            for place in (self._running, self._queue):
                if ticket in place:
                    place.remove(ticket)
            ticket.phase = "ended"
        self.metrics.texts.labels(how).inc()

    def _end_failure(self) -> Failure:
        if self._ends is None:
            return Failure(503, "model_failed", "the model's thread has ended; the server must be started again")
        return Failure(503, "server_stopping", "the server is about to end")
