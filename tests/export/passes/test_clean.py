"""What a graph does not need goes, and what it needs stays."""

from __future__ import annotations

import onnx_ir as ir

from export.passes.clean import drop_unused_inputs, strip_metadata
from export.passes.rewrite import Outcome
from tests.graphs import graph, kinds


def test_inputs_that_nothing_reads_are_dropped_and_read_ones_stay() -> None:
    model = graph(
        "g (float[2, 3, 8] x, int64[2] unused, float[2] dead) => (float[2, 3, 8] y) { d = Abs(dead) y = Neg(x) }"
    )
    assert drop_unused_inputs(model) == Outcome(2)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert kinds(model) == ["Neg"]


def test_notes_of_the_exporting_machine_are_stripped() -> None:
    model = graph("g (float[5, 8] x) => (float[5, 8] y) { a = Abs(x) y = Neg(a) }")
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "/home/somebody/secret.py"
    node.doc_string = "/home/somebody"
    assert strip_metadata(model) == Outcome(2)
    assert b"somebody" not in ir.to_proto(model).SerializeToString()
