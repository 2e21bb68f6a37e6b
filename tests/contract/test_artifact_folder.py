"""The ARTIFACT folder: what docs/ARTIFACT.md promises of its files, checked on an export."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import uses_external_data
from tokenizers import Tokenizer

from export.passes import Stage, ordered_passes
from runtime.inspect import format_summary, summarize
from runtime.json_checks import Record
from runtime.manifest import read_manifest
from runtime.schema import FORMAT_VERSION, SCHEMAS
from tests.builders import make_base_folder, make_siamese, save_tiny_checkpoint
from tests.exported import Exported, export_existing, export_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def proto(tiny: Exported) -> onnx.ModelProto:
    return onnx.load(tiny.artifact / "model.onnx", load_external_data=False)


def test_the_folder_has_exactly_the_files_that_the_manifest_names(tiny: Exported) -> None:
    names = {path.name for path in tiny.artifact.iterdir()}
    assert names == {*tiny.manifest["files"], "imsm_model.json"}
    assert names == {"model.onnx", "model.onnx.data", "imsm_model.json", "tokenizer.json", "generation_config.json"}


def test_sizes_and_hashes_are_the_files(tiny: Exported) -> None:
    for name, entry in tiny.manifest["files"].items():
        content = (tiny.artifact / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_every_weight_is_external_and_in_one_file(proto: onnx.ModelProto) -> None:
    large = [tensor for tensor in proto.graph.initializer if np.prod(tensor.dims) > 64]  # 256 bytes
    assert large
    assert all(uses_external_data(tensor) for tensor in large)
    locations = {entry.value for tensor in large for entry in tensor.external_data if entry.key == "location"}
    assert locations == {"model.onnx.data"}


def test_inputs_and_outputs_are_those_of_the_manifest(tiny: Exported, proto: onnx.ModelProto) -> None:
    for side, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        found = [
            (value.name, [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim])
            for value in values
        ]
        assert found == [(entry["name"], entry["shape"]) for entry in tiny.manifest["graph"][side]]


def test_tables_of_a_rotation_inside_attention_have_rows_for_the_padding(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, head_dim=16)
    graph, model = exported.manifest["graph"], exported.manifest["model"]
    assert graph["rotary"] == "fused"
    proto = onnx.load(exported.artifact / "model.onnx", load_external_data=False)
    sizes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    tables = {
        sizes[name][0] for node in proto.graph.node if node.op_type == "GroupQueryAttention" for name in node.input[7:9]
    }
    assert tables == {model["context_length"] + graph["padding"]}


def test_each_layer_has_one_attention_node_for_the_rows_of_both_streams(proto: onnx.ModelProto) -> None:
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("GroupQueryAttention") == 2
    assert kinds.count("GatherND") == 2  # the wanted positions, before the gate and the lm_head


def test_every_backbone_projection_is_one_product_for_both_streams(proto: onnx.ModelProto) -> None:
    weights = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    shapes = [weights.get(node.input[1]) for node in proto.graph.node if node.op_type == "MatMul"]
    assert shapes.count([32, 259]) == 1  # lm_head
    assert shapes.count([60, 32]) == 2  # down_proj of two layers


def test_the_graph_holds_no_paths_of_the_machine_that_made_it(tiny: Exported) -> None:
    content = (tiny.artifact / "model.onnx").read_bytes()
    assert b"site-packages" not in content
    assert str(ROOT).encode() not in content


def test_the_schema_document_describes_every_key_and_tensor(tiny: Exported) -> None:
    text = (ROOT / "docs" / "ARTIFACT.md").read_text(encoding="utf-8")
    for key in tiny.manifest:
        assert f"`{key}`" in text, f"docs/ARTIFACT.md does not describe {key}"
    for entry in (*tiny.manifest["graph"]["inputs"], *tiny.manifest["graph"]["outputs"]):
        name = entry["name"]
        if name.startswith(("past_key_values.", "present.")):
            name = name.split(".")[0] + ".{group}.{layer}.{part}"
        assert f"`{name}`" in text, f"docs/ARTIFACT.md does not describe {name}"


def keys_of(check: Any) -> set[str]:
    """The names of what a manifest must hold, at every depth."""
    found: set[str] = set()
    for cell in getattr(check, "__closure__", None) or ():
        found |= keys_of(cell.cell_contents) if callable(cell.cell_contents) else set()
    for name, inner in check.fields.items() if isinstance(check, Record) else ():
        found |= {name} | keys_of(inner)
    return found


def test_the_schema_document_and_the_runtimes_schema_have_the_same_keys(tiny: Exported) -> None:
    text = (ROOT / "docs" / "ARTIFACT.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text.split("## The manifest")[1].split("## The graph")[0], re.MULTILINE)
    documented = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert documented == {*SCHEMAS[FORMAT_VERSION].fields} == {*tiny.manifest}
    manifest_part = text.split("## The manifest")[1].split("### What is checked")[0]
    known = keys_of(SCHEMAS[FORMAT_VERSION])
    assert len(known) > 60
    for key in known:
        assert f"`{key}`" in manifest_part, f"docs/ARTIFACT.md does not describe {key}"


def test_the_graph_holds_the_hash_of_every_section(tiny: Exported, proto: onnx.ModelProto) -> None:
    written = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}["imsm.sections"]
    assert written.keys() == tiny.manifest.keys()
    for name, found in written.items():
        section = tiny.manifest[name]
        if name == "files":
            section = {file: entry for file, entry in section.items() if file != "model.onnx"}
        canonical = json.dumps(section, sort_keys=True, separators=(",", ":"))
        assert found == hashlib.sha256(canonical.encode("ascii")).hexdigest()


def test_end_tokens_that_the_model_cannot_give_are_left_out_and_its_own_generation_is_told(tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base")
    config = json.loads((base / "generation_config.json").read_text())
    own = {"do_sample": True, "top_k": 64, "top_p": 0.95}
    (base / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 259, 10**6], **own}))
    model = make_siamese(base)
    info = save_tiny_checkpoint(model, base, tmp_path / "checkpoint")
    exported = export_existing(tmp_path, base, model, info)
    assert exported.manifest["tokens"]["eos_token_ids"] == [1]
    assert read_manifest(exported.artifact).generation == {"temperature": 1.0, **own}
    assert "\ngeneration   temperature 1, top_k 64, top_p 0.95\n" in format_summary(summarize(exported.artifact))


def test_every_pass_says_how_often_it_fired_and_why_it_did_not(tiny: Exported) -> None:
    passes = tiny.manifest["passes"]
    assert [*passes] == [
        step.apply.name for step in ordered_passes() if step.stage in (Stage.BEFORE_QUANTIZATION, Stage.CLEANING)
    ]
    for entry in passes.values():
        assert entry["fired"] >= 0
        assert set(entry) <= {"fired", "declined"}
    assert passes["fuse_silu"] == {"fired": 2}
    assert passes["use_own_attention"] == {"fired": 0, "declined": {"heads of 8 have no kernel": 2}}


def test_the_tokenizer_is_the_base_models(tiny: Exported) -> None:
    ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tiny.artifact, tiny.base))
    text = "Ünïcode, 東京 and\ttabs"
    assert ours.encode(text).ids == theirs.encode(text).ids


def test_the_manifest_is_json_with_a_format_version(tiny: Exported) -> None:
    document = json.loads((tiny.artifact / "imsm_model.json").read_text())
    assert document["format_version"] == FORMAT_VERSION == 7
    assert document["producers"]["torch"]
    assert document["tokens"]["eos_token_ids"] == [1]
