"""Writing the ARTIFACT folder. docs/ARTIFACT.md is its schema; the runtime reads it and shares no code with this."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from imsm_core.data.encoding import end_token
from imsm_core.disk import room_for
from imsm_core.files import sha256_of_file

from .attention.plan import MOST_PADDING, AttentionPlan
from .errors import UnsupportedError
from .model_facts import ModelFacts
from .step_reads import step_reads
from .streams import StreamLayout

FORMAT_VERSION = 7
GRAPH, DATA, MANIFEST = "model.onnx", "model.onnx.data", "imsm_model.json"
SECTIONS = "imsm.sections"
"""The graph's metadata of this name holds a sha256 of every section of its manifest."""
PRODUCERS = ("imsm-runtime", "torch", "transformers", "peft", "onnx", "onnx-ir", "onnxscript", "optimum", "onnxruntime")


def write_graph(model: ir.Model, folder: Path) -> None:
    """model.onnx and model.onnx.data: every weight external, in one file that onnxruntime maps into memory. Raises
    OutputError where there is no room for them."""
    (folder / DATA).unlink(missing_ok=True)  # a smaller one may follow a larger one
    weights = [value.const_value for value in model.graph.initializers.values()]
    with room_for(folder, sum(weight.nbytes for weight in weights if weight is not None)):
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


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, folder: Path, raw: bool = False
) -> dict[str, Any]:
    """tokenizer.json, chat_template.jinja (if there is one) and generation_config.json; returns the manifest's
    `tokens` section. Of several templates the one that transformers takes where none is named. Raises UnsupportedError
    if there is none and the model was not tuned on `raw` prompts."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template and not raw:
            names = ", ".join(sorted(template))
            raise UnsupportedError(f"the tokenizer has chat templates ({names}), but none called default")
        template = template.get("default")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = model.generation_config
    (folder / "generation_config.json").write_text(config.to_json_string(), encoding="utf-8")
    return {
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": end_tokens(config.eos_token_id, tokenizer.eos_token_id, end_token(tokenizer)),
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
    }
    vocabulary = manifest["model"]["vocab_size"]  # a tokenizer may have tokens that the model never gives
    ends = [token for token in sections["tokens"]["eos_token_ids"] if 0 <= token < vocabulary]
    manifest["tokens"] = sections["tokens"] | {"eos_token_ids": ends}
    return seal(folder, manifest)


def seal(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write imsm_model.json with the sizes and sha256 of the files, and what each of its sections is into model.onnx,
    so that neither is taken for another's. Returns the manifest, in which null stands for numbers that JSON has not."""
    manifest = _in_json(manifest)
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    manifest["files"] = {path.name: _entry(path) for path in paths if path.name != GRAPH}
    proto = onnx.load(str(folder / GRAPH), load_external_data=False)
    written = {name: _hash(section) for name, section in manifest.items()}
    onnx.helper.set_model_props(proto, {SECTIONS: json.dumps(written)})
    onnx.save(proto, str(folder / GRAPH))
    manifest["files"] = {path.name: _entry(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return manifest


def _hash(section: Any) -> str:
    """sha256 of a section as JSON, keys sorted, without spaces, in ASCII."""
    canonical = json.dumps(section, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def _in_json(value: Any) -> Any:
    """A value as it is read again: keys are texts, tuples are lists, and what is not a finite number is null."""
    if isinstance(value, dict):
        return {str(key): _in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    if isinstance(value, str):  # a path that is not UTF-8 has half characters
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def end_tokens(*sources: int | list[int] | None) -> list[int]:
    """All of them, each once."""
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
