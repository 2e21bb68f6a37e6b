"""The graph against the manifest: the same inputs and outputs, by name, dtype and shape, and the same export."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import onnxruntime

from ..errors import ArtifactError
from ..files import GRAPH, MANIFEST
from ..json_checks import DamagedError, parse_json, table, text
from ..manifest import Manifest
from ..printable import printable

SECTIONS = "imsm.sections"
"""The graph's metadata of this name says what each section of its manifest was when it was written."""
OF_THE_GRAPH = (
    "activations",
    "cache",
    "format_version",
    "gate",
    "graph",
    "kv_cache",
    "model",
    "opset",
    "precision",
    "quantization",
    "reads",
    "shared_layers",
    "streams",
    "virtual_tokens",
)
"""Sections that only a new export can change. The others may be edited; `verify` says so."""
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
            other = printable(next(iter(graph)))
            raise ArtifactError(f"the graph has the {side} {other}, which the manifest does not name")


def check_sections(onnx: onnxruntime.InferenceSession, manifest: Manifest, edited: bool) -> None:
    """The manifest is the one that was written with the graph: in the sections that only a new export can change, or,
    unless it may be `edited`, in all of them. Raises ArtifactError naming the first other one."""
    written, found = _written_sections(onnx), manifest.raw.keys()
    names = set(OF_THE_GRAPH) if edited else found | written.keys()
    if manifest.raw["format_version"] == 5 and "format_version" not in written:  # it came with format 6
        names -= {"format_version"}
    for name in sorted(names):
        if name not in found or written.get(name) != section_hash(name, manifest.raw[name]):
            raise ArtifactError(
                f"{MANIFEST} was changed, or belongs to another {GRAPH}: its section {name!r} is not the one that the "
                "graph was exported with; export it again"
            )


def section_hash(name: str, section: Any) -> str:
    """sha256 of a section as JSON, keys sorted, without spaces, in ASCII. `files` without the graph's own entry, whose
    file holds the hash."""
    if name == "files":
        section = {file: entry for file, entry in section.items() if file != GRAPH}
    canonical = json.dumps(section, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _written_sections(onnx: onnxruntime.InferenceSession) -> dict[str, str]:
    try:
        content = onnx.get_modelmeta().custom_metadata_map[SECTIONS]
        sections = parse_json(content.encode())
        table(text())(sections, SECTIONS)
    except KeyError as error:
        raise ArtifactError(f"{GRAPH} does not say which {MANIFEST} belongs to it; export it again") from error
    except (DamagedError, ValueError) as error:
        raise ArtifactError(f"the metadata {SECTIONS} of {GRAPH} is damaged: {error}; export it again") from error
    return dict(sections)
