"""How many bytes of weights a step reads, by the number of its tokens: the manifest's `reads` section.

Most weights are read whole. Of a table (embeddings, rotations by position) a step reads a row per token; of experts it
reads those that its tokens are routed to. Knows a written graph but no values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

# Inputs of which a node reads a row per token and not the whole table.
_TABLES: dict[str, tuple[int, ...]] = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "QuantizedGather": (1, 2, 3, 4),
    "com.microsoft.RotaryEmbedding": (2, 3),
    "RotaryEmbedding": (1, 2),
    "GroupQueryAttention": (7, 8),
}
# Inputs of which a node reads a part per token, of the `k` experts that it is routed to.
_EXPERTS: dict[str, tuple[int, ...]] = {"MoE": (2, 3, 4, 5), "QMoE": (2, 3, 4, 5, 6, 7, 11, 12)}


def step_reads(model: ir.Model) -> dict[str, Any]:
    """model: as `onnx_ir.load` reads the file, so that two names of the same bytes of the data file count once.

    bytes: read in every step. rows: tables, equal ones together: `bytes` of a row and how many `rows`. experts: the
    same, `bytes` of one expert, how many `experts`, and the `top_k` that each token is routed to in each stream.
    """
    whole = 0
    rows: Counter[int] = Counter()
    experts: Counter[tuple[int, int]] = Counter()
    for values in _places(model):
        tensor = max((value.const_value for value in values), key=_nbytes)
        assert tensor is not None
        size = _nbytes(tensor)
        parts = max(1, tensor.shape.numpy()[0]) if len(tensor.shape) else 1
        uses = [use for value in values for use in value.uses()]
        if uses and all(_reads(model, use, _TABLES) for use in uses):
            rows[parts] += size // parts
        elif uses and all(_reads(model, use, _EXPERTS) for use in uses):
            top_k = max(use.node.attributes.get_int("k", 1) or 1 for use in uses)
            experts[parts, top_k] += size // parts
        else:
            whole += size
    return {
        "bytes": whole,
        "rows": [{"bytes": size, "rows": count} for count, size in sorted(rows.items())],
        "experts": [
            {"bytes": size, "experts": count, "top_k": top_k} for (count, top_k), size in sorted(experts.items())
        ],
    }


def _places(model: ir.Model) -> Iterator[list[ir.Value]]:
    """The stored weights, those with the same bytes together."""
    found: dict[tuple[Any, ...], list[ir.Value]] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        external = isinstance(tensor, ir.ExternalTensor)
        place = (tensor.location, tensor.offset) if external else (value.name,)  # type: ignore[union-attr]
        found.setdefault(place, []).append(value)
    yield from found.values()


def _nbytes(tensor: ir.TensorProtocol | None) -> int:
    return 0 if tensor is None else int(tensor.nbytes)


def _reads(model: ir.Model, use: Any, kinds: dict[str, tuple[int, ...]]) -> bool:
    """Whether a use is at one of the inputs that `kinds` names. What a subgraph uses counts as read whole."""
    node: ir.Node = use.node
    operator = f"{node.domain}.{node.op_type}"
    places = kinds.get(operator if operator in kinds else node.op_type, ())
    return node.graph is model.graph and use.idx in places
