"""imsm_model.json: the only contract between the exporter and this package. docs/ARTIFACT.md explains it, `schema` and
`relations` check it.

Knows nothing about onnxruntime.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .files import MANIFEST, read_file, reason, shown
from .json_checks import parse_json
from .quality import read_quality
from .relations import check_relations
from .schema import FORMAT_VERSION, SCHEMAS

MOST_BYTES = 2**26
"""Of the manifest's own file: the largest known has 2**20."""


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
    per stream, how many stand before the text. padding: positions past the context that a ragged step may pad to.
    special_tokens: by the name that a chat template knows them by. raw_prompts: whether the model was tuned on prompts
    without the chat template. quality: as the newest format has it, whatever the artifact's; None: not measured."""

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
    quality: dict[str, Any] | None
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
    def generation(self) -> dict[str, Any]:
        """How the model generates by default, by transformers' names: `do_sample` and what else it sets; empty in
        formats 5 and 6."""
        return dict(self.raw["generation"]) if self.raw["format_version"] > 6 else {}

    @property
    def by_memory(self) -> bool:
        """Whether the graph gives logits of one memory alone, and takes a bias for each position."""
        return any(signature.name == "memory" for signature in self.inputs)

    @property
    def batched_chunks(self) -> bool:
        """Whether the graph continues the caches of several rows by more than one token at once."""
        return any(signature.name == "query_seqlens" for signature in self.inputs)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest. Raises ArtifactError naming what is missing, damaged or contradicts itself."""
    if not os.path.isdir(folder):  # pathlib raises where a folder may not be searched
        raise ArtifactError(f"no artifact at {shown(folder)}: the folder does not exist")
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise ArtifactError(f"{shown(folder)} is not an artifact: it has no {MANIFEST}")
    content = read_file(path, MOST_BYTES)
    try:
        document = parse_json(content)
        version = document.get("format_version") if isinstance(document, dict) else None
        if type(version) is not int:
            version = FORMAT_VERSION  # its schema says what is wrong
        if version not in SCHEMAS:
            *others, newest = map(str, SCHEMAS)
            raise ArtifactError(
                f"{shown(path)} has format version {version}; this program reads {', '.join(others)} and {newest}; "
                + ("it is older than the artifact" if version > FORMAT_VERSION else "export it again")
            )
        SCHEMAS[version](document, "")
        check_relations(document)
    except (ValueError, MemoryError) as error:
        raise ArtifactError(f"{shown(path)} is damaged: {reason(error)}; export it again") from error
    return _parse(document)


def _parse(document: dict[str, Any]) -> Manifest:
    """document: one that the schema lets pass."""
    model, graph, gate, tokens = document["model"], document["graph"], document["gate"], document["tokens"]
    return Manifest(
        architecture=model["architecture"],
        hidden_size=model["hidden_size"],
        vocab_size=model["vocab_size"],
        context_length=model["context_length"],
        precision=document["precision"],
        streams=tuple(document["streams"]),
        gate_kind=None if gate is None else gate["kind"],
        layers=tuple(
            LayerCache(layer["kv_heads"], layer["head_size"], tuple(layer["groups"])) for layer in document["cache"]
        ),
        virtual_tokens=document["virtual_tokens"],
        inputs=tuple(map(_signature, graph["inputs"])),
        outputs=tuple(map(_signature, graph["outputs"])),
        padding=graph["padding"],
        reads=_step_reads(document["reads"]),
        eos_token_ids=tuple(tokens["eos_token_ids"]),
        special_tokens=tokens["special_tokens"],
        raw_prompts=document["prompts"]["raw"],
        quality=read_quality(document),
        files={name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in document["files"].items()},
        raw=document,
    )


def _signature(entry: dict[str, Any]) -> TensorSignature:
    return TensorSignature(entry["name"], entry["dtype"], tuple(entry["shape"]))


def _step_reads(entry: dict[str, Any]) -> StepReads:
    return StepReads(
        whole=entry["bytes"],
        rows=tuple((table["bytes"], table["rows"]) for table in entry["rows"]),
        experts=tuple((part["bytes"], part["experts"], part["top_k"]) for part in entry["experts"]),
    )
