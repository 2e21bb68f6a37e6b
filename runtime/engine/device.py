"""Caches and logits in the memory of an execution provider's device, where onnxruntime's own operators work on them.

onnxruntime lets Python copy between a device and the host and nothing else, so that copying rows on the device, or
choosing the likeliest token, is a small graph of its own: `device_graphs/`, written by scripts/write_device_graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .place import WORD
from .providers import run_bound

Array = NDArray[Any]
GRAPHS = Path(__file__).parent / "device_graphs"


class Device:
    """A device's memory; a `Place`. name: as onnxruntime calls it. open_graph: a session on its provider."""

    def __init__(self, name: str, open_graph: Callable[[Path], onnxruntime.InferenceSession]) -> None:
        self.name = name
        self._open = open_graph
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def put(self, words: Array) -> onnxruntime.OrtValue:
        """A buffer on the device."""
        made = self.empty(words.shape, words.dtype.type)
        made.update_inplace(words)
        return made

    def copied(
        self, buffers: Sequence[onnxruntime.OrtValue], rows: Array, used: int, capacity: int
    ) -> onnxruntime.OrtValue:
        """See `Place`; nothing passes through the host but the numbers of the rows."""
        parts: list[onnxruntime.OrtValue] = []
        places: list[Array] = []
        first = 0
        for buffer in buffers:
            count = buffer.shape()[0]
            here = np.flatnonzero((rows >= first) & (rows < first + count))
            if len(here):
                parts.append(self._cut(buffer, rows[here] - first, used, capacity))
                places.append(here)
            first += count
        made = parts[0]
        order = np.argsort(np.concatenate(places))
        for number, part in enumerate(parts[1:], 2):
            made = self._joined(made, part, order if number == len(parts) else None)
        return made

    def replaced(
        self, buffer: onnxruntime.OrtValue, rows: Array, source: onnxruntime.OrtValue, used: int
    ) -> onnxruntime.OrtValue:
        """See `Place`; a new buffer: all of it is copied."""
        count, _, capacity, _ = buffer.shape()
        wanted = np.arange(count)
        wanted[rows] = count + np.arange(len(rows))
        return self.copied([buffer, source], wanted, capacity, capacity)

    def logits(self, value: onnxruntime.OrtValue, vocab: int) -> DeviceLogits:
        """See `Place`."""
        return DeviceLogits(self, value, vocab)

    def empty(self, shape: Sequence[int], dtype: type[np.generic]) -> onnxruntime.OrtValue:
        """A value on the device whose content is unspecified."""
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self.name, 0)

    def bound(self, graph: str) -> tuple[onnxruntime.InferenceSession, onnxruntime.IOBinding]:
        """One of `device_graphs`, and a new binding for it."""
        if graph not in self._sessions:
            self._sessions[graph] = self._open(GRAPHS / f"{graph}.onnx")
        session = self._sessions[graph]
        return session, session.io_binding()

    def _cut(self, buffer: onnxruntime.OrtValue, rows: Array, used: int, capacity: int) -> onnxruntime.OrtValue:
        _, heads, length, words = buffer.shape()
        used = min(used, length)
        made = self.empty((len(rows), heads, capacity, words), np.int64)
        session, binding = self.bound("copy_rows")
        binding.bind_ortvalue_input("buffer", buffer)
        binding.bind_cpu_input("rows", rows.astype(np.int64))
        binding.bind_cpu_input("used", np.array([used]))
        binding.bind_cpu_input("room", np.array([len(rows), heads, capacity - used, words]))
        binding.bind_ortvalue_output("copied", made)
        run_bound(session, binding)
        return made

    def _joined(
        self, first: onnxruntime.OrtValue, second: onnxruntime.OrtValue, order: Array | None
    ) -> onnxruntime.OrtValue:
        count = first.shape()[0] + second.shape()[0]
        made = self.empty((count, *first.shape()[1:]), np.int64)
        session, binding = self.bound("join_rows")
        binding.bind_ortvalue_input("first", first)
        binding.bind_ortvalue_input("second", second)
        binding.bind_cpu_input("rows", np.arange(count) if order is None else order)
        binding.bind_ortvalue_output("joined", made)
        run_bound(session, binding)
        return made


class Pack:
    """Small arrays side by side in one buffer on a device and one on the host, so that one copy moves them all.

    arrays: by name, on the host. outdated: whether the device has newer ones.
    """

    def __init__(self, device: Device, arrays: Mapping[str, Array]) -> None:
        self.device = device
        sizes = [-(-array.nbytes // WORD) for array in arrays.values()]
        starts = np.cumsum([0, *sizes])
        self._host = np.zeros(max(1, starts[-1]), np.int64)
        self._starts = dict(zip(arrays, starts[:-1].tolist(), strict=True))
        self.arrays: dict[str, Array] = {}
        for (name, array), start, size in zip(arrays.items(), starts, sizes, strict=False):
            words = self._host[start : start + size]
            self.arrays[name] = words.view(array.dtype)[: array.size].reshape(array.shape)
            self.arrays[name][...] = array
        self._there = device.put(self._host)
        self.outdated = False

    def place(self, name: str) -> tuple[str, int, type[np.generic], tuple[int, ...], int]:
        """Where an array is on the device, as `bind_input` and `bind_output` take it."""
        array = self.arrays[name]
        address = self._there.data_ptr() + WORD * self._starts[name]
        return self.device.name, 0, array.dtype.type, array.shape, address

    def send(self) -> None:
        """Copy them to the device."""
        self._there.update_inplace(self._host)

    def fetch(self) -> None:
        """Copy them to the host, if they are outdated there."""
        if self.outdated:
            self._host[...] = self._there.numpy()
            self.outdated = False


class DeviceLogits:
    """Logits on a device, of which only what is asked for comes to the host. See `Logits`."""

    def __init__(self, device: Device, value: onnxruntime.OrtValue, vocab: int) -> None:
        self.device = device
        self.value = value
        self.vocab = vocab

    def whole(self) -> Array:
        """See `Logits`."""
        found: Array = self.value.numpy().reshape(-1, self.vocab).copy()  # a view where the device is the host
        return found

    def likeliest(self, k: int) -> tuple[Array, Array, Array]:
        """See `Logits`. The order of equally likely tokens is the provider's."""
        if k == 1:
            ids, values, logarithm = self._run("likeliest", ("ids", "values", "logarithm"))
        else:
            ids, values, logarithm = self._run("top", ("ids", "values", "logarithm"), k=np.array([k]))
        return ids, values, np.isfinite(logarithm[:, 0])

    def log_normalizer(self) -> Array:
        """See `Logits`; float32."""
        (values,) = self._run("log_normalizer", ("values",))
        return values[:, 0]

    def of_tokens(self, ids: Array) -> Array:
        """See `Logits`."""
        (values,) = self._run("of_tokens", ("values",), ids=ids.astype(np.int64)[:, None])
        return values[:, 0]

    def _run(self, graph: str, outputs: Sequence[str], **inputs: Array) -> list[Array]:
        session, binding = self.device.bound(graph)
        rows = int(np.prod(self.value.shape())) // self.vocab
        binding.bind_input("logits", self.device.name, 0, np.float32, [rows, self.vocab], self.value.data_ptr())
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name in outputs:
            binding.bind_output(name, "cpu")
        run_bound(session, binding)
        return [value.numpy() for value in binding.get_outputs()]


class StepLogits(DeviceLogits):
    """The logits of a step that is bound once, and whose other results are in a pack: the likeliest token's id, logit
    and logarithm of its probability, (rows, 1), join them there, so that all come to the host in one copy."""

    TYPES: ClassVar = {"ids": np.int64, "values": np.float32, "logarithm": np.float32}

    @classmethod
    def joining(cls, rows: int) -> dict[str, Array]:
        """What joins a step's other results there."""
        return {name: np.zeros((rows, 1), dtype) for name, dtype in cls.TYPES.items()}

    def __init__(self, device: Device, value: onnxruntime.OrtValue, vocab: int, results: Pack) -> None:
        super().__init__(device, value, vocab)
        self.results = results
        self._session, self._binding = device.bound("likeliest")
        rows = int(np.prod(value.shape())) // vocab
        self._binding.bind_input("logits", device.name, 0, np.float32, [rows, vocab], value.data_ptr())
        for name in self.TYPES:
            self._binding.bind_output(name, *results.place(name))

    def likeliest(self, k: int) -> tuple[Array, Array, Array]:
        """See `DeviceLogits`."""
        if k != 1:
            return super().likeliest(k)
        run_bound(self._session, self._binding)
        self.results.fetch()
        ids, values, logarithm = (self.results.arrays[name].copy() for name in self.TYPES)
        return ids, values, np.isfinite(logarithm[:, 0])
