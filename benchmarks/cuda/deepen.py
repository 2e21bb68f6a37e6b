"""A written artifact with more layers: the middle one is repeated in the graph, and every copy names the same bytes of
the data file.

The file stays small and quick to write. onnxruntime gives every initializer memory of its own, so that what a step
reads and what the device holds are those of a real model of that depth.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx

from export.artifact import GRAPH, MANIFEST, seal

REPEATED = 1
"""The layer whose copies follow it; the model has to have one before it and one after it."""


class NotRepeatable(Exception):
    """The graph's layers do not follow one another in the way that `deepen` repeats."""


def deepen(folder: Path, layers: int) -> None:
    """Repeat the middle layer of the three-layered artifact in `folder` until it has `layers`. Raises NotRepeatable."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if len(manifest["cache"]) != REPEATED + 2 or layers < REPEATED + 2:
        raise NotRepeatable(
            f"{len(manifest['cache'])} layers cannot become {layers}: three can, and no fewer than them"
        )
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    added = _repeat(model.graph, layers)
    onnx.save(model, str(folder / GRAPH))
    copies = layers - len(manifest["cache"])
    manifest["cache"][REPEATED + 1 : REPEATED + 1] = [manifest["cache"][REPEATED]] * copies
    for side in ("inputs", "outputs"):
        manifest["graph"][side] = _signatures(manifest["graph"][side], layers)
    manifest["reads"]["bytes"] += added
    manifest["repeated_layer"] = {"index": REPEATED, "copies": copies}
    seal(folder, manifest)


def _repeat(graph: onnx.GraphProto, layers: int) -> int:
    """Returns the bytes of the weights that were added."""
    nodes, copies = list(graph.node), layers - REPEATED - 2
    first, last = (_begin(nodes, index) for index in (REPEATED, REPEATED + 1))
    body, before = nodes[first:last], nodes[2 * first - last : first]
    if [node.op_type for node in body[1:]] != [node.op_type for node in before[1:]]:
        raise NotRepeatable("the nodes of the first two layers differ")
    # What a layer takes from the one before it is, one layer on, what it computed itself. Later layers take nothing
    # from the first norm, which is another node in the first layer.
    next_layer = {
        output: own
        for node, following in zip(before[1:], body[1:], strict=True)
        for output, own in zip(node.output, following.output, strict=False)
    }
    made = {output for node in body for output in node.output}
    caches = re.compile(rf"((?:past_key_values|present)\.\w+\.){REPEATED}(\.\w+)")
    weights = {tensor.name: tensor for tensor in graph.initializer if f".layers.{REPEATED}." in tensor.name}
    new: list[onnx.NodeProto] = []
    added = 0

    def name_in(copy: int, name: str) -> str:
        """What a value of the repeated layer is called in its `copy`-th copy; 0 is the layer itself."""
        if copy == 0 or name == "":
            return name
        if caches.fullmatch(name):
            return caches.sub(rf"\g<1>{REPEATED + copy}\2", name)
        return f"{name}.copy{copy}" if name in made or name in weights else name

    for copy in range(1, copies + 1):
        for tensor in weights.values():
            added += _nbytes(tensor)
            clone = graph.initializer.add()
            clone.CopyFrom(tensor)
            clone.name = name_in(copy, tensor.name)
        for node in body:
            clone_node = onnx.NodeProto()
            clone_node.CopyFrom(node)
            clone_node.name = f"{node.name}.copy{copy}" if node.name else ""
            inputs = [name_in(copy - 1, next_layer[name]) if name in next_layer else name_in(copy, name)
                      for name in node.input]  # fmt: skip
            clone_node.input[:] = inputs
            clone_node.output[:] = [name_in(copy, name) for name in node.output]
            new.append(clone_node)
    after = nodes[last:]
    for node in after:
        node.input[:] = [name_in(copies, name) if name in made else _moved(name, layers) for name in node.input]
        node.output[:] = [_moved(name, layers) for name in node.output]
    del graph.node[:]
    graph.node.extend([*nodes[:last], *new, *after])
    for values in (graph.input, graph.output):
        own = {value.name: value for value in values if caches.fullmatch(value.name)}
        for value in values:
            value.name = _moved(value.name, layers)
        for copy in range(1, copies + 1):
            for name, value in own.items():
                value_copy = values.add()
                value_copy.CopyFrom(value)
                value_copy.name = name_in(copy, name)
    return added


def _begin(nodes: list[onnx.NodeProto], layer: int) -> int:
    """Where a layer begins: at its first norm."""
    marker = f".layers.{layer}.input_layernorm.weight"
    return next(index for index, node in enumerate(nodes) if any(name.endswith(marker) for name in node.input))


def _moved(name: str, layers: int) -> str:
    """The name of a cache of the last layer, which is now another one."""
    return re.sub(rf"^((?:past_key_values|present)\.\w+\.){REPEATED + 1}(\.\w+)$", rf"\g<1>{layers - 1}\2", name)


def _signatures(signatures: list[dict[str, Any]], layers: int) -> list[dict[str, Any]]:
    """The manifest's list of inputs or outputs, with the caches of the new layers."""
    found = []
    for signature in signatures:
        found.append({**signature, "name": _moved(signature["name"], layers)})
        match = re.fullmatch(rf"((?:past_key_values|present)\.\w+\.){REPEATED}(\.\w+)", signature["name"])
        if match:
            names = [f"{match[1]}{index}{match[2]}" for index in range(REPEATED + 1, layers - 1)]
            found += [{**signature, "name": name} for name in names]
    return found


def _nbytes(tensor: onnx.TensorProto) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return int(onnx.numpy_helper.to_array(tensor).nbytes)
