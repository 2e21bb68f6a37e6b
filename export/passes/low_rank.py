"""Low-rank changes of several layers with one input: their first products in one.

MatMul(x, A1), MatMul(x, A2), ... each times the adapter's rows -> one MatMul(x, [A1 A2 ...]), one Mul, one Split

The factors are small, so that a node costs more than what it computes.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from . import weights


def pack_low_rank(model: ir.Model) -> int:
    """Returns how many products became part of another one."""
    groups: dict[tuple[int, int], list[tuple[ir.Node, ir.Node]]] = defaultdict(list)
    for node in model.graph:
        masked = _masked(node)
        if masked is not None:
            mask = next(value for value in masked.inputs if value is not node.outputs[0])
            groups[id(node.inputs[0]), id(mask)].append((node, masked))
    count = 0
    for pairs in groups.values():
        if len(pairs) > 1:
            _pack(model.graph, pairs)
            count += len(pairs) - 1
    return count


def _masked(node: ir.Node) -> ir.Node | None:
    """The Mul with the adapter's rows behind the first product of a low-rank change."""
    if node.op_type != "MatMul" or not weights.constant_matrix(node.inputs[1]):
        return None
    assert node.inputs[1] is not None
    uses = list(node.outputs[0].uses())
    if not weights.is_adapter(node.inputs[1]) or len(uses) != 1 or uses[0][0].op_type != "Mul":
        return None
    masked, place = uses[0]
    mask = masked.inputs[1 - place]
    one_a_row = mask is not None and mask.shape is not None and len(mask.shape) > 1 and mask.shape[-1] == 1
    return masked if one_a_row and not node.outputs[0].is_graph_output() else None


def _pack(graph: ir.Graph, pairs: list[tuple[ir.Node, ir.Node]]) -> None:
    first, first_masked = pairs[0]
    factors = [node.inputs[1] for node, _ in pairs]
    known = [factor for factor in factors if factor is not None]
    ranks = [weights.matrix(factor).shape[1] for factor in known]
    assert known[0].dtype is not None
    shape = (weights.matrix(known[0]).shape[0], sum(ranks))
    packed = weights.new_weight(
        graph,
        f"{known[0].name}.packed",
        lambda: np.concatenate([weights.matrix(factor) for factor in known], axis=1),
        shape,
        known[0].dtype,
    )
    weights.note_parts(packed, [name for factor in known for name in weights.parts(factor)])
    sizes = weights.new_constant(graph, f"{packed.name}.ranks", np.array(ranks, np.int64))
    mask = next(value for value in first_masked.inputs if value is not first.outputs[0])
    product = weights.add_node(first, "MatMul", [first.inputs[0], packed])
    masked = weights.add_node(first_masked, "Mul", [product.outputs[0], mask])
    split = weights.add_node(first_masked, "Split", [masked.outputs[0], sizes], outputs=len(ranks), axis=-1)
    for output, (node, masked_node) in zip(split.outputs, pairs, strict=True):
        weights.replace_value(masked_node.outputs[0], output)
        graph.remove(masked_node, safe=True)
        graph.remove(node, safe=True)
    weights.drop_unused(graph, known)
