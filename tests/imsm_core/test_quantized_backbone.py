"""Training against a rounded backbone: the rounding is onnxruntime's, and the checkpoint brings it back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.quantization.weight_format import dequantize, round_to_nearest
from imsm_core.backbone import load_base_model
from imsm_core.checkpoint import load_checkpoint, read_info
from imsm_core.errors import CheckpointError, SettingsError
from imsm_core.quantized_backbone import nearest_in_blocks, round_backbone
from imsm_core.training.settings import TrainSettings, TuneSettings
from imsm_core.training.tuning import tune
from tests.builders import write_jsonl
from tests.zoo import make_zoo_base


def awkward_weight(width: int) -> Tensor:
    """(60, width): channels of zeros, of one sign, of equal ends, of halves, far apart in size, and below float32."""
    weight = torch.randn(60, width, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2, ::2], weight[2, 1::2] = 1, -1
    weight[3:20] = (weight[3:20] * 2).round() / 2
    weight[20:40] *= 10.0 ** torch.arange(-10, 10)[:, None]
    return weight


@pytest.mark.parametrize("width", [64, 100, 300])
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_onnxruntimes_to_the_bit_and_a_fixed_point(bits: int, block_size: int, width: int) -> None:
    weight = awkward_weight(width)
    found = nearest_in_blocks(weight, bits, block_size)
    expected = dequantize(round_to_nearest(weight.numpy(), bits, block_size, True), width)
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(nearest_in_blocks(found, bits, block_size).numpy(), expected)


def test_values_too_small_to_scale_become_zero() -> None:
    assert (nearest_in_blocks(torch.full((2, 32), 1e-40), 4, 32) == 0).all()


@pytest.mark.parametrize("folder", ["base_folder", "gpt2_folder", "qwen2_folder"])
def test_every_matrix_of_the_backbone_is_rounded_and_nothing_else(folder: str, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(folder))
    before, model = load_base_model(path), load_base_model(path)
    round_backbone(model, "int4", 32)
    original = dict(before.named_parameters())
    for name, weight in model.named_parameters():
        changed = not torch.equal(weight, original[name])
        assert changed == (weight.dim() == 2 and "wpe" not in name), name
        assert not weight.requires_grad
    for module in model.modules():
        if isinstance(module, nn.Linear):
            values = module.weight.numpy()
            np.testing.assert_array_equal(dequantize(round_to_nearest(values, 4, 32, True), values.shape[1]), values)


def tuned(base: Path, folder: Path, settings: TuneSettings) -> Path:
    rows: list[dict[str, object]] = [{"prompt": f"What is {n}? ", "answer": f"It is {n}."} for n in range(6)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    training = TrainSettings(steps=2, batch_size=3, learning_rate=1e-2)
    tune(str(base), data, folder / "checkpoint", settings, training, device="cpu", progress=False)
    return folder / "checkpoint"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_rounded_along_what_they_multiply(name: str, tmp_path: Path) -> None:
    folder = str(make_zoo_base(tmp_path / "base", name))
    model, before = load_base_model(folder), dict(load_base_model(folder).named_parameters())
    round_backbone(model, "int4", 16)
    experts = [key for key in before if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 2 * 2
    for key in experts:
        found, original = model.get_parameter(key).detach(), before[key].detach()
        if name == "gpt_oss":  # (experts, in, out)
            found, original = found.transpose(1, 2), original.transpose(1, 2)
        expected = dequantize(
            round_to_nearest(original.reshape(-1, original.shape[2]).numpy(), 4, 16, True), original.shape[2]
        )
        np.testing.assert_array_equal(found.reshape(-1, found.shape[2]).numpy(), expected)
        assert not torch.equal(found, original)


def test_a_checkpoint_comes_back_with_the_rounded_backbone(base_folder: Path, tmp_path: Path) -> None:
    checkpoint = tuned(base_folder, tmp_path, TuneSettings(quantized_backbone="int4", block_size=16))
    assert read_info(checkpoint).quantized_backbone == {"precision": "int4", "block_size": 16}
    model, _ = load_checkpoint(checkpoint)
    expected = load_base_model(str(base_folder))
    round_backbone(expected, "int4", 16)
    ids = torch.tensor([[3, 50, 60, 70]])
    with torch.no_grad():
        states = model.stream_states(ids)
        torch.testing.assert_close(states.base, expected.base_model(ids).last_hidden_state)
    assert not torch.equal(states.base, states.adapter)


def test_without_the_option_the_backbone_stays(base_folder: Path, tmp_path: Path) -> None:
    checkpoint = tuned(base_folder, tmp_path, TuneSettings())
    assert read_info(checkpoint).quantized_backbone == {}
    ids = torch.tensor([[3, 50, 60, 70]])
    with torch.no_grad():
        found = load_checkpoint(checkpoint)[0].stream_states(ids).base
        torch.testing.assert_close(found, load_base_model(str(base_folder)).base_model(ids).last_hidden_state)


def test_the_adapter_is_trained_on_the_rounded_backbone(base_folder: Path, tmp_path: Path) -> None:
    plain, rounded = tmp_path / "plain", tmp_path / "rounded"
    plain.mkdir()
    rounded.mkdir()
    checkpoints = [
        tuned(base_folder, plain, TuneSettings()),
        tuned(base_folder, rounded, TuneSettings(quantized_backbone="int4")),
    ]
    first, second = (read_info(checkpoint).metrics["first_loss"] for checkpoint in checkpoints)
    assert first != second


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantized_backbone": "int3"}, "^quantized_backbone is int3; choose one of int4, int8"),
        ({"quantized_backbone": "int4", "block_size": 33}, "block_size is 33"),
        ({"quantized_backbone": "int4", "block_size": 8}, "block_size is 8"),
        ({"block_size": 32}, "^block_size is 32; it needs quantized_backbone"),
    ],
)
def test_what_an_export_does_not_offer_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TuneSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage", [{"precision": "int5", "block_size": 32}, {"precision": "int4"} | {"blocks": 3}, {"precision": ["int4"]}]
)
def test_a_damaged_rounding_is_refused(damage: dict[str, object], base_folder: Path, tmp_path: Path) -> None:
    checkpoint = tuned(base_folder, tmp_path, TuneSettings(quantized_backbone="int8"))
    path = checkpoint / "imsm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantized_backbone": damage}))
    with pytest.raises(CheckpointError, match="quantized_backbone"):
        load_checkpoint(checkpoint)
