"""Artifacts of formats that are still read, made from today's: the graph and the manifest as they were then."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.artifact import SECTIONS, seal
from runtime.manifest import read_manifest
from tests.exported import edit_manifest


def as_format(version: int, artifact: Path, manifest: dict[str, Any]) -> None:
    """Turn an artifact whose manifest is `manifest` into one of format 5 or 6: a graph of two streams with one bias a
    row and logits of the blend alone. What else format 5 has differently is the caller's to say in `manifest`."""
    older = {key: value for key, value in manifest.items() if key != "generation"} | {"format_version": version}
    if len(manifest["streams"]) > 1:
        _with_one_bias_a_row(artifact / "model.onnx")
        older["graph"] = _older_graph(manifest["graph"])
    seal(artifact, older)
    if version == 5:
        _without_the_hash_of_the_number(artifact)


def _with_one_bias_a_row(path: Path) -> None:
    proto = onnx.load(str(path), load_external_data=False)
    graph = proto.graph
    for value in [value for value in graph.input if value.name in ("memory_bias", "memory")]:
        graph.input.remove(value)
    graph.output.remove(next(value for value in graph.output if value.name == "hidden_fused"))
    for node in graph.node:
        node.input[:] = ["bias_of_all" if name == "memory_bias" else name for name in node.input]
    graph.input.append(helper.make_tensor_value_info("memory_bias", TensorProto.FLOAT, ["batch"]))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "last_axis"))
    zero = numpy_helper.from_array(np.zeros(1, np.int64))
    for place, node in enumerate(
        (
            helper.make_node("Unsqueeze", ["memory_bias", "last_axis"], ["bias_of_all"]),
            helper.make_node("Shape", ["bias_of_all"], ["sizes_of_all"]),
            helper.make_node("ConstantOfShape", ["sizes_of_all"], ["memory"], value=zero),
        )
    ):
        graph.node.insert(place, node)
    onnx.save(proto, str(path))


def _older_graph(graph: dict[str, Any]) -> dict[str, Any]:
    bias = {"name": "memory_bias", "dtype": "float32", "shape": ["batch"]}
    inputs = [entry for entry in graph["inputs"] if entry["name"] not in ("memory_bias", "memory")]
    outputs = [entry for entry in graph["outputs"] if entry["name"] != "hidden_fused"]
    return graph | {"inputs": [*inputs, bias], "outputs": outputs}


def _without_the_hash_of_the_number(artifact: Path) -> None:
    path = artifact / "model.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    (hashes,) = [entry for entry in proto.metadata_props if entry.key == SECTIONS]
    kept = {name: value for name, value in json.loads(hashes.value).items() if name != "format_version"}
    hashes.value = json.dumps(kept)
    onnx.save(proto, str(path))
    content = path.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(artifact, files=read_manifest(artifact).raw["files"] | {path.name: entry})
