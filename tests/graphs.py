"""Small graphs for the tests of passes: made from onnx's text form, run by onnxruntime, told by their nodes' kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'


def graph(text: str) -> ir.Model:
    """A model from onnx's text form, with inferred shapes. A name with dots in it is put in quotes."""
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEADER + text)))


def with_weight(model: ir.Model, name: str, values: np.ndarray) -> ir.Model:
    """Turn the graph input `name` into an initializer."""
    value = next(value for value in model.graph.inputs if value.name == name)
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(values, name=name)
    model.graph.register_initializer(value)
    return model


def with_weights(model: ir.Model, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """Turn those of `weights` that the graph has as inputs into initializers."""
    for name in [str(value.name) for value in model.graph.inputs]:
        if name in weights:
            with_weight(model, name, weights[name])
    return model


def declared(weights: Mapping[str, np.ndarray], lines: str) -> str:
    """Graph inputs for those of `weights` that `lines` mention in quotes, each with a comma in front."""
    return "".join(
        f", float[{','.join(map(str, values.shape))}] {quoted}"
        for name, values in weights.items()
        if (quoted := f'"{name}"') in lines
    )


def run(model: ir.Model, **inputs: np.ndarray) -> list[Any]:
    """What onnxruntime computes."""
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]
