"""Low-rank changes of several layers with one input: their first products in one.

The factors are small, so that a node costs more than what it computes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from . import weights
from .graph import add_node, drop_unused, new_constant, new_weight, nodes_of, only_user, replace_value
from .rewrite import Declined, JointRewrite, Outcome

READ_TWICE = Declined("the product is read by something else too")
NO_ROWS = Declined("the product is not multiplied with one factor a row")
ALONE = Declined("no other low-rank change has its input and its rows' factors")


@dataclass(frozen=True)
class _First:
    """The first product of a low-rank change, and the Mul with the adapter's rows behind it."""

    product: ir.Node
    masked: ir.Node
    mask: ir.Value

    @property
    def factor(self) -> ir.Value:
        """A, (in, rank)."""
        assert self.product.inputs[1] is not None
        return self.product.inputs[1]


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    """Products with the adapter's matrices that have an input in common with another one."""
    found = []
    for node in nodes_of(model, "MatMul"):
        factor = node.inputs[1]
        if factor is not None and weights.constant_matrix(factor) and weights.is_adapter(factor):
            found.append(node)
    shared = Counter(node.inputs[0] for node in found)
    return (node for node in found if shared[node.inputs[0]] > 1)


def _check(node: ir.Node) -> _First | Declined:
    product = node.outputs[0]
    masked = only_user(product)
    if masked is None:
        return READ_TWICE
    mask = next((value for value in masked.inputs if value is not product), None)
    a_row = mask is not None and mask.shape is not None and len(mask.shape) > 1 and mask.shape[-1] == 1
    if masked.op_type != "Mul" or mask is None or not a_row:
        return NO_ROWS
    return _First(node, masked, mask)


def _rewrite(model: ir.Model, found: Sequence[_First]) -> Outcome:
    """Counts products that became part of another one."""
    groups: dict[tuple[ir.Value | None, ir.Value], list[_First]] = defaultdict(list)
    for first in found:
        groups[first.product.inputs[0], first.mask].append(first)
    outcome = Outcome()
    for group in groups.values():
        if len(group) == 1:
            outcome.decline(ALONE)
        else:
            _pack(model.graph, group)
            outcome.fired += len(group) - 1
    return outcome


def _pack(graph: ir.Graph, group: Sequence[_First]) -> None:
    first, factors = group[0], [part.factor for part in group]
    ranks = [weights.matrix(factor).shape[1] for factor in factors]
    assert first.factor.dtype is not None
    packed = new_weight(
        graph,
        f"{first.factor.name}.packed",
        lambda: np.concatenate([weights.matrix(factor) for factor in factors], axis=1),
        (weights.matrix(first.factor).shape[0], sum(ranks)),
        first.factor.dtype,
    )
    weights.note_parts(packed, [name for factor in factors for name in weights.parts(factor)])
    sizes = new_constant(graph, f"{packed.name}.ranks", np.array(ranks, np.int64))
    product = add_node(first.product, "MatMul", [first.product.inputs[0], packed])
    masked = add_node(first.masked, "Mul", [product.outputs[0], first.mask])
    split = add_node(first.masked, "Split", [masked.outputs[0], sizes], outputs=len(ranks), axis=-1)
    for output, part in zip(split.outputs, group, strict=True):
        replace_value(part.masked.outputs[0], output)
        graph.remove(part.masked, safe=True)
        graph.remove(part.product, safe=True)
    drop_unused(graph, factors)


pack_low_rank = JointRewrite(
    "pack_low_rank",
    "MatMul(x, A1), MatMul(x, A2), ... each times the adapter's rows -> one MatMul(x, [A1 A2 ...]), one Mul, one Split",
    _candidates,
    _check,
    _rewrite,
)
