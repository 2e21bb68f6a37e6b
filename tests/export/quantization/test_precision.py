"""PyTorch's model with the weights that a quantized file has: by the traced module's names, and for a block only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from export.adapters import base_layers, replaced_layers, two_stream_layers
from export.quantization.precision import layer_weight, rounded_weights
from export.quantization.weight_format import QuantizedWeight, dequantize, round_to_nearest
from imsm_core.backbone import load_base_model
from tests.builders import make_siamese

LLAMA = [
    f"model.model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
]
GPT2 = [
    f"model.transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
]  # c_proj is square: only its values tell whether it was transposed


def rounded(model: PreTrainedModel, names: Sequence[str], transposed: bool = False) -> dict[str, QuantizedWeight]:
    """Of the model's own weights; transposed: the layers are Conv1D."""
    found = {}
    for name in names:
        weight = layer_weight(model, name)[1].detach()
        found[name] = round_to_nearest((weight.T if transposed else weight).contiguous().numpy(), 4, 32, True)
    return found


def values(weight: QuantizedWeight, width: int) -> Tensor:
    return torch.from_numpy(dequantize(weight, width))


def parameters(model: PreTrainedModel) -> dict[str, tuple[int, Tensor]]:
    """Where every parameter is, and a copy of it."""
    return {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in model.named_parameters()}


def assert_untouched(model: PreTrainedModel, before: dict[str, tuple[int, Tensor]]) -> None:
    after = parameters(model)
    assert after.keys() == before.keys()
    for name, (address, tensor) in after.items():
        assert address == before[name][0], name
        assert torch.equal(tensor, before[name][1]), name


@pytest.fixture
def llama(base_folder: Path) -> PreTrainedModel:
    return load_base_model(str(base_folder))


def test_a_linear_layer_has_the_rounded_values_inside_and_its_own_after(llama: PreTrainedModel) -> None:
    before = parameters(llama)
    found = rounded(llama, LLAMA)
    with rounded_weights(llama, found):
        for name, weight in found.items():
            inside = layer_weight(llama, name)[1]
            assert torch.equal(inside, values(weight, inside.shape[1]))
        changed = {name for name, tensor in llama.named_parameters() if not torch.equal(tensor, before[name][1])}
        assert changed == {name.removeprefix("model.") for name in LLAMA}
    assert_untouched(llama, before)


def test_the_model_computes_with_the_rounded_values(llama: PreTrainedModel) -> None:
    inputs = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    name = LLAMA[0]
    found = rounded(llama, [name])
    with torch.no_grad(), rounded_weights(llama, found):
        output = llama.get_submodule("model.layers.0.self_attn.q_proj")(inputs)
    torch.testing.assert_close(output, inputs @ values(found[name], 32).T)


def test_a_conv1d_of_gpt2_has_them_transposed(gpt2_folder: Path) -> None:
    model = load_base_model(str(gpt2_folder))
    before = parameters(model)
    found = rounded(model, GPT2, transposed=True)
    with rounded_weights(model, found):
        for name, weight in found.items():
            inside = layer_weight(model, name)[1]
            assert inside.is_contiguous()
            assert torch.equal(inside, values(weight, inside.shape[0]).T)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "names",
    [
        ["model.lm_head.weight"],
        ["model.model.embed_tokens.weight"],
        ["model.lm_head.weight", "model.model.embed_tokens.weight"],
    ],
    ids=["head", "embeddings", "both"],
)
def test_tied_embeddings_change_with_the_head_and_are_restored(qwen2_folder: Path, names: list[str]) -> None:
    model = load_base_model(str(qwen2_folder))
    before = parameters(model)
    found = rounded(model, names)
    with rounded_weights(model, found):
        expected = values(found[names[0]], model.config.hidden_size)
        assert not torch.equal(expected, before["model.embed_tokens.weight"][1])
        for name in ("model.lm_head.weight", "model.model.embed_tokens.weight"):
            assert torch.equal(layer_weight(model, name)[1], expected)
    assert_untouched(model, before)


def test_an_exception_inside_restores_everything(llama: PreTrainedModel) -> None:
    before = parameters(llama)
    with pytest.raises(KeyError, match="inside"), rounded_weights(llama, rounded(llama, LLAMA)):
        raise KeyError("inside")
    assert_untouched(llama, before)


def test_an_unknown_name_restores_what_was_changed_before_it(llama: PreTrainedModel) -> None:
    before = parameters(llama)
    found = rounded(llama, LLAMA)
    with pytest.raises(AttributeError), rounded_weights(llama, {**found, "model.nowhere.weight": found[LLAMA[0]]}):
        pass
    assert_untouched(llama, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_names_with_and_without_an_adapter_around_the_layer_mean_the_same(
    base_folder: Path, gpt2_folder: Path, kind: str
) -> None:
    model = make_siamese(base_folder if kind == "llama" else gpt2_folder)
    path = "model.layers.0.self_attn.q_proj" if kind == "llama" else "transformer.h.0.attn.c_attn"
    frozen = model.causal_lm.get_submodule(f"{path}.base_layer")
    wrapped = f"model.{path}.base_layer.weight"
    plain = f"model.{path}.weight"

    def assert_found(name: str) -> None:
        layer, weight = layer_weight(model.causal_lm, name)
        assert weight is frozen.weight
        assert layer is frozen

    assert_found(wrapped)
    with replaced_layers(model.causal_lm, base_layers(model.peft_model)):  # as a base-only graph is traced
        assert_found(plain)
        assert_found(wrapped)
    with replaced_layers(model.causal_lm, two_stream_layers(model.peft_model)):
        assert_found(wrapped)


def test_a_conv1d_is_found_inside_pefts_own_layer_by_the_name_of_a_base_only_trace(gpt2_folder: Path) -> None:
    model = make_siamese(gpt2_folder)
    layer, _ = layer_weight(model.causal_lm, GPT2[0])
    assert isinstance(layer, Conv1D)


def test_a_siamese_models_frozen_weights_change_in_both_streams(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    name = "model.model.layers.0.self_attn.q_proj.base_layer.weight"
    tokens = torch.arange(5)[None]
    found = rounded(model.causal_lm, [name])
    with torch.no_grad():
        before: Any = model.stream_states(tokens)
        with rounded_weights(model.causal_lm, found):
            inside: Any = model.stream_states(tokens)
        after: Any = model.stream_states(tokens)
    for one, other, again in zip(before, inside, after, strict=True):
        assert not torch.equal(one, other)
        assert torch.equal(one, again)
