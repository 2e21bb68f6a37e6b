"""Changes of a state that happen as a whole or not at all, wherever an exception comes from: a failed run, memory that
runs out, Ctrl-C between any two lines, Ctrl-C while things are being put back.

A change begins by noting what the state is, and its last act is one assignment that forgets the note. Whatever happens
in between, a note that is still there says what to put back: at once, or when the state is next used. What a run wrote
into the caches lies behind the lengths, where nothing reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError
from .cache import KVCache
from .marks import Marks

Array = NDArray[Any]
ARRAYS = ("lengths", "query_sum", "query_count", "reply_sum", "reply_count", "memory_bias")
IN_USE = "the state is in the middle of a step in another thread; a state belongs to one caller at a time"


class Note(NamedTuple):
    """What a state was. thread: whose change it is. arrays: the state's own; values: what was in them."""

    thread: int
    caches: dict[str, KVCache]
    arrays: list[Array]
    values: list[Array]
    pending: list[int | None]
    marks: list[Marks]


@dataclass(eq=False, kw_only=True)
class Journal:
    """What changes in a state, and how it changes; the fields are explained there."""

    caches: dict[str, KVCache]
    lengths: NDArray[np.int64]
    query_sum: NDArray[np.float32]
    query_count: NDArray[np.float32]
    reply_sum: NDArray[np.float32]
    reply_count: NDArray[np.float32]
    memory_bias: NDArray[np.float32]
    pending: list[int | None]
    marks: list[Marks]
    layout: object = field(default_factory=object, init=False, repr=False)
    note: Note | None = field(default=None, init=False, repr=False)

    def noted(self) -> Note:
        """What the state is, for `restore`. Raises PromptError while another thread changes it."""
        self.settle()
        return Note(
            get_ident(),
            dict(self.caches),
            self.arrays(),
            [array.copy() for array in self.arrays()],
            list(self.pending),
            [marks.copy() for marks in self.marks],
        )

    def begin(self) -> None:
        """Begin a change, which `note = None` ends as its last act. Raises PromptError while another thread changes the
        state."""
        note = self.noted()
        if self.note is not None:  # no other thread runs between this line and the next assignment
            raise PromptError(IN_USE)
        self.note = note

    def settle(self) -> None:
        """Put back what a change left unfinished. Raises PromptError while another thread changes the state."""
        if self.note is None:
            return
        if self.note.thread != get_ident():
            raise PromptError(IN_USE)
        self._put_back(self.note)

    def undo(self) -> None:
        """After an exception: put back what this thread's change left unfinished."""
        if self.note is not None:
            self.restore(self.note)

    def restore(self, note: Note) -> None:
        """Make the state what it was, once; unless another thread changes it by now."""
        if self.note is None or self.note.thread == get_ident():
            self._put_back(note)

    def _put_back(self, note: Note) -> None:
        self.note = note  # until all of it is done
        self.caches = note.caches
        for array, values in zip(note.arrays, note.values, strict=True):
            array[...] = values
        self._set_arrays(note.arrays)
        self.pending, self.marks = note.pending, note.marks
        self.layout = object()  # what is bound may have been left between two lines, too
        self.note = None

    def arrays(self) -> list[Array]:
        """Those of ARRAYS."""
        return [getattr(self, name) for name in ARRAYS]

    def _set_arrays(self, arrays: list[Array]) -> None:
        for name, array in zip(ARRAYS, arrays, strict=True):
            setattr(self, name, array)

    def _become(self, other: Journal) -> None:
        """Take over everything that changes from another state, which is not used any more."""
        self.caches, self.pending, self.marks = other.caches, other.pending, other.marks
        self._set_arrays(other.arrays())
        self.layout = object()
