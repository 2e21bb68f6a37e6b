"""The tokens of one text so far, as processors see them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROOM = 256


class History:
    """A prompt and what was generated after it. Tokens are added at the end, and can be taken back."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt_length = len(prompt)
        self._length = len(prompt)
        self._buffer = np.empty(len(prompt) + _ROOM, np.int64)
        self._buffer[: len(prompt)] = prompt

    @property
    def ids(self) -> NDArray[np.int64]:
        """All of them, (N,): a view that holds until the next change."""
        return self._buffer[: self._length]

    @property
    def new(self) -> NDArray[np.int64]:
        """The generated ones alone, (M,): a view that holds until the next change."""
        return self._buffer[self.prompt_length : self._length]

    def append(self, token: int) -> None:
        """Add a generated token."""
        if self._length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty_like(self._buffer)])
        self._buffer[self._length] = token
        self._length += 1

    def take_back(self, count: int = 1) -> None:
        """Forget the last `count` generated tokens."""
        self._length = max(self.prompt_length, self._length - count)
