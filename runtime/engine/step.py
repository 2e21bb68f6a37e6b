"""The bound form of one decode step, and the form that a CUDA graph can replay."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .loaded_graph import LoadedGraph
from .marks import Mark
from .state import DecodeState, StepOutput

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
        self.outputs: dict[str, Array] = {"logits": np.zeros((batch, 1, graph.manifest.vocab_size), np.float32)}
        if graph.siamese:
            self.outputs["gate_mean"] = np.zeros((batch, 1), np.float32)
            self.outputs["hidden_base"] = np.zeros((batch, 1, width), np.float32)
            self.outputs["hidden_adapter"] = np.zeros((batch, 1, width), np.float32)
        for name, array in self.inputs.items():
            if name in graph.input_names:
                self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, array in self.outputs.items():
            self.binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        graph.bind_caches(self.binding, state)
        self.options: onnxruntime.RunOptions | None = None

    def step(self, state: DecodeState, tokens: Array) -> StepOutput:
        """Feed one token (B,) int64 per row, and count it in."""
        inputs = self.inputs
        inputs["input_ids"][:, 0] = tokens
        inputs["position_ids"][:, 0] = state.lengths
        inputs["seqlens_k"][:] = state.lengths
        inputs["total_sequence_length"][...] = state.lengths.max() + 1
        self.run()
        logits = self.outputs["logits"][:, 0].copy()
        gates = self.outputs["gate_mean"][:, 0].copy() if self.graph.siamese else None
        self._count(state)
        return StepOutput(logits, gates)

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


class GraphDecodeBinding(DecodeBinding):
    """The same step with everything in fixed places on the device, for a CUDA graph, which onnxruntime captures when it
    first runs (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#cuda-graph).

    What is on the host is baked into the graph, so the total length is the caches' capacity; attention goes by each
    row's own length.
    """

    def __init__(self, graph: LoadedGraph, state: DecodeState) -> None:
        super().__init__(graph, state)
        place = (graph.device, 0)
        self.room = min(cache.capacity - cache.virtual_tokens for cache in state.caches.values())
        self.sent = {name: array.copy() for name, array in self.inputs.items() if name in graph.input_names}
        self.values: dict[str, onnxruntime.OrtValue] = {}
        for name, array in self.sent.items():
            if name == "total_sequence_length":
                array[...] = self.room
                self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
            else:
                self.values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array, *place)
                self.binding.bind_ortvalue_input(name, self.values[name])
        self.results = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, *place)
            for name, array in self.outputs.items()
        }
        for name, value in self.results.items():
            self.binding.bind_ortvalue_output(name, value)
        self.options = onnxruntime.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", str(next(_graph_ids)))

    def run(self) -> None:
        """Compute `outputs` from `inputs`: what has changed is copied to the device, results are copied back."""
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
