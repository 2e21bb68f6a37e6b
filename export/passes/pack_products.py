"""Other products of one input as one, in half precision: gate and up, or queries, keys and values that are normalized
or rotated before attention. On a GPU every node is a launch, and splitting the outputs costs fewer than it saves; on a
CPU it would only copy them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from . import weights
from .graph import add_node, new_constant, nodes_of, only_user, replace_value
from .projections import HALVES, Projection, join, join_problem, projection, remove
from .rewrite import Declined, JointRewrite, Outcome

ALONE = Declined("no other projection has its input")


@dataclass(frozen=True)
class _Product:
    """A projection and its result."""

    terms: Projection
    result: ir.Value


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    """Half-precision products with the backbone's matrices that have an input in common with another one."""
    found = defaultdict(list)
    for node in nodes_of(model, "MatMul"):
        weight = node.inputs[1]
        half = weight is not None and weight.dtype in HALVES and weights.constant_matrix(weight)
        if half and weight is not None and weights.is_backbone(weight):
            found[node.inputs[0]].append(node)
    return (node for nodes in found.values() if len(nodes) > 1 for node in nodes)


def _check(node: ir.Node) -> _Product | Declined:
    """The sum of the product, its bias and its change."""
    value = node.outputs[0]
    while (add := only_user(value, "Add")) is not None and _is_term(add, value):
        value = add.outputs[0]
    found = projection(value)
    return found if isinstance(found, Declined) else _Product(found, value)


def _is_term(add: ir.Node, value: ir.Value) -> bool:
    """Whether what is added to a value is a constant or a product with the adapter's matrix."""
    (other,) = (term for term in add.inputs if term is not None and term is not value)
    node = other.producer()
    if node is None:
        return other.is_initializer()
    factor = node.inputs[1] if node.op_type == "MatMul" else None
    return factor is not None and weights.constant_matrix(factor) and weights.is_adapter(factor)


def _rewrite(model: ir.Model, found: Sequence[_Product]) -> Outcome:
    """Counts products that became part of another one."""
    groups: dict[ir.Value | None, list[_Product]] = defaultdict(list)
    for product in found:
        groups[product.terms.x].append(product)
    places = {node: place for place, node in enumerate(model.graph)}
    outcome = Outcome()
    for group in groups.values():
        problem = ALONE if len(group) == 1 else join_problem([product.terms for product in group])
        if problem is not None:
            for _ in group:
                outcome.decline(problem)
            continue
        _pack(model.graph, group, places)
        outcome.fired += len(group) - 1
    return outcome


def _pack(graph: ir.Graph, group: Sequence[_Product], places: dict[ir.Node, int]) -> None:
    last = [product.result.producer() for product in group]
    before = min((node for node in last if node is not None), key=lambda node: places[node])
    terms = [product.terms for product in group]
    joint = join(graph, before, terms, "joint")
    assert terms[0].weight is not None
    widths = np.array([each.width for each in terms], np.int64)
    sizes = new_constant(graph, f"{terms[0].weight.name}.joint.widths", widths)
    split = add_node(before, "Split", [joint, sizes], outputs=len(terms), axis=-1)
    for product, output in zip(group, split.outputs, strict=True):
        replace_value(product.result, output)
    remove(graph, terms)


pack_products = JointRewrite(
    "pack_products",
    "MatMul(x, W1), MatMul(x, W2), each [+ bias] [+ MatMul(low, B)] -> "
    "Split(MatMul(x, [W1 W2]) [+ bias] [+ MatMul(lows, blocks)]), in half precision",
    _candidates,
    _check,
    _rewrite,
)
