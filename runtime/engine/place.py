"""Where caches and logits are: what can be done with them there, and doing it in the host's memory, by NumPy.

Caches are handled as words of 8 bytes, (rows, heads, tokens, words), whatever type their values have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .likeliest import likeliest

Array = NDArray[Any]
WORD = 8
"""Bytes of a word."""


class Logits(Protocol):
    """Logits of a run, (rows, vocab) float32, where the run left them. They are gone with the next run."""

    def whole(self) -> Array:
        """A copy of all of them on the host."""
        ...

    def likeliest(self, k: int) -> tuple[Array, Array, Array]:
        """The k likeliest tokens of each row, the likeliest first: ids (rows, k) int64 and their logits; and (rows,)
        whether these are numbers: see `picks.Picked`."""
        ...

    def log_normalizer(self) -> Array:
        """(rows,): the logarithm of the sum of exp(logits) over the vocabulary; not finite where the logits are no
        numbers."""
        ...

    def of_tokens(self, ids: Array) -> Array:
        """(rows,): the logit of one token of each row. ids: (rows,) int64."""
        ...


class Place(Protocol):
    """A memory that onnxruntime knows by `name`."""

    @property
    def name(self) -> str: ...

    def put(self, words: Array) -> onnxruntime.OrtValue:
        """A buffer with these words, int64."""
        ...

    def copied(
        self, buffers: Sequence[onnxruntime.OrtValue], rows: Array, used: int, capacity: int
    ) -> onnxruntime.OrtValue:
        """A new buffer of `capacity` tokens: rows of some buffers, counted through from the first buffer's first, each
        cut to its first `used` tokens and followed by zeros."""
        ...

    def replaced(
        self, buffer: onnxruntime.OrtValue, rows: Array, source: onnxruntime.OrtValue, used: int
    ) -> onnxruntime.OrtValue:
        """A buffer, the same one where its memory can be written, in which the first `used` tokens of `rows` are those
        of the source's rows, one after the other."""
        ...

    def logits(self, value: onnxruntime.OrtValue, vocab: int) -> Logits:
        """The logits in `value`, (..., vocab) float32."""
        ...


class Host:
    """The host's memory."""

    name = "cpu"

    def put(self, words: Array) -> onnxruntime.OrtValue:
        """A buffer over the same memory."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(words)

    def copied(
        self, buffers: Sequence[onnxruntime.OrtValue], rows: Array, used: int, capacity: int
    ) -> onnxruntime.OrtValue:
        """See `Place`."""
        arrays: list[Array] = [buffer.numpy() for buffer in buffers]
        _, heads, _, words = arrays[0].shape
        made = np.zeros((len(rows), heads, capacity, words), np.int64)
        first = 0
        for array in arrays:
            length = min(used, array.shape[2])
            for index in np.flatnonzero((rows >= first) & (rows < first + len(array))):  # at once copies twice
                made[index, :, :length] = array[rows[index] - first, :, :length]
            first += len(array)
        return self.put(made)

    def replaced(
        self, buffer: onnxruntime.OrtValue, rows: Array, source: onnxruntime.OrtValue, used: int
    ) -> onnxruntime.OrtValue:
        """See `Place`."""
        array, new = buffer.numpy(), source.numpy()
        for index, row in enumerate(rows):
            array[row, :, :used] = new[index, :, :used]
        return buffer

    def logits(self, value: onnxruntime.OrtValue, vocab: int) -> HostLogits:
        """See `Place`."""
        return HostLogits(value.numpy().reshape(-1, vocab))


class HostLogits:
    """Logits in a NumPy array, (rows, vocab) float32. See `Logits`."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def whole(self) -> Array:
        """See `Logits`."""
        return self.array.copy()

    def likeliest(self, k: int) -> tuple[Array, Array, Array]:
        """See `Logits`. Of equally likely tokens the one with the lower id comes first."""
        ids, values = likeliest(self.array, k)
        return ids, values, np.isfinite(values.max(-1))  # NumPy takes "not a number" for the largest

    def log_normalizer(self) -> Array:
        """See `Logits`; float64."""
        table = self.array.astype(np.float64)
        largest = table.max(-1, keepdims=True)
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            table -= largest
        found: Array = np.log(np.exp(table, out=table).sum(-1)) + largest[:, 0]
        return found

    def of_tokens(self, ids: Array) -> Array:
        """See `Logits`."""
        found: Array = self.array[np.arange(len(ids)), ids]
        return found
