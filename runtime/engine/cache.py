"""The key/value caches of one group of rows: one buffer per layer and part, bound as past and present at once.

Buffers hold `capacity` tokens and grow in blocks, never to the model's longest text by default. Knows nothing about
graphs: it is given names and geometry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..manifest import LayerCache

BLOCK = 256
BFLOAT16 = 16  # as ONNX numbers element types; NumPy has no such type


class KVCache:
    """Buffers of shape (rows, kv_heads, capacity, head_size) on `device`, named layer.part.

    layers: geometry by the layer's index. virtual: what the last `virtual_rows` rows (all without it) begin with,
    before their text: layer.part -> (kv_heads, V, head_size); the other rows have room there that they do not use.
    Caches in bfloat16, which NumPy has not, lose their content when they grow: whoever makes one reserves all at once.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerCache],
        rows: int,
        dtype: str = "float32",
        device: str = "cpu",
        virtual: Mapping[str, NDArray[Any]] | None = None,
        virtual_rows: int | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.rows = rows
        self.element_type: Any = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype).type
        self.dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
        self.device = device
        self.virtual = dict(virtual or {})
        self.virtual_rows = rows if virtual_rows is None else virtual_rows
        self.virtual_tokens = next((array.shape[1] for array in self.virtual.values()), 0)
        self.capacity = 0
        self._buffers: dict[str, onnxruntime.OrtValue] = {}

    def reserve(self, length: int) -> bool:
        """Make room for `length` tokens of text a row; returns whether the buffers moved (bindings are then stale)."""
        length += self.virtual_tokens
        if length <= self.capacity:
            return False
        capacity = -(-length // BLOCK) * BLOCK
        for name, layer in self._named_layers():
            if self.element_type == BFLOAT16:
                shape = (self.rows, layer.kv_heads, capacity, layer.head_size)
                self._buffers[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, BFLOAT16, self.device)
                continue
            grown = np.zeros((self.rows, layer.kv_heads, capacity, layer.head_size), self.dtype)
            if self.capacity:
                old = self._buffers.pop(name)  # its NumPy view does not keep it alive
                grown[:, :, : self.capacity] = old.numpy()
            elif self.virtual:
                grown[-self.virtual_rows :, :, : self.virtual_tokens] = self.virtual[name]
            self._buffers[name] = onnxruntime.OrtValue.ortvalue_from_numpy(grown, self.device)
        self.capacity = capacity
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        cells = sum(2 * layer.kv_heads * layer.head_size for layer in self.layers.values())
        return cells * self.rows * self.capacity * self.dtype.itemsize

    def bindings(self, row: int | None = None) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(layer.part, shape, address) of every buffer, or of one row of it, for binding as input and as output."""
        for name, layer in self._named_layers():
            row_shape = (layer.kv_heads, self.capacity, layer.head_size)
            address = self._buffers[name].data_ptr()
            if row is None:
                yield name, (self.rows, *row_shape), address
            else:
                yield name, (1, *row_shape), address + row * int(np.prod(row_shape)) * self.dtype.itemsize

    def _named_layers(self) -> Iterator[tuple[str, LayerCache]]:
        for index, layer in self.layers.items():
            for part in ("key", "value"):
                yield f"{index}.{part}", layer
