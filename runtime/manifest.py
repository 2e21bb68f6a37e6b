"""imsm_model.json: the only contract between the exporter and this package. docs/ARTIFACT.md is its schema.

Knows nothing about onnxruntime.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError

MANIFEST, GRAPH, VIRTUAL_TOKENS = "imsm_model.json", "model.onnx", "virtual_tokens.npz"
FORMAT_VERSION = 5


@dataclass(frozen=True)
class TensorSignature:
    """An input or output of the graph. dtype as NumPy spells it; symbolic dimensions are names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class LayerCache:
    """Geometry of one layer's key and value: (rows, kv_heads, length, head_size) each. groups: the groups of rows that
    have a cache in this layer: "base", "adapter", "both" (two rows a text, the base's first) or "shared"."""

    kv_heads: int
    head_size: int
    groups: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hexadecimal sha256 of one file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StepReads:
    """Bytes of weights that a step reads. whole: in every step. rows: (bytes of a row, rows) of tables. experts: (bytes
    of an expert, experts, how many of them each token of a stream is routed to)."""

    whole: int
    rows: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int, int], ...]

    def bytes_per_step(self, tokens: int, streams: int = 1) -> int:
        """Bytes that a step over `tokens` new tokens of all texts must read: a row of each table per token, and in each
        of `streams` the experts of every token, all different ones in the worst case."""
        rows = sum(size * min(tokens, count) for size, count in self.rows)
        experts = sum(size * min(tokens * streams * top_k, count) for size, count, top_k in self.experts)
        return self.whole + rows + experts


@dataclass(frozen=True)
class Manifest:
    """What the runtime relies on. `raw` is the whole document. gate_kind: None in a base-only artifact. virtual_tokens:
    per stream, how many stand before the text. padding: positions past the context that a ragged step may pad to. special_tokens: by the name that a chat
    template knows them by. raw_prompts: whether the model was tuned on prompts without the chat template."""

    architecture: str
    hidden_size: int
    vocab_size: int
    context_length: int
    precision: str
    streams: tuple[str, ...]
    gate_kind: str | None
    layers: tuple[LayerCache, ...]
    virtual_tokens: dict[str, int]
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    padding: int
    reads: StepReads
    eos_token_ids: tuple[int, ...]
    special_tokens: dict[str, str]
    raw_prompts: bool
    files: dict[str, FileEntry]
    raw: dict[str, Any]

    @property
    def groups(self) -> dict[str, dict[int, LayerCache]]:
        """The layers of every group of rows that has caches, by their index."""
        found: dict[str, dict[int, LayerCache]] = {}
        for index, layer in enumerate(self.layers):
            for group in layer.groups:
                found.setdefault(group, {})[index] = layer
        return found

    @property
    def batched_chunks(self) -> bool:
        """Whether the graph continues the caches of several rows by more than one token at once."""
        return any(signature.name == "query_seqlens" for signature in self.inputs)


def read_manifest(folder: Path) -> Manifest:
    """Parse the manifest. Raises ArtifactError naming what is missing or damaged."""
    if not folder.is_dir():
        raise ArtifactError(f"no artifact at {folder}: the folder does not exist")
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}; this program reads {FORMAT_VERSION}; export it again"
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__} at {error}") from error


def check_files(folder: Path, manifest: Manifest, hashes: bool) -> None:
    """Every file that the manifest names exists and has the right size and, with `hashes`, the right sha256.

    Raises ArtifactError naming the first file that does not.
    """
    if GRAPH not in manifest.files:
        raise ArtifactError(f"{folder / MANIFEST} names no {GRAPH}")
    for name, entry in manifest.files.items():
        if Path(name).name != name:
            raise ArtifactError(f"{folder / MANIFEST} names {name!r}, which is outside the folder")
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder} has no {name}; export it again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{path} has {size} bytes, not {entry.bytes}: it is truncated or was replaced")
        if hashes and _sha256(path) != entry.sha256:
            raise ArtifactError(f"{path} was changed: its sha256 differs from the manifest's")


def _parse(document: dict[str, Any]) -> Manifest:
    model, graph, gate, tokens = document["model"], document["graph"], document["gate"], document["tokens"]
    return Manifest(
        architecture=str(model["architecture"]),
        hidden_size=int(model["hidden_size"]),
        vocab_size=int(model["vocab_size"]),
        context_length=int(model["context_length"]),
        precision=str(document["precision"]),
        streams=tuple(document["streams"]),
        gate_kind=None if gate is None else str(gate["kind"]),
        layers=tuple(
            LayerCache(int(layer["kv_heads"]), int(layer["head_size"]), tuple(layer["groups"]))
            for layer in document["cache"]
        ),
        virtual_tokens={stream: int(count) for stream, count in document["virtual_tokens"].items()},
        inputs=tuple(map(_signature, graph["inputs"])),
        outputs=tuple(map(_signature, graph["outputs"])),
        padding=_number(graph["padding"], 1),
        reads=_step_reads(document["reads"]),
        eos_token_ids=tuple(int(token) for token in tokens["eos_token_ids"]),
        special_tokens={str(name): str(token) for name, token in tokens["special_tokens"].items()},
        raw_prompts=bool(document["prompts"]["raw"]),
        files={name: FileEntry(int(entry["bytes"]), str(entry["sha256"])) for name, entry in document["files"].items()},
        raw=document,
    )


def _signature(entry: dict[str, Any]) -> TensorSignature:
    return TensorSignature(entry["name"], entry["dtype"], tuple(entry["shape"]))


def _number(value: Any, least: int = 0) -> int:
    number = int(value)
    if number < least:
        raise ValueError(f"{number}, which is below {least}")
    return number


def _step_reads(entry: dict[str, Any]) -> StepReads:
    return StepReads(
        whole=_number(entry["bytes"]),
        rows=tuple((_number(table["bytes"]), _number(table["rows"])) for table in entry["rows"]),
        experts=tuple(
            (_number(part["bytes"]), _number(part["experts"]), _number(part["top_k"])) for part in entry["experts"]
        ),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
