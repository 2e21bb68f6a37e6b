"""The bound form of one decode step: over the host's memory, and over a device's, where a CUDA graph can replay it."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .device import Device
from .loaded_graph import LoadedGraph
from .marks import Mark
from .place import HostLogits, Logits
from .prefill import Pick
from .state import DecodeState

Array = NDArray[Any]
_graph_ids = count(1)


class DecodeBinding:
    """One decode step, bound once: small inputs and outputs are written in place, nothing is allocated per step.

    It refers to the state's arrays and caches and not to the state, so that an unused state is freed at once.
    layout: the state's when it was bound; with another one the binding is stale.
    """

    def __init__(self, graph: LoadedGraph, state: DecodeState) -> None:
        self.graph = graph
        self.layout = state.layout
        batch, width = state.batch, graph.manifest.hidden_size
        self.binding = graph.onnx.io_binding()
        self.inputs: dict[str, Array] = {
            "input_ids": np.zeros((batch, 1), np.int64),
            "position_ids": np.zeros((batch, 1), np.int64),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "query_seqlens": np.ones(batch, np.int32),
            "logit_positions": np.zeros((batch, 1), np.int64),
            "query_mask": np.zeros((batch, 1), np.float32),
            "past_query_sum": state.query_sum,
            "past_query_count": state.query_count,
            "memory_bias": state.memory_bias,
        }
        self.outputs: dict[str, Array] = {}
        if graph.siamese:
            self.outputs["gate_mean"] = np.zeros((batch, 1), np.float32)
            self.outputs["hidden_base"] = np.zeros((batch, 1, width), np.float32)
            self.outputs["hidden_adapter"] = np.zeros((batch, 1, width), np.float32)
        for name, array in self.inputs.items():
            if name in graph.input_names:
                self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, array in self.outputs.items():
            self.binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        self.logits = self._bind_logits((batch, 1, graph.manifest.vocab_size))
        graph.bind_caches(self.binding, state)
        self.options: onnxruntime.RunOptions | None = None

    def _bind_logits(self, shape: tuple[int, ...]) -> Logits:
        array = np.zeros(shape, np.float32)
        self.binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(array))
        return HostLogits(array[:, 0])

    def step(self, state: DecodeState, tokens: Array, pick: Pick) -> tuple[tuple[Array, ...], Array | None]:
        """Feed one token (B,) int64 per row, and count it in. Returns what was picked from the logits that follow, and
        the gate's mean (B,)."""
        inputs = self.inputs
        inputs["input_ids"][:, 0] = tokens
        inputs["position_ids"][:, 0] = state.lengths
        inputs["seqlens_k"][:] = state.lengths
        inputs["total_sequence_length"][...] = state.lengths.max() + 1
        self.run()
        picked = pick(self.logits)
        gates = self.outputs["gate_mean"][:, 0].copy() if self.graph.siamese else None
        self._count(state)
        return picked, gates

    def _count(self, state: DecodeState) -> None:
        """Count the tokens in that were fed."""
        state.lengths += 1
        if not self.graph.siamese:
            return
        state.reply_sum[:, 0] += self.outputs["hidden_base"][:, 0]
        state.reply_sum[:, 1] += self.outputs["hidden_adapter"][:, 0]
        state.reply_count += 1
        if state.gate_reads_query:
            _mark(state)

    def fits(self, state: DecodeState) -> bool:
        """Whether this is still the step of a state: its caches and the arrays that the graph reads are the same."""
        names = ("past_query_sum", "past_query_count", "memory_bias")
        arrays = (state.query_sum, state.query_count, state.memory_bias)
        return self.layout is state.layout and all(
            self.inputs[name] is array for name, array in zip(names, arrays, strict=True)
        )

    def run(self) -> None:
        """Compute `outputs` from `inputs`."""
        self.graph.run(self.binding, self.options)


class DeviceDecodeBinding(DecodeBinding):
    """The same step with everything in fixed places on a device; what goes to the host and back is a few numbers a row.

    A CUDA graph, which onnxruntime captures when the step first runs
    (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#cuda-graph), keeps what it found on the
    host. The total length is then the caches' capacity; attention goes by each row's own length.
    """

    def __init__(self, graph: LoadedGraph, state: DecodeState) -> None:
        assert isinstance(graph.place, Device)
        self.device = graph.place
        super().__init__(graph, state)
        self.room = min(cache.capacity - cache.virtual_tokens for cache in state.caches.values())
        self.sent = {name: array.copy() for name, array in self.inputs.items() if name in graph.input_names}
        self.values: dict[str, onnxruntime.OrtValue] = {}
        for name, array in self.sent.items():
            if name == "total_sequence_length":
                array[...] = self.room
                self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
            else:
                self.values[name] = self.device.put(array)
                self.binding.bind_ortvalue_input(name, self.values[name])
        self.results = {name: self.device.empty(array.shape, np.float32) for name, array in self.outputs.items()}
        for name, value in self.results.items():
            self.binding.bind_ortvalue_output(name, value)
        if graph.cuda_graph:
            self.options = onnxruntime.RunOptions()
            self.options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))

    def _bind_logits(self, shape: tuple[int, ...]) -> Logits:
        value = self.device.empty(shape, np.float32)
        self.binding.bind_ortvalue_output("logits", value)
        return self.device.logits(value, shape[-1])

    def run(self) -> None:
        """Compute `outputs` from `inputs`: what has changed is copied to the device, results are copied back."""
        if not self.graph.cuda_graph:
            self.sent["total_sequence_length"][...] = self.inputs["total_sequence_length"]
        for name, value in self.values.items():
            if not np.array_equal(self.sent[name], self.inputs[name]):
                self.sent[name][...] = self.inputs[name]
                value.update_inplace(self.sent[name])
        super().run()
        for name, value in self.results.items():
            self.outputs[name][...] = value.numpy()


def _mark(state: DecodeState) -> None:
    """Record the sums of every row, so that the state can be cut back to here."""
    sums, counts = state.reply_sum.copy(), state.reply_count.copy()
    for row, marks in enumerate(state.marks):
        query = marks.read[-1]
        length = int(state.lengths[row])
        marks.decoded.append(Mark(length, query.query_sum, query.query_count, sums[row], counts[row]))
