"""Texts that were read, in one safetensors file: tokens, caches and what the gate's query was at their marks.

Nothing of a file is believed: names, types, shapes and values are those that the artifact has, or it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import ArtifactError
from ..files import reason, replacing, shown
from .loaded_graph import LoadedGraph
from .marks import Mark
from .state import DecodeState

Array = NDArray[Any]
FORMAT = "imsm prefix cache 1"
ZERO = np.float32(0)


class Prefix(NamedTuple):
    """tokens: (n,) int64. state: one row that holds them, all of them its prompt."""

    tokens: Array
    state: DecodeState


def write_prefixes(path: Path, graph: LoadedGraph, prefixes: Sequence[Prefix]) -> None:
    """Write prefixes, whole or not at all. Raises ArtifactError.

    The metadata has the format, the artifact's hashes and the number of texts. Text i has `i.tokens` (n,) int64,
    `i.mark_lengths` (m,) int64, ascending, the last one n, `i.mark_sums` (m, 2, d) float32, the sums of the hidden
    states of so many tokens (base, adapter), and `i.{group}.{layer}.{part}`: the bytes of each cache, (rows, kv_heads,
    virtual tokens + n, bytes of a head) uint8.
    """
    tensors: dict[str, Array] = {}
    for number, (tokens, state) in enumerate(prefixes):
        marks = state.marks[0].read or [Mark(len(tokens), state.query_sum[0], state.query_count[0], ZERO, ZERO)]
        tensors[f"{number}.tokens"] = tokens
        tensors[f"{number}.mark_lengths"] = np.array([mark.length for mark in marks], np.int64)
        tensors[f"{number}.mark_sums"] = np.array([mark.query_sum for mark in marks], np.float32)
        for group, cache in state.caches.items():
            for name, content in cache.content(len(tokens)).items():
                tensors[f"{number}.{group}.{name}"] = content
    metadata = {"format": FORMAT, "artifact": graph.artifact, "texts": str(len(prefixes))}
    try:
        with replacing(path) as draft:
            save_file(tensors, draft, metadata)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{shown(path)} cannot be written: {reason(error)}") from error


def read_prefixes(path: Path, graph: LoadedGraph, max_bytes: int) -> list[Prefix]:
    """What was written, the last texts of it whose caches fit into `max_bytes`. Raises ArtifactError."""
    try:
        if not path.is_file():
            raise ArtifactError("it is not there, or no file")
        with safe_open(path, framework="numpy") as file:
            return list(_read(file, graph, max_bytes))[::-1]
    except (OSError, ValueError, SafetensorError, ArtifactError) as error:
        raise ArtifactError(f"{shown(path)} cannot be read as a prefix cache: {reason(error)}") from error


def _read(file: Any, graph: LoadedGraph, max_bytes: int) -> Iterator[Prefix]:
    """The last text first."""
    metadata, stored = file.metadata() or {}, set(file.keys())
    names = set(stored)
    if metadata.get("format") != FORMAT:
        raise ArtifactError(f"its metadata does not say {FORMAT!r}")
    if metadata.get("artifact") != graph.artifact:
        raise ArtifactError("it was saved with another artifact")
    numbers = [str(number) for number in range(len(names)) if f"{number}.tokens" in names]
    if metadata.get("texts") != str(len(numbers)):
        raise ArtifactError("it does not have as many texts as it says")
    expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for number in numbers:
        expected[number] = _expected(file, stored, graph, number)
        names -= expected[number].keys()
    if names:
        raise ArtifactError("it has tensors that belong to no text")
    left = max_bytes
    for number in reversed(numbers):
        left -= sum(int(np.prod(shape)) for kind, shape in expected[number].values() if kind == "U8")
        if left < 0:
            return
        yield _prefix(graph, number, {name: file.get_tensor(name) for name in expected[number]})


def _expected(file: Any, stored: set[str], graph: LoadedGraph, number: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, types and shapes of a text's tensors, which are those of the file."""
    tokens, marks = (f"{number}.{name}" for name in ("tokens", "mark_lengths"))
    for name in (tokens, marks):
        if name not in stored or len(file.get_slice(name).get_shape()) != 1:
            raise ArtifactError(f"{name} is not there, or no list of numbers")
    (count,), (marked,) = file.get_slice(tokens).get_shape(), file.get_slice(marks).get_shape()
    most = graph.manifest.context_length
    if not 1 <= marked <= count <= most:
        raise ArtifactError(f"{tokens} and {marks} have {count} and {marked} numbers; the context has {most} tokens")
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        tokens: ("I64", (count,)),
        marks: ("I64", (marked,)),
        f"{number}.mark_sums": ("F32", (marked, 2, graph.manifest.hidden_size)),
    }
    for group, cache in graph.new_state().caches.items():
        for name, shape in cache.content_shapes(count).items():
            expected[f"{number}.{group}.{name}"] = ("U8", shape)
    for name, (kind, shape) in expected.items():
        if name not in stored:
            raise ArtifactError(f"{name} is missing")
        found = file.get_slice(name)
        if found.get_dtype() != kind or tuple(found.get_shape()) != shape:
            raise ArtifactError(f"{name} is {found.get_dtype()} {found.get_shape()}, not {kind} {list(shape)}")
    return expected


def _prefix(graph: LoadedGraph, number: str, tensors: dict[str, Array]) -> Prefix:
    """A text whose tensors have the right shapes."""
    tokens = tensors[f"{number}.tokens"]
    lengths: list[int] = tensors[f"{number}.mark_lengths"].tolist()
    sums = tensors[f"{number}.mark_sums"]
    count = len(tokens)
    if tokens.min() < 0 or tokens.max() >= graph.manifest.vocab_size:
        raise ArtifactError(f"{number}.tokens has numbers outside the vocabulary of {graph.manifest.vocab_size}")
    if lengths[0] < 1 or lengths[-1] != count or any(one >= other for one, other in pairwise(lengths)):
        raise ArtifactError(f"{number}.mark_lengths do not ascend from 1 to the text's {count} tokens")
    if not np.isfinite(sums).all():
        raise ArtifactError(f"{number}.mark_sums has values that are not finite")
    state = graph.new_state()
    for group, cache in state.caches.items():
        first = f"{number}.{group}."
        cache.fill({name.removeprefix(first): tensors[name] for name in tensors if name.startswith(first)}, count)
    state.lengths[0] = count
    if graph.siamese:
        state.query_sum[0], state.query_count[0] = sums[-1], count
    if state.gate_reads_query:
        state.marks[0].read = [
            Mark(length, total, np.float32(length), ZERO, ZERO) for length, total in zip(lengths, sums, strict=True)
        ]
    return Prefix(tokens, state)
