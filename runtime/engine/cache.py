"""The key/value caches of one group of rows: one buffer per layer and part, bound as past and present at once.

Buffers hold `capacity` tokens and grow in blocks, never to the model's longest text by default. Knows nothing about
graphs: it is given names and geometry, and a place that holds the buffers and copies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..errors import ArtifactError, PromptError
from ..manifest import LayerCache
from .place import WORD, Host, Place

Array = NDArray[Any]
BLOCK = 256
BFLOAT16 = 16  # as ONNX numbers element types; NumPy has no such type


class KVCache:
    """Buffers of shape (streams * batch, kv_heads, capacity, head_size) at `place`, named layer.part. Rows are stream
    by stream: the base's row of text 0, of text 1, ..., then the adapter's.

    layers: geometry by the layer's index. batch: texts. streams: rows that each text has here, 1 or 2. dtype: of the
    values, as the manifest spells it. virtual: what the last stream's rows begin with, before their text: layer.part ->
    (kv_heads, V, head_size); the other rows have room there that they do not use.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerCache],
        batch: int,
        streams: int = 1,
        dtype: str = "float32",
        place: Place | None = None,
        virtual: Mapping[str, Array] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.batch = batch
        self.streams = streams
        self.dtype = dtype
        self.element_type: Any = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type
        self.itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        self.place = place or Host()
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
        return cells * self.rows * self.capacity * self.itemsize

    def reserve(self, length: int) -> bool:
        """Make room for `length` tokens of text a row; returns whether the buffers moved (bindings are then stale)."""
        if not self.is_short_of(length):
            return False
        capacity = _in_blocks(length + self.virtual_tokens)
        rows = np.arange(self.rows)
        buffers: dict[str, onnxruntime.OrtValue] = {}
        for name, layer in self._named_layers():
            if self.capacity:
                buffers[name] = self.place.copied([self._buffers[name]], rows, self.capacity, capacity)
            else:
                buffers[name] = self.place.put(self._first_words(name, layer, capacity))
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

    def replace(self, text: int, other: KVCache, length: int) -> bool:
        """Copy the one text of another cache, `length` tokens of it, over one of this one's; returns whether buffers
        moved (bindings are then stale). There must be room for it."""
        rows = text + self.batch * np.arange(self.streams)
        buffers = {
            name: self.place.replaced(self._buffers[name], rows, other._buffers[name], length + self.virtual_tokens)
            for name, _ in self._named_layers()
        }
        moved = any(buffers[name] is not buffer for name, buffer in self._buffers.items())
        self._buffers = buffers
        return moved

    def content(self, length: int) -> dict[str, Array]:
        """layer.part -> (rows, kv_heads, places, bytes of a head) uint8, on the host: what `length` tokens of text and
        the virtual tokens take of each buffer."""
        places = length + self.virtual_tokens
        return {
            name: np.ascontiguousarray(self._buffers[name].numpy()[:, :, :places]).view(np.uint8)
            for name, _ in self._named_layers()
        }

    def content_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what `content` gives."""
        places = length + self.virtual_tokens
        return {
            name: (self.rows, layer.kv_heads, places, layer.head_size * self.itemsize)
            for name, layer in self._named_layers()
        }

    def fill(self, content: Mapping[str, Array], length: int) -> None:
        """Take what `content` gave of `length` tokens, instead of what is here. Raises ArtifactError for values that
        are not finite."""
        capacity, buffers = _in_blocks(length + self.virtual_tokens), {}
        for name, layer in self._named_layers():
            if not self._finite(content[name]):
                raise ArtifactError(f"the cache {name} has values that are not finite")
            words = self._first_words(name, layer, capacity)
            words[:, :, : length + self.virtual_tokens] = content[name].view(np.int64)
            buffers[name] = self.place.put(words)
        self._buffers, self.capacity = buffers, capacity

    def bindings(self, row: int | None = None) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(layer.part, shape, address) of every buffer, or of one row of it, for binding as input and as output."""
        for name, layer in self._named_layers():
            row_shape = (layer.kv_heads, self.capacity, layer.head_size)
            address = self._buffers[name].data_ptr()
            if row is None:
                yield name, (self.rows, *row_shape), address
            else:
                yield name, (1, *row_shape), address + row * int(np.prod(row_shape)) * self.itemsize

    def _copied(self, length: int, sources: Sequence[tuple[KVCache, Sequence[int]]]) -> KVCache:
        """The chosen texts of several caches of this form, one after the other."""
        sources = [(source, texts) for source, texts in sources if len(texts)]
        made = self._like(sum(len(texts) for _, texts in sources))
        if not sources or length == 0:
            return made  # without buffers, as a new one
        capacity, first, rows = _in_blocks(length + self.virtual_tokens), 0, []
        for source, texts in sources:
            # By stream: where this cache's rows are among those of all of them.
            rows.append(first + np.arange(source.rows).reshape(self.streams, source.batch)[:, list(texts)])
            first += source.rows
        wanted = np.concatenate(rows, axis=1).reshape(-1)
        filled = [source._filled() for source, _ in sources]
        for name, _ in self._named_layers():
            buffers = [source._buffers[name] for source in filled]
            made._buffers[name] = self.place.copied(buffers, wanted, length + self.virtual_tokens, capacity)
        made.capacity = capacity
        return made

    def _like(self, batch: int) -> KVCache:
        """A new cache of this form."""
        return KVCache(self.layers, batch, self.streams, self.dtype, self.place, self.virtual)

    def _filled(self) -> KVCache:
        """This cache, or one with buffers if it has none yet."""
        if self.capacity:
            return self
        made = self._like(self.batch)
        made.reserve(1)
        return made

    def _form(self) -> tuple[object, ...]:
        return self.layers, self.streams, self.dtype, self.place.name, self.virtual_tokens

    def _first_words(self, name: str, layer: LayerCache, capacity: int) -> Array:
        """What a buffer begins with: zeros, which any type has, and virtual tokens."""
        words = np.zeros((self.rows, layer.kv_heads, capacity, layer.head_size * self.itemsize // WORD), np.int64)
        if self.virtual:
            values = words.view(np.uint16 if self.dtype == "bfloat16" else self.dtype)
            first = self.virtual[name]
            values[-self.batch :, :, : self.virtual_tokens] = _bfloat16(first) if self.dtype == "bfloat16" else first
        return words

    def _finite(self, content: Array) -> bool:
        if self.dtype == "bfloat16":
            return bool((content.view(np.uint16) & 0x7F80 != 0x7F80).all())
        return self.dtype == "int8" or bool(np.isfinite(content.view(self.dtype)).all())

    def _named_layers(self) -> Iterator[tuple[str, LayerCache]]:
        for index, layer in self.layers.items():
            for part in ("key", "value"):
                yield f"{index}.{part}", layer


def _bfloat16(values: Array) -> Array:
    """The bits of float32 values as bfloat16 has them, rounded to the nearest and to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _in_blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
