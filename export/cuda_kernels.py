"""Which nodes of a graph onnxruntime's CUDA provider has kernels for, by a list of its kernels.

The list (cuda_kernels.json, written by benchmarks/cuda/list_kernels.py) is what onnxruntime-gpu itself says it has
registered, so that this needs neither a GPU nor onnxruntime-gpu. It knows operators, versions and types; what a kernel
does not do with some attributes or sizes, it does not know.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .errors import TraceError

LIST = Path(__file__).with_suffix(".json")

# Inputs that the CUDA provider reads on the host, as sizes and not as data.
_SIZES = {"Range": (0, 1, 2), "ConstantOfShape": (0,), "Expand": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4)}
_SMALL = 100  # elements of an initializer that may go anywhere


@dataclass(frozen=True)
class CudaKernels:
    """onnxruntime: the version of onnxruntime-gpu whose kernels these are. nodes: of the graph. shape_nodes: those of
    them that compute sizes from sizes, which onnxruntime runs on the CPU for a CUDA provider too. missing: how many
    nodes have no CUDA kernel, by operator, and by types where others have one."""

    onnxruntime: str
    nodes: int
    shape_nodes: int
    missing: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "onnxruntime": self.onnxruntime,
            "nodes": self.nodes,
            "shape_nodes": self.shape_nodes,
            "missing": self.missing,
        }


def cuda_kernels(model: ir.Model) -> CudaKernels:
    """Compare a graph, as `onnx_ir.load` reads the file, with the list.

    Raises TraceError for a node that gets two types where its operator wants one, which no onnxruntime loads."""
    missing = Counter(node.what for node in typed_nodes(model) if not node.has_kernel(node.types))
    shape_nodes = sum(1 for _ in _shape_nodes(model))
    return CudaKernels(_listed()["onnxruntime-gpu"], len(model.graph), shape_nodes, dict(sorted(missing.items())))


@dataclass(frozen=True)
class TypedNode:
    """A node, the version of its operator, None where CUDA has none, and its `types` by type variable."""

    node: ir.Node
    version: Mapping[str, Any] | None
    types: Mapping[str, str]

    def has_kernel(self, types: Mapping[str, str]) -> bool:
        """Whether there is a kernel for these types, by type variable."""
        kernels = [] if self.version is None else self.version["kernels"]
        return any(
            all(types[key] in allowed.split() for key, allowed in kernel.items() if key in types) for kernel in kernels
        )

    @property
    def what(self) -> str:
        """The operator, with its types where there are kernels for others."""
        kernels = [] if self.version is None else self.version["kernels"]
        named = [f"{key} {type_}" for key, type_ in sorted(self.types.items()) if any(key in each for each in kernels)]
        return f"{self.node.op_type} of {', '.join(named)}" if named else self.node.op_type

    def inputs(self) -> list[str]:
        """The type variable of each input."""
        return _variables(self.version, "inputs", self.node.inputs)

    def outputs(self) -> list[str]:
        """The type variable of each output."""
        return _variables(self.version, "outputs", self.node.outputs)


def typed_nodes(model: ir.Model) -> Iterator[TypedNode]:
    """The nodes of a graph with their types. A value whose type is not written has that of an input of the same type
    variable. Raises TraceError for two types of one variable."""
    types = {
        value: _spelled(value.dtype)
        for value in [*model.graph.inputs, *model.graph.initializers.values()]
        if value.dtype is not None
    }
    for node in list(model.graph):
        version = _version(model, node)
        types |= {value: _spelled(value.dtype) for value in node.outputs if value.dtype is not None}
        found: dict[str, str] = {}
        for key, values in (("inputs", node.inputs), ("outputs", node.outputs)):
            for variable, value in zip(_variables(version, key, values), values, strict=True):
                if value is None or not variable:
                    continue
                if key == "outputs" and variable in found:
                    types.setdefault(value, found[variable])
                if value in types and types[value] != found.setdefault(variable, types[value]):
                    both = " and ".join(sorted({types[value], found[variable]}))
                    raise TraceError(f"{node.op_type} {node.name!r} gets {both} as {variable}")
        yield TypedNode(node, version, found)


@cache
def _listed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(LIST.read_text(encoding="utf-8"))
    return found


def _version(model: ir.Model, node: ir.Node) -> Mapping[str, Any] | None:
    """The list's entry for the version of an operator that a graph means; None: no CUDA kernel of any version."""
    versions = _listed()["operators"].get(node.domain, {}).get(node.op_type, {})
    imported = model.graph.opset_imports.get(node.domain, 1)
    meant = max((int(since) for since in versions if int(since) <= imported), default=None)
    found: Mapping[str, Any] | None = None if meant is None else versions[str(meant)]
    return found


def _variables(version: Mapping[str, Any] | None, key: str, values: Sequence[ir.Value | None]) -> list[str]:
    """The type variable of each value; "" where it is unknown."""
    formal = [] if version is None else version[key].split()
    repeats = bool(formal) and formal[-1].endswith("...")
    named = [variable.removesuffix("...") for variable in formal]
    return [*named, *[named[-1] if repeats else ""] * len(values)][: len(values)] if named else [""] * len(values)


def _spelled(dtype: ir.DataType) -> str:
    return dtype.name.lower()


def _shape_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """onnxruntime's rule: nodes whose inputs are sizes, inputs of the graph or small constants, and none of which reads
    a size on the host anyway. Sizes are what Shape and such nodes return."""
    sizes: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type in ("Shape", "Size"):
            sizes.update(node.outputs)
            continue
        inputs = [(place, value) for place, value in enumerate(node.inputs) if value is not None]
        from_sizes = [place for place, value in inputs if value in sizes]
        if not from_sizes or any(place in _SIZES.get(node.op_type, ()) for place in from_sizes):
            continue
        if all(value in sizes or _goes_anywhere(value) for _, value in inputs):
            sizes.update(node.outputs)
            yield node


def _goes_anywhere(value: ir.Value) -> bool:
    if value.is_initializer():
        return value.const_value is not None and value.const_value.size <= _SMALL
    return value.is_graph_input()
