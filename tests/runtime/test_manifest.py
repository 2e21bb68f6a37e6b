"""Reading a manifest, and the folder around it: what is refused, and what the runtime computes from it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from runtime import ArtifactError, generate, load
from runtime.console import run_commands
from runtime.folder import check_files, unlisted_files
from runtime.inspect import format_summary, summarize
from runtime.json_checks import parse_json
from runtime.manifest import StepReads, read_manifest
from runtime.printable import printable, shortened
from runtime.quality import read_quality
from tests.exported import PROMPT, Exported, copied, edit_manifest
from tests.older_formats import as_format

ROOT = Path(__file__).resolve().parents[2]
DIFFERENCE = {
    "argmax_agreement": 0.9,
    "mean_kl": 0.0312,
    "perplexity_reference": 10.0,
    "perplexity": 10.114,
    "perplexity_change": 0.0114,
}


def quality(**changes: Any) -> dict[str, Any]:
    """The manifest's section of a measured artifact."""
    memories = {
        name: DIFFERENCE | {"mean_kl": kl} for name, kl in (("blend", 0.0312), ("base", 0.022), ("adapter", 0.03))
    }
    return {"file": "gsm.jsonl", "texts": 40, "tokens": 5047, **memories, **changes}


def test_a_table_costs_a_row_per_token_up_to_all_of_them() -> None:
    reads = StepReads(whole=1000, rows=((32, 100), (8, 3)), experts=())
    assert [reads.bytes_per_step(tokens) - 1000 for tokens in (1, 5, 500)] == [40, 5 * 32 + 24, 3200 + 24]
    assert reads.bytes_per_step(5, streams=2) == reads.bytes_per_step(5)  # both streams look up the same tokens


def test_experts_cost_those_that_the_tokens_of_both_streams_may_be_routed_to() -> None:
    reads = StepReads(whole=0, rows=(), experts=((80, 10, 2),))
    assert [reads.bytes_per_step(*size) for size in ((1,), (1, 2), (3, 2))] == [160, 320, 800]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff{}", "not UTF-8 at byte 0"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b'{"a": NaN}', "NaN is no number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": 1, "a": 2}', 'the key "a" is there twice'),
        (rb'{"a": "\ud83d"}', "lone surrogate"),
        (b"[" * 51 + b"]" * 51, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": 1', "delimiter"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_not_json_is_named_in_one_line(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_json(content)
    assert printable(str(error.value)) == str(error.value)


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff", b"[]", b"5", b"null", b'{"format_version": true}', b"{}"])
def test_a_file_that_is_no_manifest_is_one_error(tiny: Exported, tmp_path: Path, content: bytes) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    (artifact / "imsm_model.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"imsm_model\.json is damaged: .*; export it again$"):
        read_manifest(artifact)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("shared_layers", -1, "shared_layers is -1; it must be a whole number from 0 to 2147483647"),
        ("shared_layers", True, "shared_layers is true; it must be a whole number"),
        ("shared_layers", 0.0, "shared_layers is 0.0; it must be a whole number"),
        ("shared_layers", 3, "shared_layers is 3; it must be 0 to 2 here"),
        ("precision", "fp16", 'activations is "float32"; it must be float16, as precision is fp16'),
        ("precision", "fp8", 'precision is "fp8"; it must be one of fp32, fp16, bf16, int8, int4'),
        ("kv_cache", "int8", r"graph.inputs\[11\] \(past_key_values.both.0.key\) is .*it must be int8"),
        ("streams", ["adapter", "base"], 'streams is "adapter, base"; it must be base, or base and adapter'),
        ("streams", [], "streams is a list of 0; it must be a list of at least 1"),
        ("gate", None, "gate is null; it must be an object with two streams"),
        ("gate", {"kind": "token", "rank": 0}, "gate.rank is 0; it must be at least 1 in a token gate"),
        ("virtual_tokens", {"base": 1, "adapter": 0}, "virtual_tokens.base is 1; it must be 0"),
        ("virtual_tokens", {"base": 0, "adapter": 3}, r"files has no virtual_tokens\.npz"),
        ("training", [], "training is a list of 0; it must be an object"),
        ("created", 5, "created is 5; it must be text"),
        ("quality", quality(blend=None), "quality.blend is null; it must be an object with two streams"),
        ("quality", quality(base=None), "quality.base is null; it must be an object"),
        ("quality", quality(file=1), "quality.file is 1; it must be text"),
        ("quality", {"texts": 4, "tokens": 99, **DIFFERENCE}, "quality.file is missing"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_its_rule(
    tiny: Exported, tmp_path: Path, section: str, value: Any, message: str
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, **{section: value})
    with pytest.raises(ArtifactError, match=message):
        read_manifest(artifact)


def test_a_wrong_value_inside_a_list_is_named_with_its_index(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    cache = tiny.manifest["cache"]
    edit_manifest(artifact, cache=[cache[0], cache[1] | {"kv_heads": -1}])
    with pytest.raises(ArtifactError, match=r"cache\[1\].kv_heads is -1; it must be a whole number from 1 to 65536"):
        read_manifest(artifact)
    edit_manifest(artifact, cache=[cache[0], {"groups": ["both"], "head_size": 8}])
    with pytest.raises(ArtifactError, match=r"cache\[1\].kv_heads is missing"):
        read_manifest(artifact)


def test_keys_that_are_not_known_are_not_looked_at(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, later={"a": [1]}, parity=tiny.manifest["parity"] | {"later": None})
    assert read_manifest(artifact).raw["later"] == {"a": [1]}
    load(artifact)


@pytest.mark.parametrize(
    "change",
    [{"context_length": 127}, {"context_length": 129}, {"context_length": 10**6}, {"architecture": "gpt2"}],
)
def test_what_only_an_export_can_change_is_compared_with_the_graph(
    tiny: Exported, tmp_path: Path, change: dict[str, Any]
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, model=tiny.manifest["model"] | change)
    with pytest.raises(ArtifactError, match="its section 'model' is not the one that the graph was exported with"):
        load(artifact)


@pytest.mark.parametrize("streams", [["base", "adapter"], ["base"]])
def test_the_quality_of_format_5_is_that_of_who_speaks(streams: list[str]) -> None:
    document = {"format_version": 5, "streams": streams, "quality": {"texts": 4, "tokens": 99, **DIFFERENCE}}
    found = read_quality(document)
    assert found is not None
    assert found.keys() == quality().keys()
    assert (found["file"], found["texts"], found["tokens"]) == (None, 4, 99)
    speaker = "blend" if len(streams) > 1 else "base"
    assert {name for name in ("blend", "base", "adapter") if found[name] is not None} == {speaker}
    assert found[speaker] == DIFFERENCE
    assert read_quality(document | {"quality": None}) is None


def test_an_artifact_of_format_5_runs_and_verifies(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    as_format(5, artifact, tiny.manifest | {"quality": {"texts": 4, "tokens": 99, **DIFFERENCE}})
    assert json.loads((artifact / "imsm_model.json").read_text())["format_version"] == 5
    assert (
        generate(load(artifact), PROMPT, max_new_tokens=4).token_ids
        == generate(load(tiny.artifact), PROMPT, max_new_tokens=4).token_ids
    )
    assert command("verify", artifact) == 0
    capsys.readouterr()
    assert command("inspect", artifact) == 0
    assert capsys.readouterr().out.splitlines()[1] == "quality      blend KL 0.031; +1.1 % perplexity on 99 tokens"
    edit_manifest(artifact, model=tiny.manifest["model"] | {"context_length": 127})
    with pytest.raises(ArtifactError, match="its section 'model' is not the one that the graph was exported with"):
        load(artifact)
    edit_manifest(artifact, model=tiny.manifest["model"], format_version=6)
    with pytest.raises(ArtifactError, match=r"quality\.file is missing"):
        load(artifact)
    edit_manifest(artifact, quality=None)
    with pytest.raises(ArtifactError, match="its section 'format_version' is not the one that the graph was exported"):
        load(artifact)


def test_what_may_be_edited_is_loaded_and_verify_says_that_it_was(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, tokens=tiny.manifest["tokens"] | {"eos_token_ids": [1, 7]})
    assert load(artifact).session.manifest.eos_token_ids == (1, 7)
    assert command("verify", artifact) == 2
    assert "its section 'tokens' is not the one" in capsys.readouterr().err


def test_a_graph_that_names_no_manifest_is_refused(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    proto = onnx.load(artifact / "model.onnx", load_external_data=False)
    del proto.metadata_props[:]
    replace_graph(artifact, proto)
    with pytest.raises(ArtifactError, match=r"model\.onnx does not say which imsm_model\.json belongs to it"):
        load(artifact)
    proto.metadata_props.add(key="imsm.sections", value="[")
    replace_graph(artifact, proto)
    with pytest.raises(ArtifactError, match=r"the metadata imsm.sections of model.onnx is damaged"):
        load(artifact)


def replace_graph(artifact: Path, proto: onnx.ModelProto) -> None:
    path = artifact / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    files = json.loads((artifact / "imsm_model.json").read_text())["files"]
    edit_manifest(artifact, files=files | {path.name: files[path.name] | {"bytes": path.stat().st_size}})


def command(*arguments: object) -> int:
    from runtime.cli.register import register

    return run_commands("imsm", [register], [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["chat_template.jinja", "virtual_tokens.npz", "Tokenizer.JSON", "MODEL.onnx.data"])
def test_a_file_that_would_be_read_must_be_in_the_manifest(tiny: Exported, tmp_path: Path, name: str) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    (artifact / name).write_text("x")
    with pytest.raises(ArtifactError, match=f"has {re.escape(name)}, which its imsm_model.json does not name; remove"):
        check_files(artifact, read_manifest(artifact), hashes=False)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_what_every_artifact_has_must_be_in_the_manifest(tiny: Exported, tmp_path: Path, name: str) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, files={key: entry for key, entry in tiny.manifest["files"].items() if key != name})
    with pytest.raises(ArtifactError, match=f"files has no {re.escape(name)}; export"):
        load(artifact)


def test_other_files_are_left_alone_and_named_by_verify(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    (artifact / "README.md").write_text("mine")
    (artifact / ".git").mkdir()
    (artifact / "\x1b[2J").write_text("")
    assert unlisted_files(artifact, read_manifest(artifact)) == ["\x1b[2J", ".git", "README.md"]
    assert command("verify", artifact) == 0
    printed = capsys.readouterr().out
    assert "README.md is not part of the artifact" in printed
    assert r"\x1b[2J is not part of the artifact" in printed


def test_weights_in_a_file_that_the_manifest_does_not_name_are_refused(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    proto = onnx.load(artifact / "model.onnx", load_external_data=False)
    shutil.copy(artifact / "model.onnx.data", artifact / "weights.bin")
    moved = next(tensor for tensor in proto.graph.initializer if tensor.external_data)
    next(entry for entry in moved.external_data if entry.key == "location").value = "weights.bin"
    replace_graph(artifact, proto)
    with pytest.raises(ArtifactError, match=r"has weights in weights\.bin, which imsm_model\.json does not name"):
        load(artifact)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "/etc/passwd", "a\\b", "a\x00", "a\nb", "IMSM_model.json"])
def test_a_name_that_is_a_path_or_another_names_is_refused(tiny: Exported, tmp_path: Path, name: str) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, files=tiny.manifest["files"] | {name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(ArtifactError, match="a name in files is "):
        load(artifact)


@pytest.mark.parametrize("name", ["imsm_model.json", "model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(tiny: Exported, tmp_path: Path, name: str) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    (artifact / name).unlink()
    os.mkfifo(artifact / name)
    with pytest.raises(ArtifactError, match=f"{re.escape(name)} is not a regular file"):
        load(artifact)


def test_a_folder_of_links_as_the_hubs_cache_has_them_is_an_artifact(tiny: Exported, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny.artifact.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    session, ours = load(snapshot).session, load(tiny.artifact).session
    found = session.prefill(session.new_state(), [PROMPT]).logits
    assert (found == ours.prefill(ours.new_state(), [PROMPT]).logits).all()
    assert command("verify", snapshot) == 0


def test_a_link_that_leads_nowhere_is_a_missing_file(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    (artifact / "tokenizer.json").unlink()
    (artifact / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        load(artifact)
    (artifact / "tokenizer.json").unlink()
    (artifact / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read"):
        load(artifact)


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "nowhere/at/all"])
def test_a_path_that_cannot_be_is_no_artifact(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact at .*: the folder does not exist"):
        read_manifest(tmp_path / name)


def test_values_in_messages_are_short_and_on_one_line() -> None:
    assert printable("a\x1b[31m\nb\u202e\udc80") == r"a\x1b[31m\nb\u202e\udc80"
    assert shortened("x" * 99) == '"' + "x" * 60 + '..."'
    assert shortened(10**10000) == "a number of more than 100 digits"
    values: list[Any] = [None, True, 1.5, [1], {}]
    assert [shortened(value) for value in values] == ["null", "true", "1.5", "a list of 1", "an object of 0"]


QUANTIZATION: dict[str, Any] = {
    "bits": 4,
    "block_size": 32,
    "symmetric": True,
    "rounding": "best",
    "mean_bits": 4.6,
    "widths": {"4": 30, "5": 10, "6": 10},
    "matrices": 9,
    "embeddings": 1,
    "experts": 0,
    "calibrated": 9,
    "bytes": 5,
    "kept_bytes": 0,
}
FORMAT_5 = {key: value for key, value in QUANTIZATION.items() if key not in ("rounding", "mean_bits", "widths")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_bits": 5.5}, r"quantization\.mean_bits is 5\.5; it must be 4\.6, as widths say"),
        ({"mean_bits": None}, r"quantization\.mean_bits is null; it must be 4\.6, as widths say"),
        ({"widths": {}}, r"quantization\.mean_bits is 4\.6; it must be null, as there are none"),
        ({"widths": {"3": 5}}, r'a width in quantization\.widths is "3"; it must be one of 4, 5, 6, 8'),
        ({"rounding": "worst"}, r'quantization\.rounding is "worst"; it must be one of best, nearest'),
        ({"widths": {"4": -1}}, r"quantization\.widths.*is -1; it must be a whole number"),
        ({"mean_bits": 9}, r"quantization\.mean_bits is 9; it must be a number from 4 to 8"),
    ],
)
def test_widths_and_their_mean_agree(tiny: Exported, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, precision="int4", quantization=QUANTIZATION)
    assert read_manifest(artifact).raw["quantization"] == QUANTIZATION
    edit_manifest(artifact, quantization=QUANTIZATION | change)
    with pytest.raises(ArtifactError, match=message):
        read_manifest(artifact)
    edit_manifest(artifact, quantization=FORMAT_5)
    with pytest.raises(ArtifactError, match=r"quantization\.rounding is missing"):
        read_manifest(artifact)


def test_format_5_has_one_width(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    as_format(5, artifact, tiny.manifest | {"precision": "int4", "quantization": FORMAT_5})
    assert summarize(artifact)["mean_bits"] is None
    assert format_summary(summarize(artifact)).splitlines()[0].endswith("MB, int4")
