"""A conversation that goes on in a state: what was said is read once, and the state holds what was shown, no more."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from ..checks import instance, typed
from ..engine.state import DecodeState
from ..errors import PromptError, SettingsError
from .generation import Model, stream_generate
from .prompts import encoded
from .results import Chunk
from .settings import GenerationSettings

Messages = list[dict[str, str]]


class Chat:
    """Turns of a user and replies of a model, through its chat template.

    The messages are what was shown: of a reply that a stop string, a length or the caller ended, its text so far. The
    state behind them has the tokens of just that text, so that the next turn equals a run over the whole conversation
    (see `TextCodec.encode_continuation` for what a template may change in it).

    Where a turn and the reply's room (max_new_tokens, at most a quarter of the context) do not fit into the context,
    the oldest turns with their replies are forgotten until half of it is free, and the rest is read again. forgotten:
    how many turns were. The sampler is one for the whole conversation: with a seed all of it is repeatable.
    """

    def __init__(
        self, model: Model, settings: GenerationSettings | None = None, *, system: str | None = None, **changes: Any
    ) -> None:
        """system: what the template is told first. settings: `changes` override its fields or the defaults. Raises
        PromptError for an artifact without a chat template, and for a system text that the template refuses, and
        SettingsError."""
        instance("model", model, Model)
        if settings is not None:
            instance("settings", settings, GenerationSettings)
        if model.codec.template is None:
            raise PromptError("a chat needs a chat template, which this artifact does not have; send text as a prompt")
        self.model = model
        self.forgotten = 0
        self._turns: Messages = []
        self._state: DecodeState | None = None
        self._rest = ""  # of the last reply, what the state does not hold
        self._reply: Generator[Chunk] | None = None
        self._settings = GenerationSettings()
        self.change(**vars(settings or self._settings) | changes)
        self._system: str | None = None
        self.system = system

    @property
    def settings(self) -> GenerationSettings:
        """What `change` changes."""
        return self._settings

    def change(self, **changes: Any) -> None:
        """Replace settings from here on: memory_bias too, for everything that follows. Raises SettingsError; all are
        then as they were."""
        settings = replace(self._settings, **changes)
        if settings.raw:
            raise SettingsError("raw", True, "a chat goes through the chat template")
        if settings.trace is not None:
            self.model.session.check_by_memory("trace", settings.trace)
        self._settings, self._sampler = settings, settings.sampler()
        if self._state is not None:
            with np.errstate(over="ignore"):  # what float32 does not hold is as good as infinite
                self._state.memory_bias[0] = np.float64(settings.memory_bias)

    @property
    def system(self) -> str | None:
        """What the template is told first; None is what it says by itself. After a change the conversation is read
        again with the next turn."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        text = typed("system", text, str | None) or None
        if text is not None:
            first = [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}]
            self.model.codec.encode_chat(first, self._settings.control_tokens)
        self._end_reply()
        self._system, self._state = text, None

    @property
    def messages(self) -> Messages:
        """The conversation, a copy: the system text, if there is one, then turns and replies."""
        self._end_reply()
        return [dict(message) for message in (*self._first(), *self._turns)]

    @property
    def tokens(self) -> int:
        """How many tokens of the context are in use; 0 where all of it will be read again."""
        return 0 if self._state is None else int(self._state.lengths[0])

    def reset(self) -> None:
        """Begin anew, with the same system text and settings."""
        self._end_reply()
        self._turns, self._state, self._rest, self.forgotten = [], None, "", 0
        self._sampler = self._settings.sampler()

    def send(self, text: str) -> Generator[Chunk]:
        """The reply to a user's turn, as it comes. When it is left before its end, the conversation has what came of
        it; before the first chunk, or by what is raised until then, the turn was never said. Raises what
        `stream_generate` raises."""
        if not typed("text", text, str):
            raise PromptError("the prompt is empty")
        self._end_reply()
        self._reply = self._stream({"role": "user", "content": text})
        return self._reply

    def _stream(self, turn: dict[str, str]) -> Generator[Chunk]:
        ids, replaces_pending = self._prompt(turn)
        state = self._state
        assert state is not None
        before, tokens, shown = state.noted(), [], ""
        try:
            if replaces_pending:
                state.pending[0] = None
            start = int(state.lengths[0]) + (state.pending[0] is not None) + len(ids)
            chunks = stream_generate(self.model, ids, self._settings, sampler=self._sampler, state=state)
            with closing(chunks):  # type: ignore[type-var]
                for chunk in chunks:
                    if chunk.token is not None:
                        tokens.append(chunk.token.id)
                    shown += chunk.text
                    yield chunk
        finally:
            if tokens:
                self._turns += [turn, {"role": "assistant", "content": shown}]
                self._cut_back(start, tokens, shown)
            else:
                state.restore(before)

    def _prompt(self, turn: dict[str, str]) -> tuple[list[int], bool]:
        """The tokens to read, and whether they are in the place of the pending one. The state is then one that has room
        for them."""
        if self._state is not None and self._state.lengths[0]:
            found = self._continued(turn, self._state)
            if found is not None:
                return found
        ids = self._whole(turn)
        self._state, self._rest = None, ""  # before its successor needs memory
        self._state = self.model.session.new_state(1, self._settings.memory_bias)
        return ids, False

    def _continued(self, turn: dict[str, str], state: DecodeState) -> tuple[list[int], bool] | None:
        """What follows in the state; None where that has no room, or the template does not let it go on."""
        replaces_pending = False
        try:
            if self._rest:
                ids = self.model.codec.encode_continuation([turn], self._settings.control_tokens, self._rest)
            else:
                ids, replaces_pending = encoded(self.model, [turn], self._settings, state)
        except PromptError:  # or what is wrong with the turn, which the whole conversation's encoding tells then
            return None
        pending = state.pending[0] is not None and not replaces_pending
        return (ids, replaces_pending) if int(state.lengths[0]) + pending + len(ids) <= self._most() else None

    def _whole(self, turn: dict[str, str]) -> list[int]:
        """All of the conversation, without what has to be forgotten."""
        codec, control_tokens = self.model.codec, self._settings.control_tokens
        turns = self._turns
        ids = codec.encode_chat([*self._first(), *turns, turn], control_tokens)
        if len(ids) > self._most():
            while turns and len(ids) > self.model.session.manifest.context_length // 2:
                turns = turns[2:]
                ids = codec.encode_chat([*self._first(), *turns, turn], control_tokens)
            self.model.session.check_lengths(self.model.session.new_state(1), [ids])
        self.forgotten += (len(self._turns) - len(turns)) // 2
        self._turns = turns
        return ids

    def _most(self) -> int:
        """Tokens after which a reply still has room."""
        context = self.model.session.manifest.context_length
        return context - min(self._settings.max_new_tokens, context // 4)

    def _cut_back(self, start: int, tokens: list[int], shown: str) -> None:
        """Let the state hold the tokens of the shown text. What a stop string or an interruption leaves of a token's
        text becomes `_rest`. start: the state's length before the reply's tokens."""
        state, codec = self._state, self.model.codec
        assert state is not None
        length, pending, known = int(state.lengths[0]), state.pending[0], set(state.cut_lengths(0))
        count, text = len(tokens), codec.decode(tokens)
        unfed = start + count == length + 1 and pending == tokens[-1]
        if unfed and shown.startswith(text):
            self._rest = shown[len(text) :]
            return
        while start + count not in known or not shown.startswith(text):
            count -= 1
            text = codec.decode(tokens[:count])
        state.trim([start + count])
        state.pending[0] = None
        self._rest = shown[len(text) :]

    def _first(self) -> Messages:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    def _end_reply(self) -> None:
        """Leave a reply that its caller has not read to the end."""
        if self._reply is not None:
            self._reply.close()
            self._reply = None
