"""What a graph does not need: inputs that nothing reads, and the trace's notes about this machine."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as common_passes

from .rewrite import Sweep


def _drop_unused_inputs(model: ir.Model) -> int:
    """Counts inputs."""
    common_passes.RemoveUnusedNodesPass()(model)
    unused = [value for value in model.graph.inputs if not value.uses() and not value.is_graph_output()]
    for value in unused:
        model.graph.inputs.remove(value)
    return len(unused)


def _strip_metadata(model: ir.Model) -> int:
    """Counts nodes."""
    common_passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    outputs = set(model.graph.outputs)
    nodes = list(model.graph)
    for node in nodes:
        for value in node.outputs:
            if value not in outputs:
                value.shape = None
    return len(nodes)


drop_unused_inputs = Sweep(
    "drop_unused_inputs",
    "nodes and inputs without a reader (positions, where rotation happens inside attention) -> nothing",
    _drop_unused_inputs,
)
strip_metadata = Sweep(
    "strip_metadata",
    "stack traces and doc strings, which hold paths of the exporting machine, and the shapes of intermediate values, "
    "which onnxruntime infers -> nothing",
    _strip_metadata,
)
