"""What has no CUDA kernel in half precision, computed in float32."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ..cuda_kernels import TypedNode, typed_nodes
from .graph import add_node, replace_value
from .rewrite import Declined, Rewrite

FULL = "float"
HALF = ("float16", "bfloat16")


def _candidates(model: ir.Model) -> Iterator[TypedNode]:
    """Nodes of half precision without a CUDA kernel."""
    for node in typed_nodes(model):
        if not node.has_kernel(node.types) and any(type_ in HALF for type_ in node.types.values()):
            yield node


def _check(typed: TypedNode) -> TypedNode | Declined:
    wide = {variable: FULL if type_ in HALF else type_ for variable, type_ in typed.types.items()}
    return typed if typed.has_kernel(wide) else Declined(f"CUDA has no {typed.node.op_type} in float32 either")


def _rewrite(model: ir.Model, typed: TypedNode) -> None:
    node = typed.node
    inputs: list[ir.Value | None] = []
    for variable, value in zip(typed.inputs(), node.inputs, strict=True):
        if value is None or typed.types[variable] not in HALF:
            inputs.append(value)
        else:
            inputs.append(_cast(node, value, ir.DataType.FLOAT))
    wide = add_node(node, node.op_type, inputs, len(node.outputs), node.domain, **node.attributes)
    for variable, old, new in zip(typed.outputs(), node.outputs, wide.outputs, strict=True):
        if typed.types[variable] in HALF:
            assert old.dtype is not None
            new.type = ir.TensorType(ir.DataType.FLOAT)
            new = _cast(node, new, old.dtype)
        replace_value(old, new)
    model.graph.remove(node, safe=True)


def _cast(before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    cast = add_node(before, "Cast", [value], to=int(dtype)).outputs[0]
    cast.type = ir.TensorType(dtype)
    return cast


widen_without_kernel = Rewrite(
    "widen_without_kernel",
    "a node in half precision that onnxruntime's CUDA provider has in float32 alone (in bfloat16: Pad, TopK, norms "
    "with a float32 scale) -> Cast to float32, the node, Cast back",
    _candidates,
    _check,
    _rewrite,
)
