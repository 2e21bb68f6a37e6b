"""Adapters and gates that were trained elsewhere, and files that mean harm."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from imsm_core.backbone import load_base_model
from imsm_core.errors import AdapterError, CheckpointError, IMSMError, SettingsError
from imsm_core.foreign import assemble, find_adapter, load_gate, read_linear
from imsm_core.gates import GATES
from imsm_core.siamese import SiameseModel
from tests.adapters import make_siamese_with
from tests.builders import save_tiny_checkpoint

TEXT = torch.tensor([[0, 70, 80, 90, 100, 110, 120]])
WIDTH, RANK = 32, 3


def logits(model: SiameseModel) -> torch.Tensor:
    rows, positions = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    with torch.no_grad():
        return model.fused_logits(model.stream_states(TEXT), torch.ones_like(TEXT), rows, positions)[0]


def released(path: Path, model: SiameseModel, prefix: str = "", dtype: torch.dtype = torch.float32) -> Path:
    """The gate as the released code saves it."""
    path.mkdir(exist_ok=True, parents=True)
    for name, layer in (("A", "gate_down"), ("B", "gate_up")):
        weight = model.gate.get_parameter(f"{layer}.weight")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
        torch.save(nn.Sequential(linear, nn.Dropout(0.1)), path / f"{prefix}linear_{name}.pth")
    return path


@pytest.fixture
def trained(base_folder: Path, tmp_path: Path) -> tuple[SiameseModel, Path]:
    """A siamese model and its CHECKPOINT folder."""
    model = make_siamese_with(base_folder, "lora", "query_aware", gate_rank=RANK)
    save_tiny_checkpoint(model, base_folder, tmp_path / "checkpoint")
    return model, tmp_path / "checkpoint"


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("prefix", ["", "12_"])
def test_adapter_and_released_gate_make_the_model_they_came_from(
    base_folder: Path, tmp_path: Path, kind: str, prefix: str
) -> None:
    model = make_siamese_with(base_folder, "lora", kind, gate_rank=RANK)
    save_tiny_checkpoint(model, base_folder, tmp_path / "checkpoint")
    gate = released(tmp_path / "gate", model, prefix) if kind != "mean_logits" else None
    found, info = assemble(tmp_path / "checkpoint" / "adapter", str(base_folder), kind, gate)
    assert torch.equal(logits(found), logits(model))
    assert found.trainable_parameters() == {}
    assert (info.gate_kind, info.gate_rank, info.peft_type) == (kind, model.gate.rank, "LORA")
    assert info.base_model == str(base_folder.resolve())
    save_tiny_checkpoint(found, base_folder, tmp_path / "again")


def test_gate_comes_from_a_safetensors_file_or_its_folder(
    base_folder: Path, trained: tuple[SiameseModel, Path]
) -> None:
    model, checkpoint = trained
    for source in (checkpoint, checkpoint / "gate.safetensors"):
        found, _ = assemble(checkpoint / "adapter", str(base_folder), "query_aware", source)
        assert torch.equal(logits(found), logits(model))


def test_half_precision_gate_is_read_as_float32(trained: tuple[SiameseModel, Path], tmp_path: Path) -> None:
    gate = load_gate(released(tmp_path / "gate", trained[0], dtype=torch.float16), "query_aware", WIDTH)
    found, expected = (gate.get_parameter("gate_down.weight") for gate in (gate, trained[0].gate))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


FORMS = ("tensor", "parameter", "state dict", "ordered")


@pytest.mark.parametrize(
    ("form", "old_format"),
    [(form, False) for form in ("sequential", "linear", *FORMS)] + [(form, True) for form in FORMS],
)
def test_weight_is_found_in_every_plain_form(tmp_path: Path, form: str, old_format: bool) -> None:
    linear = nn.Linear(5, 3, bias=False)
    forms: dict[str, Any] = {
        "sequential": nn.Sequential(linear, nn.Dropout(0.1)),
        "linear": linear,
        "tensor": linear.weight.detach(),
        "parameter": linear.weight,
        "state dict": {"0.weight": linear.weight.detach()},
        "ordered": OrderedDict(weight=linear.weight.detach()),
    }
    torch.save(forms[form], tmp_path / "linear_A.pth", _use_new_zipfile_serialization=not old_format)
    found = read_linear(tmp_path / "linear_A.pth")
    assert torch.equal(found, linear.weight)
    assert not found.requires_grad


class Malicious:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


class Pretender(nn.Linear):
    """A class of the file's own."""


def test_layer_in_a_format_that_carries_code_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2, bias=False), tmp_path / "linear_A.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="is refused: its format carries code"):
        read_linear(tmp_path / "linear_A.pth")


@pytest.mark.parametrize("old_format", [False, True])
def test_file_that_would_run_code_is_refused_and_nothing_is_run(tmp_path: Path, old_format: bool) -> None:
    layer = nn.Sequential(nn.Linear(4, 2, bias=False))
    layer.extra = Malicious(tmp_path / "made")  # type: ignore[assignment]
    harmful = Malicious(tmp_path / "made")
    for content in (harmful, {"weight": harmful}, *([] if old_format else [layer])):
        torch.save(content, tmp_path / "linear_A.pth", _use_new_zipfile_serialization=not old_format)
        with pytest.raises(CheckpointError, match=r"is refused: it holds \w+\.system") as caught:
            read_linear(tmp_path / "linear_A.pth")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "made").exists()


def test_foreign_class_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(Pretender(4, 2), tmp_path / "linear_A.pth")
    with pytest.raises(CheckpointError, match=r"is refused: it holds tests\.imsm_core\.test_foreign\.Pretender"):
        read_linear(tmp_path / "linear_A.pth")
    torch.save(nn.Sequential(nn.Linear(4, 2, bias=False), nn.ReLU()), tmp_path / "linear_A.pth")
    with pytest.raises(CheckpointError, match=r"it holds torch\.nn\.modules\.activation\.ReLU"):
        read_linear(tmp_path / "linear_A.pth")


def test_what_was_allowed_for_a_gate_is_not_allowed_afterwards(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 2, bias=False), tmp_path / "linear_A.pth")
    read_linear(tmp_path / "linear_A.pth")
    assert nn.Linear not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"no pickle at all", "cannot be read"),
        (nn.Linear(4, 2), "holds 2 tensors; a gate's linear layer has one"),
        ([1, 2], "holds 0 tensors"),
    ],
    ids=["empty", "text", "bias", "list"],
)
def test_file_without_one_weight_is_an_error_of_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "linear_A.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_linear(path)
    assert "\n" not in str(caught.value)


def gate_files(path: Path, down: tuple[int, int], up: tuple[int, int], value: float = 1.0) -> Path:
    path.mkdir()
    save_file(
        {"gate_down.weight": torch.full(down, value), "gate_up.weight": torch.full(up, value)},
        path / "gate.safetensors",
    )
    return path


@pytest.mark.parametrize(
    ("kind", "down", "up", "message"),
    [
        ("query_aware", (3, 64), (32, 3), "gate_down.weight reads 64 values; a query_aware gate .* reads 128"),
        ("token", (3, 128), (32, 3), "gate_down.weight reads 128 values; a token gate .* reads 64"),
        ("residual", (3, 64), (48, 3), "gate_up.weight gives 48 values; the base model's states have 32"),
        ("query_mixed", (3, 64), (32, 4), "gate_down.weight has rank 3 and gate_up.weight rank 4"),
    ],
)
def test_gate_of_another_size_is_refused_with_both_numbers(
    tmp_path: Path, kind: str, down: tuple[int, int], up: tuple[int, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_gate(gate_files(tmp_path / "gate", down, up), kind, WIDTH)


def test_gate_whose_values_are_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gate_down\.weight holds values that are not finite"):
        load_gate(gate_files(tmp_path / "gate", (3, 64), (32, 3), torch.nan), "token", WIDTH)


def test_gate_of_several_epochs_has_to_be_named(trained: tuple[SiameseModel, Path], tmp_path: Path) -> None:
    folder = released(tmp_path / "gate", trained[0], "1_")
    released(folder, trained[0], "2_")
    with pytest.raises(CheckpointError, match=r"several gates; give the path of one of 1_linear_A\.pth, 2_linear_A"):
        load_gate(folder, "query_aware", WIDTH)
    gate = load_gate(folder / "2_linear_A.pth", "query_aware", WIDTH)
    found, expected = (gate.get_parameter("gate_up.weight") for gate in (gate, trained[0].gate))
    assert torch.equal(found, expected)
    (folder / "2_linear_B.pth").unlink()
    with pytest.raises(CheckpointError, match=r"2_linear_A\.pth has no 2_linear_B\.pth beside it"):
        load_gate(folder / "2_linear_A.pth", "query_aware", WIDTH)


@pytest.mark.parametrize(
    ("kind", "gate", "error", "message"),
    [
        ("magic", None, SettingsError, "^gate is magic; choose one of query_aware"),
        (
            "token",
            None,
            SettingsError,
            "^gate_from is not given; it must say where the trained weights of the token gate are",
        ),
        (
            "mean_logits",
            "gate.safetensors",
            SettingsError,
            r"^gate_from is .*gate\.safetensors; a mean_logits gate has no weights",
        ),
        ("token", "missing", CheckpointError, "no gate at .*missing: it does not exist"),
        ("token", "adapter", CheckpointError, r"holds no gate: it has neither gate\.safetensors nor linear_A\.pth"),
        ("token", "imsm.json", CheckpointError, r"is not a gate; give a \.safetensors file or a linear_A\.pth"),
    ],
)
def test_missing_or_needless_gate_is_an_error(
    base_folder: Path,
    trained: tuple[SiameseModel, Path],
    kind: str,
    gate: str | None,
    error: type[IMSMError],
    message: str,
) -> None:
    checkpoint = trained[1]
    with pytest.raises(error, match=message):
        assemble(checkpoint / "adapter", str(base_folder), kind, checkpoint / gate if gate else None)


def test_one_of_several_adapters_in_a_folder_is_chosen_by_name(base_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(load_base_model(str(base_folder)), config)
    peft_model.add_adapter("legal", LoraConfig(r=3, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    peft_model.save_pretrained(str(tmp_path / "several"), save_embedding_layers=False)
    with pytest.raises(
        SettingsError, match=r"^adapter_name is not given; .* has several adapters; choose one of default, legal"
    ):
        find_adapter(tmp_path / "several")
    with pytest.raises(SettingsError, match=r"^adapter_name is medical; .* has default, legal"):
        find_adapter(tmp_path / "several", "medical")
    for name, rank in (("default", 2), ("legal", 3)):
        model, _ = assemble(tmp_path / "several", str(base_folder), "mean_logits", adapter_name=name)
        found: Any = model.peft_model.peft_config["default"]
        assert found.r == rank
    assert find_adapter(tmp_path / "several" / "legal") == tmp_path / "several" / "legal"


def test_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a PEFT adapter: neither it nor a folder in it has"):
        find_adapter(tmp_path)
    with pytest.raises(AdapterError, match="the folder does not exist"):
        find_adapter(tmp_path / "missing")
