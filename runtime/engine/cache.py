"""The key/value caches of one group of rows: one buffer per layer and part, bound as past and present at once.

Buffers hold `capacity` tokens and grow in blocks, never to the model's longest text by default. Knows nothing about
graphs: it is given names and geometry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..errors import PromptError
from ..manifest import LayerCache

Array = NDArray[Any]
BLOCK = 256
BFLOAT16 = 16  # as ONNX numbers element types; NumPy has no such type


class KVCache:
    """Buffers of shape (streams * batch, kv_heads, capacity, head_size) on `device`, named layer.part. Rows are stream
    by stream: the base's row of text 0, of text 1, ..., then the adapter's.

    layers: geometry by the layer's index. batch: texts. streams: rows that each text has here, 1 or 2. virtual: what
    the last stream's rows begin with, before their text: layer.part -> (kv_heads, V, head_size); the other rows have
    room there that they do not use. NumPy has no bfloat16, so such caches cannot be copied: reserve all of the room at
    once; `take` and `join` raise PromptError.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerCache],
        batch: int,
        streams: int = 1,
        dtype: str = "float32",
        device: str = "cpu",
        virtual: Mapping[str, Array] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.batch = batch
        self.streams = streams
        self.element_type: Any = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type
        self.dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        self.device = device
        self.virtual = dict(virtual or {})
        self.virtual_tokens = next((array.shape[1] for array in self.virtual.values()), 0)
        self.capacity = 0
        self._buffers: dict[str, onnxruntime.OrtValue] = {}

    @property
    def rows(self) -> int:
        """Rows of every buffer."""
        return self.streams * self.batch

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        cells = sum(2 * layer.kv_heads * layer.head_size for layer in self.layers.values())
        return cells * self.rows * self.capacity * self.dtype.itemsize

    def reserve(self, length: int) -> bool:
        """Make room for `length` tokens of text a row; returns whether the buffers moved (bindings are then stale)."""
        if not self.is_short_of(length):
            return False
        capacity = _in_blocks(length + self.virtual_tokens)
        buffers: dict[str, onnxruntime.OrtValue] = {}
        for name, layer in self._named_layers():
            if self.element_type == BFLOAT16:
                shape = (self.rows, layer.kv_heads, capacity, layer.head_size)
                buffers[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, self.device)
                continue
            grown = self._zeros(layer, capacity)
            if self.capacity:
                old = self._buffers[name]  # its NumPy view does not keep it alive
                grown[:, :, : self.capacity] = old.numpy()
            elif self.virtual:
                grown[-self.batch :, :, : self.virtual_tokens] = self.virtual[name]
            buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(grown, self.device)
        self._buffers, self.capacity = buffers, capacity  # all at once: memory may run out on the way
        return True

    def is_short_of(self, length: int) -> bool:
        """Whether there is no room for `length` tokens of text a row."""
        return length + self.virtual_tokens > self.capacity

    def take(self, texts: Sequence[int], length: int) -> KVCache:
        """A separate cache with copies of some texts' rows, in this order, and room for `length` tokens of text."""
        return self._copied(length, [(self, texts)])

    def join(self, other: KVCache, length: int) -> KVCache:
        """A cache with the texts of both, the other's last, and room for `length` tokens of text. Raises PromptError
        if the other's geometry is different."""
        if self._form() != other._form():
            raise PromptError("states of different artifacts, or on different devices, cannot be joined")
        return self._copied(length, [(self, range(self.batch)), (other, range(other.batch))])

    def bindings(self, row: int | None = None) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(layer.part, shape, address) of every buffer, or of one row of it, for binding as input and as output."""
        for name, layer in self._named_layers():
            row_shape = (layer.kv_heads, self.capacity, layer.head_size)
            address = self._buffers[name].data_ptr()
            if row is None:
                yield name, (self.rows, *row_shape), address
            else:
                yield name, (1, *row_shape), address + row * int(np.prod(row_shape)) * self.dtype.itemsize

    def _copied(self, length: int, sources: Sequence[tuple[KVCache, Sequence[int]]]) -> KVCache:
        """The chosen texts of several caches of this form, one after the other."""
        if self.element_type == BFLOAT16:
            raise PromptError("rows of bfloat16 caches cannot be copied: NumPy has no bfloat16")
        batch = sum(len(texts) for _, texts in sources)
        made = KVCache(self.layers, batch, self.streams, self.dtype.name, self.device, self.virtual)
        if batch == 0 or length == 0:
            return made  # without buffers, as a new one
        made.capacity = _in_blocks(length + self.virtual_tokens)
        for name, layer in self._named_layers():
            buffer = made._zeros(layer, made.capacity)
            by_stream = buffer.reshape(self.streams, batch, *buffer.shape[1:])
            first = 0
            for source, texts in sources:
                to = by_stream[:, first : first + len(texts)]
                first += len(texts)
                used = min(source.capacity, made.capacity)
                if used == 0 or not len(texts):
                    if self.virtual:
                        to[-1, :, :, : self.virtual_tokens] = self.virtual[name]
                    continue
                value = source._buffers[name]
                array = value.numpy()
                array = array.reshape(self.streams, source.batch, *array.shape[1:])
                to[:, :, :, :used] = array[:, list(texts), :, :used]
            made._buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(buffer, self.device)
        return made

    def _form(self) -> tuple[object, ...]:
        return self.layers, self.streams, self.element_type, self.device, self.virtual_tokens

    def _zeros(self, layer: LayerCache, capacity: int) -> Array:
        return np.zeros((self.rows, layer.kv_heads, capacity, layer.head_size), self.dtype)

    def _named_layers(self) -> Iterator[tuple[str, LayerCache]]:
        for index, layer in self.layers.items():
            for part in ("key", "value"):
                yield f"{index}.{part}", layer


def _in_blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
