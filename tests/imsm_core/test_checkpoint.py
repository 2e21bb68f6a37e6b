"""The CHECKPOINT folder: written whole, read back by value, and refused with one line when it is damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from imsm_core.backbone import load_base_model
from imsm_core.checkpoint import CheckpointInfo, load_checkpoint, read_info, save_checkpoint
from imsm_core.errors import AdapterError, BaseModelError, CheckpointError, OutputExistsError
from imsm_core.gates import GATES
from imsm_core.reference import reference_generate
from tests.builders import make_base_folder, make_siamese, save_tiny_checkpoint

PROMPT = [0, 70, 80, 90]


@pytest.fixture(scope="module")
def saved(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_tiny_checkpoint(make_siamese(base_folder), base_folder, folder)
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit_info(folder: Path, **changes: object) -> None:
    fields = json.loads((folder / "imsm.json").read_text()) | changes
    (folder / "imsm.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "REMOVED"}))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("name", ["base_folder", "qwen2_folder", "gpt2_folder"])
def test_checkpoint_round_trip_keeps_every_value(
    tmp_path: Path, kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    base_folder = request.getfixturevalue(name)
    model = make_siamese(base_folder, kind)
    info = save_tiny_checkpoint(model, base_folder, tmp_path / "checkpoint")
    loaded, loaded_info = load_checkpoint(tmp_path / "checkpoint")
    assert loaded_info == info
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for old, new in zip(reference_generate(model, PROMPT, 3), reference_generate(loaded, PROMPT, 3), strict=True):
        assert torch.equal(old.logits, new.logits)


def test_loaded_model_is_frozen_and_in_eval_mode_and_stays_so(saved: Path) -> None:
    model, _ = load_checkpoint(saved)
    for _ in range(2):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module.training for module in model.modules())
        reference_generate(model, PROMPT, 1)


def test_folder_holds_what_its_contract_names(saved: Path) -> None:
    files = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
    needed = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "gate.safetensors", "imsm.json"]
    assert [file for file in files if not file.endswith("README.md")] == needed
    gate = load_file(saved / "gate.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in gate.items()} == {
        "gate_down.weight": (3, 4 * 32),
        "gate_up.weight": (32, 3),
    }
    assert {tensor.dtype for tensor in gate.values()} == {torch.float32}
    assert json.loads((saved / "imsm.json").read_text())["format_version"] == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_alone_loads_the_adapter(base_folder: Path, saved: Path) -> None:
    alone: Any = PeftModel.from_pretrained(load_base_model(str(base_folder)), str(saved / "adapter")).eval()
    states = load_checkpoint(saved)[0].stream_states(torch.tensor([PROMPT]))
    with torch.no_grad():
        hidden = alone.get_base_model().model(torch.tensor([PROMPT])).last_hidden_state
    torch.testing.assert_close(hidden, states.adapter)
    assert (states.adapter - states.base).abs().mean() > 0.05


def test_adapter_does_not_carry_the_embeddings(saved: Path) -> None:
    assert all("lora_" in name for name in load_file(saved / "adapter" / "adapter_model.safetensors"))


def test_existing_folder_is_kept_without_force_and_replaced_with_it(base_folder: Path, checkpoint: Path) -> None:
    other = make_siamese(base_folder, "token", seed=9)
    with pytest.raises(OutputExistsError, match="exists and is kept"):
        save_tiny_checkpoint(other, base_folder, checkpoint)
    assert read_info(checkpoint).gate_kind == "query_aware"
    save_tiny_checkpoint(other, base_folder, checkpoint, force=True)
    assert read_info(checkpoint).gate_kind == "token"
    loaded = load_checkpoint(checkpoint)[0]
    assert torch.equal(*(model.gate.get_parameter("gate_up.weight") for model in (loaded, other)))


def test_failure_while_saving_leaves_nothing(base_folder: Path, saved: Path, tmp_path: Path) -> None:
    info = replace(read_info(saved), metrics={"not json": object()})
    with pytest.raises(TypeError):
        save_checkpoint(make_siamese(base_folder), info, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_base_model_is_refused_by_its_fingerprint(checkpoint: Path, tmp_path: Path) -> None:
    other = make_base_folder(tmp_path / "other", seed=1)
    with pytest.raises(BaseModelError, match=r"is not the base model of .*: its fingerprint is"):
        load_checkpoint(checkpoint, str(other))


def test_base_model_may_have_moved(base_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base_folder, tmp_path / "moved")
    edit_info(checkpoint, base_model="/no/longer/here")
    with pytest.raises(BaseModelError, match="no base model at '/no/longer/here'"):
        load_checkpoint(checkpoint)
    assert load_checkpoint(checkpoint, str(moved))[1].base_model == "/no/longer/here"


@pytest.mark.parametrize(
    "name", ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "gate.safetensors"]
)
def test_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"is not a complete checkpoint: it has no {name}"):
        load_checkpoint(checkpoint)


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no imsm\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_gate_is_refused(checkpoint: Path, keep: int) -> None:
    file = checkpoint / "gate.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"gate\.safetensors cannot be read"):
        load_checkpoint(checkpoint)


def test_truncated_adapter_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="cannot load the adapter in"):
        load_checkpoint(checkpoint)


def test_gate_that_is_not_finite_is_refused(checkpoint: Path) -> None:
    gate = load_file(checkpoint / "gate.safetensors")
    gate["gate_up.weight"][3, 1] = torch.inf
    save_file(gate, checkpoint / "gate.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2; this program reads 1"),
        ({"format_version": "REMOVED"}, "is damaged: it has no format_version"),
        ({"invented": 1}, "is damaged: it has the unknown field 'invented'"),
        ({"gate_kind": "REMOVED"}, "is damaged: it has no gate_kind"),
        ({"gate_kind": "mode5"}, "gate_kind is 'mode5'; it must be one of query_aware, "),
        ({"gate_kind": "token"}, "does not fit a token gate of rank 3"),
        ({"gate_rank": 4}, "does not fit a query_aware gate of rank 4"),
        ({"gate_rank": 0}, "gate_rank is 0"),
        ({"gate_rank": "3"}, "is damaged: gate_rank is '3'"),
        ({"base_model": None}, "is damaged: base_model is None"),
        ({"metrics": []}, r"is damaged: metrics is \[\]"),
        (
            {"quantized_backbone": {"precision": "int4", "block_size": 2**100}},
            "quantized_backbone has 'block_size': 1267",
        ),
        ({"quantized_backbone": {"precision": "int4", "block_size": "x"}}, "quantized_backbone has 'block_size': 'x'"),
        ({"quantized_backbone": {"precision": "int3"}}, "damaged in quantized_backbone: .* is int3"),
        ({"quantized_backbone": {"bits\n": 4}}, r"quantized_backbone has 'bits\\n': 4"),
    ],
)
def test_bad_field_is_named(checkpoint: Path, changes: dict[str, object], message: str) -> None:
    edit_info(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"null"])
def test_info_that_is_no_json_object_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "imsm.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"imsm\.json is damaged"):
        read_info(checkpoint)


def test_a_checkpoint_with_the_old_spelling_of_quantized_is_read(checkpoint: Path) -> None:
    rounding = {"precision": "int4", "block_size": 16}
    edit_info(checkpoint, quantized_backbone="REMOVED", quantised_backbone=rounding)
    assert read_info(checkpoint).quantized_backbone == rounding


def test_info_is_written_field_by_field(saved: Path) -> None:
    written = json.loads((saved / "imsm.json").read_text())
    assert written == asdict(CheckpointInfo(**written))
    assert written["metrics"] == {"final_loss": 1.5}
