"""Texts that were read, kept for prompts that begin alike."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import instance, typed, whole_number
from ..errors import PromptError
from .marks import RECENT, Mark, Marks
from .prefix_file import Prefix, read_prefixes, write_prefixes
from .session import Session
from .state import DecodeState

Array = NDArray[Any]
MARK_EVERY = 32
"""Of each so many tokens of a kept text one length is kept that it can be cut back to; of the last ones all are. The
place where two texts part becomes one, if it is at least so far behind the last."""
ZERO = np.float32(0)


@dataclass(frozen=True, eq=False)
class _Entry:
    """tokens: (n,) int64. state: one row that holds them, all as its prompt; it is never changed. nbytes: of both."""

    tokens: Array
    state: DecodeState
    nbytes: int

    def usable(self, tokens: Array) -> int:
        """How many of `tokens`, not all of them, the state can be cut back to."""
        most = min(_common(self.tokens, tokens), len(tokens) - 1)
        if not self.state.gate_reads_query:
            return most
        return max((length for length in self.state.cut_lengths(0) if length <= most), default=0)

    def covers(self, tokens: Array) -> bool:
        """Whether `tokens` are the beginning of a longer text, which can be cut back to all of them."""
        count = len(tokens)
        return (
            _common(self.tokens, tokens) == count < len(self.tokens) and self.usable(self.tokens[: count + 1]) == count
        )


class PrefixCache:
    """The states of texts that were read, found by their tokens. Several threads may share one.

    A prompt that begins as one of them need not read its beginning again: what follows equals a fresh run over the
    whole of it. A beginning can be had where the gate's query is known (see `DecodeState.trim`), and any where the gate
    does not read the query. Tokens of a reply belong to the query of what follows, as in a conversation that goes on.

    The memory bias enters at the gate, behind the caches, and changes nothing in them: what one conversation read with
    its bias serves another with any.
    """

    def __init__(self, session: Session, max_bytes: int) -> None:
        """max_bytes: of caches, marks and tokens together; what was not used for the longest time goes first. Raises
        SettingsError."""
        instance("session", session, Session)
        self.session = session
        self.max_bytes = whole_number("max_bytes", max_bytes, 0)
        self._entries: list[_Entry] = []  # the one that was used last is the last; replaced, never changed
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many texts are kept."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(entry.nbytes for entry in self._entries)

    def put(self, tokens: Sequence[int] | Array, state: DecodeState, row: int = 0) -> bool:
        """Keep a copy of a row. tokens: what it holds: a prompt, or the turns and replies of a conversation, without a
        token that is pending. A kept text that is the beginning of this one is dropped.

        Returns whether the text is kept, alone or as the beginning of another: not if it is larger than `max_bytes`.
        Raises PromptError for tokens that are not as many as the row's, for a row that does not exist, and for a state
        of another artifact or in another thread's step.
        """
        self.session.check_state(state)
        ids = np.array(self.session.token_ids(tokens), np.int64)
        own = state.take([row])
        if len(ids) != own.lengths[0]:
            raise PromptError(f"{len(ids)} tokens for a row that holds {own.lengths[0]}")
        if not len(ids):
            return False
        own.pending[0] = None
        _become_prompt(own)
        return self._keep(_entry(ids, own))

    def take(self, tokens: Sequence[int] | Array, memory_bias: float = 0.0) -> tuple[DecodeState, int]:
        """A separate state of one row that holds the first n of `tokens`, as its prompt, and n: the longest beginning
        that is kept, and less than all of them, so that `prefill(state, [tokens[n:]])` gives the logits that follow. n
        is 0, and the state empty, where nothing fits. memory_bias: the state's.

        A kept text that cannot be cut back to where `tokens` depart from it is read on from the nearest length that it
        can, up to there. The caller would have to read those tokens anyway, and a text that is kept after this one, and
        departs there too, need not be. Raises as `Session.prefill`.
        """
        ids = np.array(self.session.token_ids(tokens), np.int64)
        made = self.session.new_state(1, memory_bias)
        with self._lock:
            found, length, alike = None, 0, 0
            for entry in self._entries:
                alike = max(alike, min(_common(entry.tokens, ids), len(ids) - 1))
                usable = entry.usable(ids)
                if usable >= max(length, 1):
                    found, length = entry, usable
            if found is not None:
                self._use(found)
        if found is not None:
            taken = found.state.take([0], [length])
            taken.memory_bias[:] = made.memory_bias
            made = taken
        if alike - length < MARK_EVERY:
            return made, length
        self.session.prefill_likeliest(made, [ids[length:alike].tolist()])
        return made, alike

    def clear(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._entries = []

    def save(self, path: Path | str) -> None:
        """Write what is kept into one file, whole or not at all. Raises ArtifactError if it cannot be written, and
        SettingsError for what is no path."""
        prefixes = [Prefix(entry.tokens, entry.state) for entry in self._entries]
        write_prefixes(typed("path", path, Path), self.session, prefixes)

    @classmethod
    def load(cls, session: Session, path: Path | str, max_bytes: int) -> PrefixCache:
        """A cache with what was saved, as far as it fits into `max_bytes`. Raises ArtifactError for a file that is
        damaged or was saved with another artifact, and SettingsError."""
        made = cls(session, max_bytes)
        for prefix in read_prefixes(typed("path", path, Path), session, made.max_bytes):
            made._keep(_entry(prefix.tokens, prefix.state))
        return made

    def _keep(self, new: _Entry) -> bool:
        if new.nbytes > self.max_bytes:
            return False
        with self._lock:
            for entry in self._entries:
                if entry.covers(new.tokens):
                    self._use(entry)
                    return True
            kept = [entry for entry in self._entries if _common(entry.tokens, new.tokens) < len(entry.tokens)]
            room = self.max_bytes - new.nbytes
            while sum(entry.nbytes for entry in kept) > room:
                del kept[0]
            self._entries = [*kept, new]
        return True

    def _use(self, used: _Entry) -> None:
        self._entries = [*(entry for entry in self._entries if entry is not used), used]


def _entry(tokens: Array, state: DecodeState) -> _Entry:
    marks = sum(np.asarray(mark.query_sum).nbytes for mark in state.marks[0].read)
    return _Entry(tokens, state, state.cache_bytes + marks + tokens.nbytes)


def _become_prompt(state: DecodeState) -> None:
    """Make all that a state of one row holds its query, at every length that it can be cut back to."""
    (marks,), length = state.marks, int(state.lengths[0])
    state.ask()
    if not state.gate_reads_query:
        return
    wanted = {known // MARK_EVERY: known for known in sorted(marks.lengths)}.values()
    kept = sorted({*wanted, *(known for known in marks.lengths if known > length - RECENT)} - {length})
    made = Marks()
    for known in kept:
        mark = marks.at(known)
        assert mark is not None
        made.read.append(Mark(known, mark.query_sum + mark.reply_sum, mark.query_count + mark.reply_count, ZERO, ZERO))
    made.read.append(Mark(length, state.query_sum[0].copy(), state.query_count[0], ZERO, ZERO))
    state.marks = [made]


def _common(one: Array, other: Array) -> int:
    """How many tokens two texts have in common before they differ."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
