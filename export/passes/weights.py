"""What the passes know of a weight in the graph: the layers that it came from, and whose it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[np.generic]
_PARTS, _SIZES = "imsm.parts", "imsm.sizes"


def note_parts(value: ir.Value, names: Sequence[str], sizes: Sequence[int] = ()) -> None:
    """Remember which weights of the traced module a laid-out or packed one consists of, in the order of its outputs,
    and how many outputs each has."""
    value.meta[_PARTS] = tuple(names)
    value.meta[_SIZES] = tuple(sizes)


def parts(value: ir.Value) -> tuple[str, ...]:
    """The weights of the traced module that a weight consists of; its own name where no pass has changed it."""
    return tuple(value.meta.get(_PARTS, (str(value.name),)))


def part_sizes(value: ir.Value, outputs: int) -> tuple[int, ...]:
    """How many outputs each of `parts` has, of all `outputs`."""
    return tuple(value.meta.get(_SIZES, ())) or (outputs,)


def constant_matrix(value: ir.Value | None) -> bool:
    """Whether the value is an initializer of two dimensions."""
    return (
        value is not None and value.is_initializer() and value.const_value is not None and len(value.shape or ()) == 2
    )


def is_adapter(value: ir.Value) -> bool:
    """Whether a weight belongs to the adapter, by the names of the two-stream forms' parameters."""
    return any(part.startswith("adapter_") for name in parts(value) for part in name.split("."))


def is_backbone(value: ir.Value) -> bool:
    """Whether a weight belongs to the frozen backbone: neither to the adapter nor to the gate."""
    return not is_adapter(value) and not any(name.startswith("gate.") for name in parts(value))


def matrix(value: ir.Value) -> Array:
    """The values of a constant."""
    assert value.const_value is not None
    found: Array = value.const_value.numpy()
    return found


def nbytes(value: ir.Value) -> int:
    """Bytes of a constant."""
    assert value.const_value is not None
    return int(value.const_value.nbytes)


def new_weight(
    graph: ir.Graph, name: str, make: Callable[[], Array], shape: Sequence[int], dtype: ir.DataType
) -> ir.Value:
    """A new initializer, whose values are made when the file is written."""

    def made() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make()), name=name)

    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(made, dtype=dtype, shape=value.shape, name=name)  # type: ignore[arg-type]
    graph.register_initializer(value)
    return value


def new_constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer with values that are there already."""
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value


def add_node(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: int = 1,
    domain: str = "",
    **attributes: Any,
) -> ir.Node:
    """A new node in front of another one."""
    node = ir.node(op_type, list(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """`new` takes the place of `old` everywhere, its name as an output of the graph included."""
    new.type, new.shape = old.type, old.shape
    name = old.name
    output = old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if output:
        old.name = f"{name}.replaced"
        new.name = name


def drop_unused(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    """Remove initializers that nothing reads any more."""
    for value in values:
        if not value.uses() and str(value.name) in graph.initializers:
            del graph.initializers[str(value.name)]
