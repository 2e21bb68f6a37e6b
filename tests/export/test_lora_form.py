"""The two-stream form of a LoRA layer against PEFT's own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from export.adapters import ADAPTER_ROWS, base_layers, replaced_layers, two_stream_layers
from export.errors import UnsupportedError
from imsm_core.adapters import adapted_layers, attach_adapter
from imsm_core.backbone import load_base_model


def peft_model(folder: Path, **settings: Any) -> Any:
    """A LoRA with random non-zero matrices on `folder`'s model."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    model = attach_adapter(load_base_model(str(folder)), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
        {"layers_to_transform": [1]},
    ],
    ids=["plain", "rslora", "bias", "patterns", "upper layer"],
)
@torch.no_grad()
def test_base_rows_are_exact_and_adapter_rows_are_pefts(base_folder: Path, settings: dict[str, Any]) -> None:
    model = peft_model(base_folder, **settings)
    forms = two_stream_layers(model)
    layers = adapted_layers(model)
    assert set(forms) == {layer.name for layer in layers}
    assert layers
    for layer in layers:
        assert isinstance(layer.frozen, nn.Linear)
        x = torch.randn(2, 3, layer.frozen.in_features)
        with ADAPTER_ROWS.of(torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None, None]):
            base, adapter = forms[layer.name](torch.cat([x, x])).split(2)
        torch.testing.assert_close(base, layer.frozen(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(adapter, layer.tuner(x), rtol=1e-5, atol=1e-5)
        assert (adapter - base).abs().max() > 0.1


def test_the_frozen_weight_is_shared_and_not_copied(base_folder: Path) -> None:
    model = peft_model(base_folder)
    for layer in adapted_layers(model):
        assert two_stream_layers(model)[layer.name].base_layer is layer.frozen


@pytest.mark.parametrize("settings", [{"use_dora": True}])
def test_a_variant_without_a_two_stream_form_is_named(base_folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0.*Dora"):
        two_stream_layers(peft_model(base_folder, **settings))


def test_layers_are_put_back_after_the_trace(base_folder: Path) -> None:
    model = peft_model(base_folder)
    before = [layer.tuner for layer in adapted_layers(model)]
    with replaced_layers(model.get_base_model(), base_layers(model)):
        assert not adapted_layers(model)
    assert [layer.tuner for layer in adapted_layers(model)] == before


def test_a_two_stream_layer_outside_a_step_says_so(base_folder: Path) -> None:
    form = next(iter(two_stream_layers(peft_model(base_folder)).values()))
    with pytest.raises(RuntimeError, match="outside a traced step"):
        form(torch.zeros(2, 1, 32))
