"""What the passes know of a weight in the graph: the layers that it came from, and whose it is."""

from __future__ import annotations

from collections.abc import Sequence

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
