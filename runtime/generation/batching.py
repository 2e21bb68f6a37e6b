"""Many texts at once: rows join when there is room, and leave as soon as they end (continuous batching).

Each row is what a run alone would be: its own settings, sampler, processors, stop strings and memory bias.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..checks import instance, is_sequence, typed, whole_number
from ..engine.prefix_cache import PrefixCache
from ..engine.state import DecodeState, StepOutput
from ..errors import IMSMRuntimeError, PromptError, SettingsError, shown
from .chat_template import Message
from .choice import Chooser
from .generation import Model, TextOfTokens, checked, own_processors, prompt_tokens
from .prompts import encoded
from .results import Chunk, Gathering, Generation, without_logits
from .settings import GenerationSettings

MOST_ROWS = 8
PIECE_MS = 50.0
"""How long reading a prompt may keep rows waiting at a time."""
WHOLE = math.inf
"""... where nobody waits for single tokens: the same seed then draws the same tokens in every run."""
FIRST_PIECE = 16
"""Tokens of a prompt that are read at once before it is known how long reading takes."""
Prompt = str | Sequence[Message] | Sequence[int]


class Event(NamedTuple):
    """What came of a step for one text: a chunk, or the error that ends it. key: the text's. held: tokens of its prompt
    that were read before it, for a text of the prefix cache or one that waited with it."""

    key: Any
    chunk: Chunk | None
    error: IMSMRuntimeError | None = None
    held: int = 0


@dataclass(eq=False)
class _Row:
    key: Any
    ids: list[int]
    settings: GenerationSettings
    chooser: Chooser
    text: TextOfTokens
    state: DecodeState
    read: int = 0
    held: int | None = None
    token: int = 0
    ended: bool = False


class Batch:
    """Texts that are generated together, step by step.

    most_rows: how many at most; more wait in the order in which they were added. piece_ms: for how long a step may read
    a new prompt while others go on; infinity: until it is read, so that int8 and int4 round as in a run alone, whatever
    the times are. alone_ms: ... while there are no others. prefixes: what prompts may begin with, and where the texts
    go that end; not those with `echo`, whose prompts are read as a whole. One thread at a time uses it.
    """

    def __init__(
        self,
        model: Model,
        most_rows: int = MOST_ROWS,
        piece_ms: float = PIECE_MS,
        alone_ms: float = math.inf,
        prefixes: PrefixCache | None = None,
    ) -> None:
        instance("model", model, Model)
        if prefixes is not None:
            instance("prefixes", prefixes, PrefixCache)
        self.model = model
        self.most_rows = whole_number("most_rows", most_rows, 1)
        self.piece_ms, self.alone_ms = typed("piece_ms", piece_ms, float), typed("alone_ms", alone_ms, float)
        for name in ("piece_ms", "alone_ms"):
            if not getattr(self, name) > 0:
                raise SettingsError(name, getattr(self, name), "it must be above 0")
        self.prefixes = prefixes
        self._state: DecodeState | None = None
        self._rows: list[_Row] = []  # in the state's order
        self._ready: list[_Row] = []  # whose prompt was read while there was no place
        self._waiting: deque[_Row] = deque()
        self._ms_per_token: float | None = None

    @property
    def active(self) -> int:
        """Texts whose prompt was read."""
        return len(self._rows) + len(self._ready)

    @property
    def waiting(self) -> int:
        """Texts whose prompt is not read yet, or not all of it."""
        return len(self._waiting)

    def add(self, key: Any, prompt: Prompt, settings: GenerationSettings | None = None, **changes: Any) -> int:
        """Let a text wait for its turn; returns the number of its prompt's tokens. key: what its chunks come with.
        prompt, settings, changes: as `stream_generate` has them. Raises what is wrong with them."""
        model, session = self.model, self.model.session
        settings = checked(model, settings, changes)
        state = session.new_state(1, settings.memory_bias)
        ids = encoded(model, prompt, settings, state).ids
        session.check_lengths(state, [ids])
        if settings.trace is not None:
            session.check_by_memory("trace", settings.trace)
        chooser = Chooser(
            session.manifest.vocab_size,
            settings.sampler(),
            own_processors(model, settings),
            settings.logprobs,
            settings.trace,
        )
        chooser.begin(ids)
        self._waiting.append(_Row(key, ids, settings, chooser, TextOfTokens(model, settings), state))
        return len(ids)

    def cancel(self, key: Any) -> bool:
        """Let a text leave; whether it was there."""
        for row in (*self._waiting, *self._ready, *self._rows):
            if row.key == key and not row.ended:
                row.ended = True
                if row in self._waiting:
                    self._keep(row, row.state, 0)
                    self._waiting.remove(row)
                self._seat()
                return True
        return False

    def step(self) -> list[Event]:
        """One token for every row, and some reading of the next prompt: what came of it. Nothing if there is nothing to
        do. After an exception, which memory that runs out or Ctrl-C may raise, make a new batch."""
        events = self._decode()
        self._seat()  # who was read ahead takes a free place before the next one is read
        if self._waiting and not self._ready:
            events += self._read()
            self._seat()
        return events

    def _decode(self) -> list[Event]:
        if self._state is None:
            return []
        by_memory = any(row.settings.trace is not None for row in self._rows)
        tokens = [row.token for row in self._rows]
        output = self.model.session.decode_step(self._state, tokens, by_memory=by_memory)
        lengths = self._state.lengths
        return [self._chosen(row, output, index, int(lengths[index])) for index, row in enumerate(self._rows)]

    def _read(self) -> list[Event]:
        """Read a piece of the next prompt; with its end its first token comes."""
        row = self._waiting[0]
        if row.settings.echo:
            return [self._read_whole(row)]
        if row.held is None:
            row.held = self._begun(row)
        size = self._piece(self.piece_ms if self._rows else self.alone_ms, len(row.ids))
        piece = row.ids[row.read : row.read + size]
        start = time.perf_counter()
        output = self.model.session.prefill(row.state, [piece], by_memory=row.settings.trace is not None)
        self._ms_per_token = 1e3 * (time.perf_counter() - start) / len(piece)
        row.read += len(piece)
        if row.read < len(row.ids):
            return []
        same = self._same(row)
        for other in same:
            other.state, other.read, other.held = row.state.take([0]), row.read, row.read
        together = [row, *same]
        self._waiting = deque(each for each in self._waiting if each not in together)
        self._ready += together
        return [self._chosen(each, output, 0, len(row.ids)) for each in together]

    def _same(self, row: _Row) -> list[_Row]:
        """Those who wait with the same prompt, which need not be read again."""
        if len(self._waiting) == 1:
            return []
        wanted = (row.settings.memory_bias, row.settings.trace is None)
        return [
            other
            for other in self._waiting
            if other is not row
            and (other.settings.memory_bias, other.settings.trace is None) == wanted
            and not other.settings.echo
            and other.ids == row.ids
        ]

    def _read_whole(self, row: _Row) -> Event:
        """Read a prompt whose log-probabilities are told, at once."""
        found = self.model.session.prompt_logprobs(row.ids, k=row.settings.logprobs or 0, state=row.state)
        self._waiting.popleft()
        self._ready.append(row)
        event = self._chosen(row, found.output, 0, len(row.ids))
        if event.chunk is None:
            return event
        return event._replace(chunk=event.chunk._replace(prompt=prompt_tokens(row.ids, found)))

    def _begun(self, row: _Row) -> int:
        """Begin a row with what the prefix cache has of its prompt: how many tokens."""
        if self.prefixes is None:
            return 0
        row.state, row.read = self.prefixes.take(row.ids, row.settings.memory_bias)
        return row.read

    def _piece(self, most_ms: float, whole: int) -> int:
        """Tokens of a prompt that are read at once in so much time."""
        if most_ms == math.inf:
            return whole
        if self._ms_per_token is None:
            return FIRST_PIECE
        return max(1, int(most_ms / self._ms_per_token))

    def _keep(self, row: _Row, state: DecodeState, index: int) -> None:
        """Keep what a row that ended has read."""
        length = int(state.lengths[index])
        if self.prefixes is not None and length:
            self.prefixes.put(row.chooser.history.ids[:length], state, index)

    def _chosen(self, row: _Row, output: StepOutput, index: int, read: int) -> Event:
        """What comes of a row's logits, the output's `index`. read: the tokens that the row has read."""
        try:
            token = row.chooser.choose(output, index)
            chunk = row.text.push(token)
        except IMSMRuntimeError as error:
            row.ended = True
            return Event(row.key, None, error, row.held or 0)
        row.token = token.id
        if chunk.finish_reason is None and read >= self.model.session.manifest.context_length:
            end = row.text.end()
            chunk = Chunk(chunk.text + end.text, token, end.finish_reason, end.stopped_by)
        row.ended = chunk.finish_reason is not None
        return Event(row.key, without_logits(chunk), held=row.held or 0)

    def _seat(self) -> None:
        """Rows that ended leave; who was read takes a place."""
        for row in self._ready:
            if row.ended:
                self._keep(row, row.state, 0)
        for place, row in enumerate(self._rows):
            if row.ended and self._state is not None:
                self._keep(row, self._state, place)
        self._ready = [row for row in self._ready if not row.ended]
        while self._ready:
            row = self._ready[0]
            index = next((index for index, other in enumerate(self._rows) if other.ended), None)
            if index is not None and self._state is not None:
                self._state.replace(index, row.state)
                self._rows[index] = row
            elif len(self._rows) >= self.most_rows:
                break
            else:
                if self._state is None:
                    self._state = row.state
                else:
                    self._state.join(row.state)
                self._rows.append(row)
            del self._ready[0]
        ended = [index for index, row in enumerate(self._rows) if row.ended]
        if len(ended) == len(self._rows):
            self._state = None
        elif ended and self._state is not None:
            self._state.drop(ended)
        self._rows = [row for row in self._rows if not row.ended]


def stream_batch(
    model: Model,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    *,
    most_rows: int = MOST_ROWS,
    **changes: Any,
) -> Iterator[tuple[int, Chunk]]:
    """Chunks of many texts as they come, with the number of their prompt, from 0. settings: for all, or one for each;
    `changes` override their fields. Raises what is wrong with any of them, before the first token as far as that can
    be told then."""
    batch, _ = _filled(model, prompts, settings, most_rows, changes)
    yield from _chunks(batch)


def generate_batch(
    model: Model,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | Sequence[GenerationSettings] | None = None,
    *,
    most_rows: int = MOST_ROWS,
    **changes: Any,
) -> list[Generation]:
    """Run `stream_batch` to its end: one result for each prompt, in their order."""
    batch, counts = _filled(model, prompts, settings, most_rows, changes)
    found = [Gathering(count) for count in counts]
    for number, chunk in _chunks(batch):
        found[number].take(chunk)
    return [text.result() for text in found]


def _filled(
    model: Model,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | Sequence[GenerationSettings] | None,
    most_rows: int,
    changes: dict[str, Any],
) -> tuple[Batch, list[int]]:
    """A batch of all texts, and how many tokens each prompt has."""
    batch = Batch(model, most_rows, WHOLE)
    if not is_sequence(prompts):
        raise PromptError(f"prompts are {shown(prompts)}, not a sequence of prompts")
    if settings is None or isinstance(settings, GenerationSettings):
        settings = [checked(model, settings, changes)] * len(prompts)
    if not is_sequence(settings) or len(settings) != len(prompts):
        raise SettingsError("settings", settings, f"there must be one for all prompts, or {len(prompts)} of them")
    each = zip(prompts, settings, strict=True)
    return batch, [batch.add(number, *of_one, **changes) for number, of_one in enumerate(each)]


def _chunks(batch: Batch) -> Iterator[tuple[int, Chunk]]:
    while batch.active or batch.waiting:
        for event in batch.step():
            if event.error is not None:
                raise event.error
            assert event.chunk is not None
            yield event.key, event.chunk
