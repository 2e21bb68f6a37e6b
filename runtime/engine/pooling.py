"""One vector for each text: its last hidden states, pooled.

onnxruntime computes all outputs of a graph, logits too (`only_execute_path_to_fetches` is of its training builds:
https://github.com/microsoft/onnxruntime/issues/16013). They are of as few positions as the pooling needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError, SettingsError
from .loaded_graph import LoadedGraph
from .prefill import Piece, padded, plan_prefill
from .state import DecodeState

Array = NDArray[Any]
STREAMS = ("base", "adapter")


def check_states(graph: LoadedGraph, memory: str) -> None:
    """Raise SettingsError for a memory, one of `MEMORIES`, whose states the graph does not give."""
    if memory == "adapter" and not graph.siamese:
        raise SettingsError("memory", memory, "this artifact has the base memory alone")
    if memory == "blend" and graph.siamese and not graph.manifest.by_memory:
        version = graph.manifest.raw["format_version"]
        rule = f"this artifact is of format {version}, which does not give the blend's states; export it again"
        raise SettingsError("memory", memory, rule)


def pooled_states(graph: LoadedGraph, texts: Sequence[Sequence[int]], memory: str, pooling: str, chunk: int) -> Array:
    """(B, d) float32: of each of B texts of token ids, the last hidden states of a memory, pooled: "mean" over its
    tokens, or the "last" token's. The whole text is the gate's query. chunk: the most tokens of a text that are read at
    once. Raises ArtifactError for states that are not finite, ProviderError."""
    batched, padding = graph.manifest.batched_chunks, graph.manifest.padding
    pieces = list(plan_prefill(texts, chunk, padding, batched, starts_empty=not graph.virtual))
    state = graph.new_state(len(texts))
    graph.reserve(state, max(map(len, texts)))  # once for all pieces: growing copies the caches
    reader = _Reader(graph, state, memory, pooling)
    if reader.blends_all and state.gate_reads_query and not all(end for piece in pieces for end in piece.ends):
        before = _Reader(graph, graph.new_state(len(texts)), "base", pooling)  # the query is known at a text's end
        for piece in pieces:
            before.read(piece)
        state.query_sum, state.query_count = before.state.query_sum, before.state.query_count
        reader.query_is_known = True
    for piece in pieces:
        reader.read(piece)
    found = reader.pooled()
    if not np.isfinite(found).all():
        raise ArtifactError(
            "the graph gives hidden states that are not finite: its weights are damaged, which `verify` tells, or its "
            "precision overflows, and an export in bf16 or fp32 has more range"
        )
    return found


class _Reader:
    """Reads the pieces of some texts and keeps what is pooled of them.

    The graph sums both streams' states over the tokens by itself, for the gate; the blend's, and those of a graph with
    one stream, are summed here.
    """

    def __init__(self, graph: LoadedGraph, state: DecodeState, memory: str, pooling: str) -> None:
        self.graph, self.state, self.memory = graph, state, memory
        self.query_is_known = False
        self.mean = pooling == "mean"
        self.summed = self.mean and graph.siamese and memory in STREAMS
        self.blends_all = self.mean and graph.siamese and not self.summed
        alone = "base" if memory == "blend" else memory
        self.output = "hidden_fused" if graph.siamese and memory == "blend" else f"hidden_{alone}"
        self.found = np.zeros((state.batch, graph.manifest.hidden_size), np.float32)

    def read(self, piece: Piece) -> None:
        """Run a piece and count it in."""
        graph, state = self.graph, self.state
        first = 0 if piece.row is None else piece.row
        rows = slice(first, first + len(piece.texts))
        input_ids, mask = padded(piece.texts)
        new = mask.sum(-1).astype(np.int64)
        every = self.mean and not self.summed
        asked = np.tile(np.arange(mask.shape[1]), (len(new), 1)) if every else np.maximum(new[:, None] - 1, 0)
        query = np.zeros_like(mask) if self.query_is_known else mask
        binding = graph.bind_tokens(state, input_ids, query, piece.row, new, asked)
        sums = ["present_query_sum", "present_query_count"] if graph.siamese else []
        names = [*([] if self.summed else [self.output]), *sums]
        for name in names:
            binding.bind_output(name, "cpu")
        graph.run(binding, graph.run_options())
        outputs = [value.numpy() for value in binding.get_outputs()[-len(names) :]]
        if not self.summed:
            self._keep(rows, outputs[0], mask, np.array(piece.ends))
        if sums:
            state.query_sum[rows], state.query_count[rows] = outputs[-2:]
        state.lengths[rows] += new

    def pooled(self) -> Array:
        """What was kept, (B, d)."""
        if self.summed:
            means: Array = self.state.query_sum[:, STREAMS.index(self.memory)] / self.state.query_count[:, None]
            return means
        return self.found / self.state.lengths[:, None].astype(np.float32) if self.mean else self.found

    def _keep(self, rows: slice, states: Array, mask: Array, ends: Array) -> None:
        """states: (B, S, d) where all are summed, else (B, 1, d), of each row's last token of the piece."""
        if self.mean:  # what attention leaves at padding may be "not a number"
            self.found[rows] += np.where(mask[..., None] > 0, states, 0).sum(1)
        else:
            self.found[rows][ends] = states[ends, 0]
