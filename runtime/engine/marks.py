"""Where a row can be cut back to: what the gate's query was at some of its earlier lengths.

The query is a sum over the prompt's tokens, so it cannot be taken apart again: it is recorded at the end of each
prefill chunk, before a prompt's last token, at the end of each reply and at the last decoded tokens.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RECENT = 64
"""Decoded tokens whose sums are kept: enough for what a speculation guesses at once."""
MOST_TOKENS = RECENT - 1
"""Tokens of a reply that are fed at once: with one more, the sums before the first of them would not be kept, and it
could not be taken back."""

Sums = NDArray[np.float32] | np.float32


class Mark(NamedTuple):
    """The sums of a row when it had `length` tokens: query_sum and reply_sum (2, d), the counts scalars."""

    length: int
    query_sum: Sums
    query_count: Any
    reply_sum: Sums
    reply_count: Any


class Marks:
    """The marks of one row, ascending by length."""

    def __init__(self) -> None:
        self.read: list[Mark] = []  # in prompts, and at the ends of replies
        self.decoded: deque[Mark] = deque(maxlen=RECENT)

    @property
    def lengths(self) -> list[int]:
        """Lengths that have a mark."""
        return [mark.length for mark in (*self.read, *self.decoded)]

    def at(self, length: int) -> Mark | None:
        """The mark of a length."""
        return next((mark for mark in (*self.read, *self.decoded) if mark.length == length), None)

    def add_read(self, mark: Mark) -> None:
        """Add a mark, unless there is one of its length."""
        if not any(known.length == mark.length for known in self.read):
            self.read.append(mark)

    def add_decoded(self, length: int, reply_sum: Sums, reply_count: Any) -> None:
        """Add the mark of a token of the reply, whose query is the last one that was read."""
        query = self.read[-1]
        self.decoded.append(Mark(length, query.query_sum, query.query_count, reply_sum, reply_count))

    def cut(self, length: int) -> None:
        """Forget what is beyond `length`."""
        self.read = [mark for mark in self.read if mark.length <= length]
        self.decoded = deque((mark for mark in self.decoded if mark.length <= length), maxlen=RECENT)

    def copy(self) -> Marks:
        """Marks for a copy of the row; the sums themselves are never changed."""
        made = Marks()
        made.read, made.decoded = list(self.read), self.decoded.copy()
        return made
