"""The graph against the manifest: the same inputs and outputs, by name, dtype and shape."""

from __future__ import annotations

import onnxruntime

from ..errors import ArtifactError
from ..manifest import Manifest

_NUMPY_NAMES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int8)": "int8",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}


def check_signature(onnx: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    """The graph's inputs and outputs are exactly the manifest's. Raises ArtifactError naming the first difference."""
    for side, found, expected in (
        ("input", onnx.get_inputs(), manifest.inputs),
        ("output", onnx.get_outputs(), manifest.outputs),
    ):
        graph = {value.name: value for value in found}
        for signature in expected:
            if signature.name not in graph:
                raise ArtifactError(f"the manifest names the {side} {signature.name}, which the graph does not have")
            value = graph.pop(signature.name)
            dtype = _NUMPY_NAMES.get(value.type, value.type)
            if dtype != signature.dtype or tuple(value.shape) != signature.shape:
                raise ArtifactError(
                    f"the {side} {signature.name} is {dtype} {list(value.shape)} in the graph and "
                    f"{signature.dtype} {list(signature.shape)} in the manifest"
                )
        if graph:
            raise ArtifactError(f"the graph has the {side} {next(iter(graph))}, which the manifest does not name")
    for group, layers in manifest.groups.items():
        names = {value.name for value in manifest.inputs if value.name.startswith(f"past_key_values.{group}.")}
        if len(names) != 2 * len(layers):
            raise ArtifactError(f"the manifest's cache of the group {group!r} does not fit the graph's inputs")
