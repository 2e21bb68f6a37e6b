"""An artifact's graph: opening it, checking it against the manifest, and running steps of it over states.

Knows nothing about prompts: `session` says what is read when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ..checks import instance, integers, numbers, typed, whole_number
from ..errors import ArtifactError, PromptError, SettingsError, shown
from ..files import GRAPH
from ..folder import check_files
from ..manifest import read_manifest
from .cache import KVCache
from .device import Device
from .execution import Execution
from .marks import Marks
from .picks import BLEND
from .place import Host, Logits, Place
from .providers import ON_DEVICE, PROVIDERS, open_session, run_bound
from .signature import check_sections, check_signature
from .state import DecodeState
from .virtual_tokens import read_virtual_tokens

Array = NDArray[Any]
NO_GRAPH = -1
"""The `gpu_graph_id` of runs that are not captured as a CUDA graph."""
MOST_ROWS = 65536
"""More than any machine steps at once: so that a mistyped number takes no memory."""
OF_TWO_STREAMS = ("gate_mean", "hidden_base", "hidden_adapter", "present_query_sum", "present_query_count")
"""Outputs in the order of `TokenOutputs`, after the logits."""
QUERY_GATES = ("query_aware", "query_mixed")


class TokenOutputs(NamedTuple):
    """What a run over tokens gives, N positions of each row, each as often as there are memories. logits: (B * N,
    vocab), until the next run. gate_mean: (B, N); hidden_base and hidden_adapter: (B, N, d), the last hidden states;
    query_sum (B, 2, d) and query_count (B,): the query's state after it; None in a base-only graph."""

    logits: Logits
    gate_mean: Array | None
    hidden_base: Array | None
    hidden_adapter: Array | None
    query_sum: Array | None
    query_count: Array | None

    def hidden(self) -> Array | None:
        """(B, N, 2, d): of base and adapter, as the sums have them."""
        if self.hidden_base is None or self.hidden_adapter is None:
            return None
        return np.stack([self.hidden_base, self.hidden_adapter], axis=2)


class LoadedGraph:
    """An open graph.

    onnx: the onnxruntime session. place: where the caches live and logits stay. on_run: called with the seconds of
    every run of the graph, for whoever measures; None costs nothing.
    """

    def __init__(self, folder: Path | str, execution: Execution, profile: Path | None = None) -> None:
        """Open the artifact in `folder`. profile: as in `open_session`. Raises ArtifactError or ProviderError."""
        self.folder = typed("folder", folder, Path)
        self.execution = execution
        try:
            self.manifest = read_manifest(self.folder)
            check_files(self.folder, self.manifest, hashes=False)
        except OSError as error:
            raise ArtifactError(f"{self.folder} cannot be read: {error.strerror}") from error
        self.onnx = open_session(self.folder / GRAPH, execution, profile)
        check_signature(self.onnx, self.manifest)
        check_sections(self.onnx, self.manifest, edited=True)
        in_use = PROVIDERS[execution.provider] in self.onnx.get_providers()
        self.place: Place = _place(execution) if in_use else Host()
        self.cuda_graph = execution.cuda_graph and in_use
        self.virtual = read_virtual_tokens(self.folder, self.manifest)
        self.artifact = "+".join(entry.sha256 for _, entry in sorted(self.manifest.files.items()))
        self.input_names = {signature.name for signature in self.manifest.inputs}
        self.on_run: Callable[[float], None] | None = None

    @property
    def providers(self) -> list[str]:
        """The execution providers in use, as onnxruntime names them."""
        return list(self.onnx.get_providers())

    @property
    def on_device(self) -> bool:
        """Whether caches and logits are in the memory of the provider's own device."""
        return isinstance(self.place, Device)

    @property
    def siamese(self) -> bool:
        """Whether the artifact has two streams and a gate."""
        return self.manifest.gate_kind is not None

    def new_state(self, batch: int = 1, memory_bias: float | Sequence[float] = 0.0) -> DecodeState:
        """An empty state of `batch` rows. memory_bias: one value, or one per row. Raises SettingsError."""
        batch = whole_number("batch", batch, 1, MOST_ROWS)
        with np.errstate(over="ignore"):  # what float32 does not hold is as good as infinite
            bias = numbers("memory_bias", memory_bias, batch).astype(np.float32)
        width = self.manifest.hidden_size
        dtypes = {signature.name: signature.dtype for signature in self.manifest.inputs}
        return DecodeState(
            caches={
                group: KVCache(
                    layers,
                    batch,
                    2 if group == "both" else 1,
                    dtypes[f"past_key_values.{group}.{next(iter(layers))}.key"],
                    self.place,
                    self.virtual if group in ("both", "adapter") else None,
                )
                for group, layers in self.manifest.groups.items()
            },
            lengths=np.zeros(batch, np.int64),
            query_sum=np.zeros((batch, 2, width), np.float32),
            query_count=np.zeros(batch, np.float32),
            reply_sum=np.zeros((batch, 2, width), np.float32),
            reply_count=np.zeros(batch, np.float32),
            memory_bias=bias,
            pending=[None] * batch,
            marks=[Marks() for _ in range(batch)],
            artifact=self.artifact,
            gate_reads_query=self.manifest.gate_kind in QUERY_GATES,
        )

    def run(self, binding: onnxruntime.IOBinding, options: onnxruntime.RunOptions | None) -> None:
        """Run the graph on what is bound. Raises ProviderError where onnxruntime cannot."""
        start = time.perf_counter()
        run_bound(self.onnx, binding, options)
        if self.on_run is not None:
            self.on_run(time.perf_counter() - start)

    def run_tokens(
        self,
        state: DecodeState,
        input_ids: Array,
        query_mask: Array,
        row: int | None,
        every: bool = False,
        memories: tuple[int, ...] = BLEND,
    ) -> TokenOutputs:
        """One run over new tokens (B, S), right-padded, into every row of the state or into one; logits at each row's
        last new token, or at `every` one, of each of `memories` in turn. query_mask: (B, S), 1 at the tokens that
        belong to the query. The state's caches are written; its lengths and sums are not."""
        batch, sequence = input_ids.shape
        new = np.full(batch, sequence) if every else query_mask.sum(-1).astype(np.int64)
        asked = np.tile(np.arange(sequence), (batch, 1)) if every else np.maximum(new[:, None] - 1, 0)
        binding = self.bind_tokens(state, input_ids, query_mask, row, new, asked, memories)
        binding.bind_output("logits", self.place.name)
        names = OF_TWO_STREAMS if self.siamese else ()
        for name in names:
            binding.bind_output(name, "cpu")
        self.run(binding, self.run_options())
        logits, *numbers = binding.get_outputs()[-1 - len(names) :]  # in the order in which they were bound
        found = [np.asarray(value.numpy()) for value in numbers] if self.siamese else [None] * 5
        return TokenOutputs(self.place.logits(logits, self.manifest.vocab_size), *found)

    def run_options(self) -> onnxruntime.RunOptions:
        """Of a run that no CUDA graph captures."""
        options = onnxruntime.RunOptions()
        if self.cuda_graph:
            options.add_run_config_entry("gpu_graph_id", str(NO_GRAPH))
        return options

    def bind_tokens(
        self,
        state: DecodeState,
        input_ids: Array,
        query_mask: Array,
        row: int | None,
        new: Array,
        asked: Array,
        memories: tuple[int, ...] = BLEND,
    ) -> onnxruntime.IOBinding:
        """The inputs and caches of a run over new tokens, as `run_tokens` has them. new: (B,), how many of the tokens
        are each row's. asked: (B, N), the positions that get outputs, of each of `memories` in turn."""
        rows = slice(None) if row is None else slice(row, row + 1)
        sequence = input_ids.shape[1]
        lengths = state.lengths[rows]
        wanted = asked.repeat(len(memories), 1)
        bias = state.memory_bias[rows]
        self.reserve(state, int(lengths.max()) + sequence)  # padding needs room too
        positions = lengths[:, None] + np.arange(sequence)[None]
        feed = {
            "input_ids": input_ids,
            "position_ids": np.minimum(positions, self.manifest.context_length - 1),  # padding may lie past the end
            "seqlens_k": (lengths + new - 1).astype(np.int32),
            "total_sequence_length": np.array((lengths + new).max(), np.int32),
            "query_seqlens": new.astype(np.int32),
            "logit_positions": wanted,
            "query_mask": query_mask,
            "past_query_sum": state.query_sum[rows],
            "past_query_count": state.query_count[rows],
            "memory_bias": np.broadcast_to(bias[:, None], wanted.shape) if self.manifest.by_memory else bias,
            "memory": np.tile(np.array(memories), asked.shape),
        }
        binding = self.onnx.io_binding()
        for name in self.input_names & feed.keys():
            binding.bind_cpu_input(name, np.asarray(feed[name], order="C"))
        self.bind_caches(binding, state, row)
        return binding

    def bind_caches(self, binding: onnxruntime.IOBinding, state: DecodeState, row: int | None = None) -> None:
        """past and present are the same buffer: attention appends new keys to the old ones."""
        for group, cache in state.caches.items():
            for name, shape, address in cache.bindings(row):
                place = (self.place.name, 0, cache.element_type, shape, address)
                binding.bind_input(f"past_key_values.{group}.{name}", *place)
                binding.bind_output(f"present.{group}.{name}", *place)

    def reserve(self, state: DecodeState, length: int) -> None:
        """Make room for `length` tokens of every row. With a CUDA graph the room at least doubles, as every move of the
        caches needs a new one."""
        if not any(cache.is_short_of(length) for cache in state.caches.values()):
            return
        if self.cuda_graph:
            longest = self.manifest.context_length + self.manifest.padding
            length = max(length, min(2 * min(cache.capacity for cache in state.caches.values()), longest))
        state.layout = object()  # before the first one moves: the next may not get its memory
        for cache in state.caches.values():
            cache.reserve(length)

    def check_state(self, state: DecodeState) -> None:
        """Raise PromptError for a state of another artifact, without rows, or in another thread's step, and
        SettingsError for what is no state or has a bias that the graph cannot read."""
        instance("state", state, DecodeState)
        state.settle()
        if state.artifact != self.artifact:
            raise PromptError("the state is of another artifact; make one with this session's new_state")
        if state.batch == 0:
            raise PromptError("the state has no rows")
        bias = state.memory_bias
        if not isinstance(bias, np.ndarray) or bias.dtype != np.float32 or bias.shape != (state.batch,):
            raise SettingsError("memory_bias", bias, f"a state's must be a float32 array ({state.batch},)")

    def token_ids(self, values: Sequence[int] | Array) -> list[int]:
        """Token ids as Python's numbers. Raises PromptError for what is no sequence of whole numbers, or outside the
        vocabulary."""
        found = integers(values, "token id")
        if found and not 0 <= min(found) <= max(found) < self.manifest.vocab_size:
            outside = next(token for token in found if not 0 <= token < self.manifest.vocab_size)
            raise PromptError(f"token id {shown(outside)} is outside the vocabulary of {self.manifest.vocab_size}")
        return found

    def check_lengths(self, state: DecodeState, texts: Sequence[Sequence[int]]) -> None:
        """Raise PromptError for a text that does not fit into the context after its row."""
        for length, text in zip(state.lengths, texts, strict=True):
            if length + len(text) > self.manifest.context_length:
                raise PromptError(
                    f"the prompt has {length + len(text)} tokens; the model's context is {self.manifest.context_length}"
                )


def _place(execution: Execution) -> Place:
    """Where a provider has its memory."""
    if execution.provider not in ON_DEVICE:
        return Host()
    alone = replace(execution, threads=1, cuda_graph=False)
    return Device(ON_DEVICE[execution.provider], lambda graph: open_session(graph, alone))
