"""Base models in few bits: fp8 and mxfp4 are read as floats, by value, and everything else is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import cli
from imsm_core.backbone import load_base_model
from imsm_core.errors import BaseModelError
from tests.builders import make_base_folder, make_siamese, save_tiny_checkpoint

LARGEST = 448.0  # of float8_e4m3fn
BLOCK = 32  # does not divide 60, the size of the MLP


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, the scales (a grid), and the values that they stand for."""
    rows, columns = weight.shape
    padded = functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / LARGEST
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (codes.float() * scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes.reshape(padded.shape)[:rows, :columns].contiguous(), scales, values


def whole(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = weight.abs().max() / LARGEST
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale


def make_fp8(folder: Path, kind: str) -> dict[str, Tensor]:
    """A Llama in fp8, its other weights in bfloat16; returns the values that it stands for."""
    make_base_folder(folder, head_dim=8)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = weight.to(torch.bfloat16)
            values[name] = stored[name].float()
            continue
        stored[name], scales, values[name] = (in_blocks if kind == "blocks" else whole)(weight)
        stored[f"{name}_scale_inv"] = scales
        if kind == "static":
            stored[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    set_quantization(
        folder,
        quant_method="fp8",
        activation_scheme="static" if kind == "static" else "dynamic",
        weight_block_size=[BLOCK, BLOCK] if kind == "blocks" else None,
    )
    return values


def set_quantization(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "bfloat16", "quantization_config": fields}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("kind", ["blocks", "tensor", "static"])
def test_fp8_becomes_float32_with_the_values_that_it_stands_for(tmp_path: Path, kind: str) -> None:
    values = make_fp8(tmp_path, kind)
    model = load_base_model(str(tmp_path))
    found = model.state_dict()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert found.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_fp8_base_exports(tmp_path: Path) -> None:
    make_fp8(tmp_path / "base", "blocks")
    save_tiny_checkpoint(make_siamese(tmp_path / "base"), tmp_path / "base", tmp_path / "checkpoint")
    assert cli.main(["--debug", "export", str(tmp_path / "checkpoint"), str(tmp_path / "artifact")]) == 0


METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "hqq": {"quant_method": "hqq"},
    "eetq": {"quant_method": "eetq"},
    "none-such": {"quant_method": "none-such"},
    "by an unnamed method": {"bits": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_other_formats_are_refused_by_name_with_the_way_on(base_folder: Path, tmp_path: Path, method: str) -> None:
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    set_quantization(folder, **METHODS[method])
    with pytest.raises(BaseModelError) as caught:
        load_base_model(str(folder))
    assert f"is quantized ({method}), and only fp8 and mxfp4 are read; give the model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_older_spelling_of_bitsandbytes_is_known(base_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    set_quantization(folder, load_in_8bit=True)
    with pytest.raises(BaseModelError, match=r"is quantized \(bitsandbytes\)"):
        load_base_model(str(folder))


@pytest.mark.parametrize("scaled", [True, False])
def test_codes_that_no_config_explains_are_refused(base_folder: Path, tmp_path: Path, scaled: bool) -> None:
    """Read as numbers, codes without their scales would be a model of nonsense."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    weights, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name] * 20).to(torch.float8_e4m3fn if scaled else torch.int8)
    if scaled:
        weights[f"{name}_scale_inv"] = torch.tensor(0.05)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"such as .*_scale_inv" if scaled else r"is quantized: .* is I8"):
        load_base_model(str(folder))
