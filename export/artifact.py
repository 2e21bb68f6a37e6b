"""Writing the ARTIFACT folder. docs/ARTIFACT.md is its schema; the runtime reads it and shares no code with this."""

from __future__ import annotations

import datetime
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imsm_core.data.encoding import end_token
from imsm_core.files import sha256_of_file

from .attention.plan import MOST_PADDING, AttentionPlan
from .errors import UnsupportedError
from .model_facts import ModelFacts
from .step_reads import step_reads
from .streams import StreamLayout

FORMAT_VERSION = 5
GRAPH, DATA, MANIFEST = "model.onnx", "model.onnx.data", "imsm_model.json"
PRODUCERS = ("imsm-runtime", "torch", "transformers", "peft", "onnx", "onnx-ir", "onnxscript", "optimum", "onnxruntime")


def write_graph(model: ir.Model, folder: Path) -> None:
    """model.onnx and model.onnx.data: every weight external, in one file that onnxruntime maps into memory."""
    (folder / DATA).unlink(missing_ok=True)  # a smaller one may follow a larger one
    ir.save(model, folder / GRAPH, external_data=DATA, size_threshold_bytes=256)
    _share_storage(folder / GRAPH)


def _share_storage(path: Path) -> None:
    """Reshape(weight, constant) -> a second name for the same bytes of the data file. onnxruntime would otherwise copy
    the weight to reshape it: a tied embedding, which is gathered from by rows and multiplied with in blocks."""
    proto = onnx.load(str(path), load_external_data=False)
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    views = [
        node
        for node in graph.node
        if node.op_type == "Reshape" and node.input[0] in weights and weights[node.input[0]].external_data
    ]
    for node in views:
        weight, sizes = weights[node.input[0]], onnx.numpy_helper.to_array(weights[node.input[1]])
        view = graph.initializer.add()
        view.CopyFrom(weight)
        view.name = node.output[0]
        view.dims[:] = np.empty(tuple(weight.dims), np.bool_).reshape(sizes).shape
        graph.node.remove(node)
        if not any(node.input[1] in other.input for other in graph.node):
            graph.initializer.remove(weights[node.input[1]])
    if views:
        onnx.save(proto, str(path))


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """tokenizer.json, chat_template.jinja (if there is one) and generation_config.json; returns the manifest's
    `tokens` section."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = model.generation_config
    (folder / "generation_config.json").write_text(config.to_json_string(), encoding="utf-8")
    return {
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": _end_tokens(config.eos_token_id, tokenizer.eos_token_id, end_token(tokenizer)),
        "pad_token_id": tokenizer.pad_token_id,
    }


def write_manifest(
    folder: Path,
    graph: ir.Model,
    facts: ModelFacts,
    plan: AttentionPlan,
    layout: StreamLayout,
    streams: tuple[str, ...],
    sections: dict[str, Any],
) -> dict[str, Any]:
    """imsm_model.json, last of all: it names every other file with its size and sha256. Returns it."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "producers": _producers(),
        "model": {
            "architecture": facts.architecture,
            "hidden_size": facts.hidden_size,
            "vocab_size": _logit_width(graph),
            "context_length": facts.context_length,
        },
        "streams": list(streams),
        "shared_layers": layout.trunk,
        "cache": _cache_geometry(plan, layout),
        "opset": {domain or "ai.onnx": number for domain, number in graph.opset_imports.items()},
        "graph": {
            "inputs": [_signature(value) for value in graph.graph.inputs],
            "outputs": [_signature(value) for value in graph.graph.outputs],
            "rotary": plan.rotary.mode,
            "padding": MOST_PADDING,
        },
        "reads": step_reads(ir.load(folder / GRAPH)),
        **sections,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in sorted(folder.iterdir())
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _signature(value: ir.Value) -> dict[str, Any]:
    """name, dtype as NumPy spells it, and shape with symbolic dimensions as names."""
    assert value.shape is not None
    assert value.dtype is not None
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape}


def _cache_geometry(plan: AttentionPlan, layout: StreamLayout) -> list[dict[str, Any]]:
    return [
        {"groups": list(layout.groups(index)), "kv_heads": layer.kv_heads, "head_size": layer.cached_head_size}
        for index, layer in enumerate(plan.layers)
    ]


def _logit_width(graph: ir.Model) -> int:
    shape = next(value.shape for value in graph.graph.outputs if value.name == "logits")
    assert shape is not None
    if not isinstance(shape[-1], int):
        raise UnsupportedError("the traced logits have no fixed vocabulary size")
    return shape[-1]


def _end_tokens(*sources: int | list[int] | None) -> list[int]:
    ids: list[int] = []
    for source in sources:
        for token in [source] if isinstance(source, int) else source or []:
            if token not in ids:
                ids.append(token)
    return ids


def _producers() -> dict[str, str]:
    found = {}
    for name in PRODUCERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
