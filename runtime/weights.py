"""How many bytes of weights a graph holds, and how many of them one run reads: from model.onnx alone, without weights.

Reads the few fields of ONNX's protobuf that this takes (onnx.proto3: ModelProto, GraphProto, NodeProto, TensorProto),
since the runtime does not depend on onnx. What only a subgraph uses counts as read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ArtifactError

# Inputs of which a node reads a row per token and not the whole table: embeddings, and rotations by position.
_TABLES: dict[str, tuple[int, ...]] = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "com.microsoft.RotaryEmbedding": (2, 3),
    "RotaryEmbedding": (1, 2),
    "GroupQueryAttention": (7, 8),
}
# Inputs of which a node reads a part per token, of the experts that it is routed to: `k` of them.
_EXPERTS: dict[str, tuple[int, ...]] = {"MoE": (2, 3, 4, 5), "QMoE": (2, 3, 4, 5, 6, 7, 11, 12)}
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}


_Use = tuple[str, int, int]


@dataclass(frozen=True)
class Weight:
    """One stored tensor. uses: (operator, place among its inputs, its attribute k or 1). place: where its bytes are, so
    that two names of the same bytes count once."""

    dims: tuple[int, ...]
    bytes: int
    place: tuple[str, ...]
    uses: tuple[_Use, ...]

    def bytes_read(self, tokens: int, streams: int = 1) -> int:
        """Bytes that a run over `tokens` new tokens must read: all; a row for each token of a mere table; at most k
        experts for each token in each of `streams`, all different in the worst case."""
        if not self.dims or not self.uses:
            return self.bytes
        if all(place in _TABLES.get(operator, ()) for operator, place, _ in self.uses):
            parts = tokens
        elif all(place in _EXPERTS.get(operator, ()) for operator, place, _ in self.uses):
            parts = tokens * streams * max(k for _, _, k in self.uses)
        else:
            return self.bytes
        return self.bytes // max(1, self.dims[0]) * min(parts, self.dims[0])


def read_weights(model: Path) -> list[Weight]:
    """The stored tensors of a graph, each of its places once. Raises ArtifactError if the file is damaged."""
    try:
        graph = b"".join(value for number, value in _fields(model.read_bytes()) if number == 7)
        found: dict[tuple[str, ...], Weight] = {}
        uses = _uses(graph)
        for number, value in _fields(graph):
            if number == 5:
                weight = _weight(value, uses)
                same = found.get(weight.place)
                found[weight.place] = weight if same is None else _joined(same, weight)
    except (OSError, ValueError, IndexError) as error:
        raise ArtifactError(f"{model} cannot be read: {error}") from error
    return list(found.values())


def _uses(graph: bytes) -> dict[str, list[_Use]]:
    """Name of a value -> the operators that take it, at which place, and their k."""
    found: dict[str, list[_Use]] = {}
    for number, node in _fields(graph):
        if number != 1:
            continue
        fields = list(_fields(node))
        operator = b"".join(value for number, value in fields if number == 4).decode()
        domain = b"".join(value for number, value in fields if number == 7).decode()
        operator = f"{domain}.{operator}" if domain and f"{domain}.{operator}" in _TABLES else operator
        names = [value.decode() for number, value in fields if number == 1]
        k = 1
        for attribute in (dict(_fields(value)) for number, value in fields if number == 5):
            if attribute.get(1) == b"k":
                k = int.from_bytes(attribute.get(3, b""), "little")
        for place, name in enumerate(names):
            found.setdefault(name, []).append((operator, place, k))
    return found


def _weight(tensor: bytes, uses: dict[str, list[_Use]]) -> Weight:
    dims: list[int] = []
    kind, name, size, external = 0, "", -1, {}
    for number, value in _fields(tensor, packed=(1,)):
        if number == 1:
            dims.append(int.from_bytes(value, "little"))
        elif number == 2:
            kind = int.from_bytes(value, "little")
        elif number == 8:
            name = value.decode()
        elif number == 9:
            size = len(value)
        elif number == 13:
            entry = dict(_fields(value))
            external[entry[1].decode()] = entry[2].decode()
    if "length" in external:
        size = int(external["length"])
    elif size < 0:
        size = -(-math.prod(dims) * _BITS.get(kind, 8) // 8)
    place = (external["location"], external.get("offset", "0")) if external else (name,)
    return Weight(tuple(dims), size, place, tuple(uses.get(name, ())))


def _joined(first: Weight, second: Weight) -> Weight:
    larger = first if first.bytes >= second.bytes else second
    return Weight(larger.dims, larger.bytes, larger.place, first.uses + second.uses)


def _fields(message: bytes, packed: tuple[int, ...] = ()) -> Iterator[tuple[int, bytes]]:
    """(field number, value) of a protobuf message; integers as little-endian bytes, `packed` lists one by one."""
    position, view = 0, memoryview(message)
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value.to_bytes(8, "little")
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        chunk = bytes(view[position : position + length])
        position += length
        if position > len(message):
            raise ValueError("it ends early")
        if number in packed and wire == 2:
            inner = 0
            while inner < len(chunk):
                value, inner = _varint(chunk, inner)
                yield number, value.to_bytes(8, "little")
        else:
            yield number, chunk


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7
