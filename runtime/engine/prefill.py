"""How prompts are read: which tokens of which rows go through the graph together, and doing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .loaded_graph import LoadedGraph, TokenOutputs
from .marks import Mark
from .picks import BLEND, Picks, check_sound
from .state import DecodeState

Array = NDArray[Any]
Output = TypeVar("Output")
Texts = Sequence[Sequence[int]]
ZERO = np.float32(0)


class Piece(NamedTuple):
    """Tokens that one run reads: a text for every row of the state, some of them perhaps empty, or for one `row`. ends:
    for each of them, whether these are the last tokens of its text."""

    row: int | None
    texts: Texts
    ends: Sequence[bool]


def plan_prefill(texts: Texts, chunk: int, padding: int, batched: bool, starts_empty: bool) -> Iterator[Piece]:
    """The runs that read `texts`, one text a row, at most `chunk` tokens of each at a time.

    padding: how many tokens a row may be padded with beside longer ones. batched: whether the graph continues the
    caches of several rows by more than one token at once. The portable form does not: there several tokens can be read
    together only if all rows start empty (`starts_empty`), and in one run.
    """
    if batched:
        yield from _in_chunks(texts, chunk if len(texts) == 1 else min(chunk, padding), None)
    elif starts_empty and max(map(len, texts)) <= chunk:
        yield Piece(None, texts, [True] * len(texts))
    else:
        for row, text in enumerate(texts):
            yield from _in_chunks([text], chunk, row)


def _in_chunks(texts: Texts, chunk: int, row: int | None) -> Iterator[Piece]:
    for start in range(0, max(map(len, texts)), chunk):
        ends = [start < len(text) <= start + chunk for text in texts]
        yield Piece(row, [text[start : start + chunk] for text in texts], ends)


def read(graph: LoadedGraph, state: DecodeState, texts: Texts, chunk: int, picks: Picks[Output]) -> Output:
    """Read one text a row, all of it part of the query. Returns what is picked from the logits of each row's last
    token, with its gate's mean, (B,) float32, None in a base-only artifact. Raises ArtifactError for logits that are no
    numbers."""
    starts_empty = not state.lengths.any() and not graph.virtual
    rows: list[tuple[Array, ...]] = [()] * state.batch
    gates: list[Array | None] = [None] * state.batch
    for piece in plan_prefill(texts, chunk, graph.manifest.padding, graph.manifest.batched_chunks, starts_empty):
        outputs = read_piece(graph, state, piece, memories=picks.memories)
        ended = np.flatnonzero(piece.ends)
        if not len(ended):
            continue
        columns, sound = picks.pick(outputs.logits)
        check_sound(sound[ended], state.lengths[ended if piece.row is None else [piece.row]])
        for index in ended:
            row = int(index) if piece.row is None else piece.row
            rows[row] = tuple(array[index] for array in columns)
            gates[row] = None if outputs.gate_mean is None else outputs.gate_mean[index, 0]
    found = [gate for gate in gates if gate is not None]
    columns = tuple(np.stack(column) for column in zip(*rows, strict=True))
    return picks.output(columns, np.array(found) if found else None)


def padded(texts: Texts) -> tuple[Array, Array]:
    """Token ids (B, S) int64, padded on the right, and (B, S) float32, 1 at the texts' tokens."""
    longest = max(map(len, texts))
    input_ids = np.zeros((len(texts), longest), np.int64)  # the lengths mask what follows a text
    mask = np.zeros((len(texts), longest), np.float32)
    for index, text in enumerate(texts):
        input_ids[index, : len(text)] = text
        mask[index, : len(text)] = 1
    return input_ids, mask


def read_piece(
    graph: LoadedGraph, state: DecodeState, piece: Piece, every: bool = False, memories: tuple[int, ...] = BLEND
) -> TokenOutputs:
    """Run a piece and count it in. An empty text leaves its row as it is; its output means nothing. every: whether a
    piece of one row gives the outputs of every token. memories: as in `LoadedGraph.run_tokens`."""
    first = 0 if piece.row is None else piece.row
    rows = slice(first, first + len(piece.texts))
    input_ids, query_mask = padded(piece.texts)
    outputs = graph.run_tokens(state, input_ids, query_mask, piece.row, every, memories)
    state.lengths[rows] += query_mask.sum(-1).astype(np.int64)
    sums, counts, hidden = outputs.query_sum, outputs.query_count, outputs.hidden()
    if sums is None or counts is None or hidden is None:
        return outputs
    state.query_sum[rows] = sums
    state.query_count[rows] = counts
    if state.gate_reads_query:
        for index, text in enumerate(piece.texts):
            if not len(text):
                continue
            marks, length = state.marks[first + index], int(state.lengths[first + index])
            if piece.ends[index]:  # a text that was read once is read again but for one token
                marks.add_read(Mark(length - 1, sums[index] - hidden[index, -1], counts[index] - 1, ZERO, ZERO))
            marks.read.append(Mark(length, sums[index], counts[index], ZERO, ZERO))
    return outputs
