"""The bound form of one decode step: over the host's memory, and over a device's, where a CUDA graph can replay it."""

from __future__ import annotations

import weakref
from itertools import count
from typing import Any, TypeVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .device import Device, Pack, StepLogits
from .loaded_graph import LoadedGraph
from .picks import Picks, check_sound
from .place import HostLogits, Logits
from .state import DecodeState

Array = NDArray[Any]
Output = TypeVar("Output")
_graph_ids = count(1)


class DecodeBinding:
    """One decode step, bound once: small inputs and outputs are written in place, nothing is allocated per step.

    It refers to the state's arrays and caches and neither to the state nor to the graph, so that both are freed as soon
    as nobody else refers to them. memories: whose logits the step gives, see `picks.Picks`. layout: the state's when it
    was bound; with another one the binding is stale.
    """

    def __init__(self, graph: LoadedGraph, state: DecodeState, memories: tuple[int, ...]) -> None:
        self.layout = state.layout
        self.memories = memories
        batch, width = state.batch, graph.manifest.hidden_size
        wanted = batch, len(memories)
        self.binding = graph.onnx.io_binding()
        self.inputs: dict[str, Array] = {
            "input_ids": np.zeros((batch, 1), np.int64),
            "position_ids": np.zeros((batch, 1), np.int64),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "query_seqlens": np.ones(batch, np.int32),
            "logit_positions": np.zeros(wanted, np.int64),
            "query_mask": np.zeros((batch, 1), np.float32),
            "past_query_sum": state.query_sum,
            "past_query_count": state.query_count,
            "memory_bias": np.zeros(wanted if graph.manifest.by_memory else batch, np.float32),
            "memory": np.tile(memories, (batch, 1)),
        }
        self.outputs: dict[str, Array] = {}
        if graph.siamese:
            self.outputs["gate_mean"] = np.zeros(wanted, np.float32)
            self.outputs["hidden_base"] = np.zeros((*wanted, width), np.float32)
            self.outputs["hidden_adapter"] = np.zeros((*wanted, width), np.float32)
        self.options: onnxruntime.RunOptions | None = None
        self.logits = self._bind_arrays(graph, (*wanted, graph.manifest.vocab_size))
        graph.bind_caches(self.binding, state)

    def _bind_arrays(self, graph: LoadedGraph, shape: tuple[int, ...]) -> Logits:
        """Bind `inputs`, `outputs` and logits of this shape; returns the logits."""
        logits = np.zeros(shape, np.float32)
        for name, array in self.inputs.items():
            if name in graph.input_names:
                self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, array in (*self.outputs.items(), ("logits", logits)):
            self.binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        return HostLogits(logits.reshape(-1, shape[-1]))

    def step(self, graph: LoadedGraph, state: DecodeState, tokens: Array, picks: Picks[Output]) -> Output:
        """Feed one token (B,) int64 per row, and count it in. Returns what is picked from the logits that follow, with
        the gate's mean (B,). Raises ArtifactError for logits that are no numbers."""
        inputs = self.inputs
        inputs["input_ids"][:, 0] = tokens
        inputs["position_ids"][:, 0] = state.lengths
        inputs["seqlens_k"][:] = state.lengths
        inputs["total_sequence_length"][...] = state.lengths.max() + 1
        inputs["memory_bias"].T[:] = state.memory_bias
        self.run(graph)
        columns, sound = picks.pick(self.logits)
        check_sound(sound, state.lengths + 1)
        self.fetch()
        gates = self.outputs["gate_mean"][:, 0].copy() if self.outputs else None
        self._count(state)
        return picks.output(columns, gates)

    def _count(self, state: DecodeState) -> None:
        """Count the tokens in that were fed."""
        state.lengths += 1
        if not self.outputs:  # of a graph with one stream
            return
        state.reply_sum[:, 0] += self.outputs["hidden_base"][:, 0]
        state.reply_sum[:, 1] += self.outputs["hidden_adapter"][:, 0]
        state.reply_count += 1
        if state.gate_reads_query:
            _mark(state)

    def fits(self, state: DecodeState, memories: tuple[int, ...]) -> bool:
        """Whether this is still the step of a state that gives these memories' logits: its caches and the arrays that
        the graph reads are the same."""
        return (
            self.layout is state.layout
            and self.memories == memories
            and self.inputs["past_query_sum"] is state.query_sum
            and self.inputs["past_query_count"] is state.query_count
        )

    def run(self, graph: LoadedGraph) -> None:
        """Compute the outputs from the inputs."""
        graph.run(self.binding, self.options)

    def fetch(self) -> None:
        """Bring `outputs` to the host, where they are already."""


class DeviceDecodeBinding(DecodeBinding):
    """The same step with everything in fixed places on a device; what goes to the host and back is a few numbers a row.

    A CUDA graph, which onnxruntime captures when the step first runs
    (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#cuda-graph), keeps what it found on the
    host. The total length is then the caches' capacity; attention goes by each row's own length.
    """

    CHANGING = ("input_ids", "position_ids", "seqlens_k")

    def __init__(self, graph: LoadedGraph, state: DecodeState, memories: tuple[int, ...]) -> None:
        super().__init__(graph, state, memories)
        self.room = min(cache.capacity - cache.virtual_tokens for cache in state.caches.values())

    def _bind_arrays(self, graph: LoadedGraph, shape: tuple[int, ...]) -> Logits:
        device = graph.place
        assert isinstance(device, Device)
        on_device = {
            name: array
            for name, array in self.inputs.items()
            if name in graph.input_names and name != "total_sequence_length"
        }
        self.changing = Pack(device, {name: on_device.pop(name) for name in self.CHANGING if name in on_device})
        self.inputs |= self.changing.arrays
        self.lasting = Pack(device, on_device)
        self.total = self.inputs["total_sequence_length"]
        self.binding.bind_ortvalue_input("total_sequence_length", onnxruntime.OrtValue.ortvalue_from_numpy(self.total))
        for pack in (self.changing, self.lasting):
            for name in pack.arrays:
                self.binding.bind_input(name, *pack.place(name))
        self.results = Pack(device, self.outputs | StepLogits.joining(shape[0] * shape[1]))
        for name in self.outputs:
            self.binding.bind_output(name, *self.results.place(name))
            self.outputs[name] = self.results.arrays[name]
        logits = device.empty(shape, np.float32)
        self.binding.bind_ortvalue_output("logits", logits)
        if graph.cuda_graph:
            number = next(_graph_ids)
            self.options = onnxruntime.RunOptions()
            self.options.add_run_config_entry("gpu_graph_id", str(number))
            weakref.finalize(self, _release, graph.onnx, number).atexit = False
        return StepLogits(device, logits, shape[-1], self.results)

    def run(self, graph: LoadedGraph) -> None:
        """Copy the inputs to the device, those that last only if they have changed, and compute the outputs there."""
        if graph.cuda_graph:
            self.total[...] = self.room
        self.changing.send()
        changed = [name for name, sent in self.lasting.arrays.items() if not np.array_equal(sent, self.inputs[name])]
        if changed:
            for name in changed:
                self.lasting.arrays[name][...] = self.inputs[name]
            self.lasting.send()
        self.results.outdated = True
        super().run(graph)

    def fetch(self) -> None:
        """Bring `outputs` to the host."""
        self.results.fetch()


def _release(onnx: onnxruntime.InferenceSession, number: int) -> None:
    """Free a captured graph. Versions of onnxruntime that cannot keep it as long as the session."""
    if hasattr(onnx, "release_captured_graph"):
        onnx.release_captured_graph(number)


def _mark(state: DecodeState) -> None:
    """Record the sums of every row, so that the state can be cut back to here."""
    sums, counts = state.reply_sum.copy(), state.reply_count.copy()
    for row, marks in enumerate(state.marks):
        marks.add_decoded(int(state.lengths[row]), sums[row], counts[row])
