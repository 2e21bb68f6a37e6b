"""Operators of this project as functions of the graph: their own nodes say what they compute, so that any onnxruntime
runs them, and the runtime's kernels (`runtime/kernels`) replace them where the processor has some."""

from __future__ import annotations

from collections.abc import Sequence

import onnx.parser
import onnx_ir as ir

DOMAIN = "imsm"


def define(
    model: ir.Model, name: str, attributes: Sequence[str], inputs: str, outputs: str, body: str, overload: str = ""
) -> None:
    """Add a function to the model, if it does not have it yet. inputs, outputs: names with commas between. body: nodes
    in ONNX's text syntax (https://github.com/onnx/onnx/blob/main/docs/Syntax.md). overload: which one of several of
    that name; a kernel is for all of them. onnxruntime 1.32 knows no overloads where a function calls another one."""
    if (DOMAIN, name, overload) in model.functions:
        return
    opset = model.opset_imports[""]
    imports = f'["" : {opset}, "com.microsoft" : 1, "{DOMAIN}" : 1]'
    given = f"<{', '.join(attributes)}> " if attributes else ""
    signature = f"{name} {given}({inputs}) => ({outputs})"
    which = f'domain: "{DOMAIN}", ' + (f'overload: "{overload}", ' if overload else "")
    text = f"<{which}opset_import: {imports}> {signature} {{ {body} }}"
    made = ir.from_proto(onnx.parser.parse_function(text))
    assert isinstance(made, ir.Function)
    model.functions[made.identifier()] = made
    model.opset_imports[DOMAIN] = 1
