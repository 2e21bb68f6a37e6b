"""Readable names for symbolic dimensions: batch, sequence, wanted, and past and total of each group of rows, whose
caches differ in length where one has virtual tokens. They replace names such as s22 and s40."""

from __future__ import annotations

import onnx_ir as ir

from .rewrite import Sweep

_NAMED = {
    "input_ids": ("batch", "sequence"),
    "position_ids": ("batch", "sequence"),
    "query_mask": ("batch", "sequence"),
    "seqlens_k": ("batch",),
    "query_seqlens": ("batch",),
    "logit_positions": ("batch", "wanted"),
    "past_query_sum": ("batch", None, None),
    "past_query_count": ("batch",),
    "memory_bias": ("batch", "wanted"),
    "memory": ("batch", "wanted"),
    "logits": ("batch", "wanted", None),
    "hidden_base": ("batch", "wanted", None),
    "hidden_adapter": ("batch", "wanted", None),
    "hidden_fused": ("batch", "wanted", None),
    "gate": ("batch", "wanted", None),
    "gate_mean": ("batch", "wanted"),
    "present_query_sum": ("batch", None, None),
    "present_query_count": ("batch",),
}


def _name_dimensions(model: ir.Model) -> int:
    """Counts inputs and outputs."""
    count = 0
    for value in (*model.graph.inputs, *model.graph.outputs):
        names = _names(str(value.name))
        if names is None or value.shape is None:
            continue
        sizes = [size if name is None else name for size, name in zip(value.shape, names, strict=True)]
        value.shape = ir.Shape(sizes)
        count += 1
    return count


def _names(name: str) -> tuple[str | None, ...] | None:
    direction, _, rest = name.partition(".")
    group = rest.partition(".")[0]
    rows = "batch_of_both" if group == "both" else "batch"
    if direction == "past_key_values":
        return (rows, None, f"past_{group}", None)
    if direction == "present":
        return (rows, None, f"total_{group}", None)
    return _NAMED.get(name)


name_dimensions = Sweep("name_dimensions", "s22, s40 -> batch, sequence", _name_dimensions)
