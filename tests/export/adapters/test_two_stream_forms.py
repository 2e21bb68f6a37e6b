"""The two-stream form of every PEFT method's layers against PEFT's own layers, one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, RoadConfig
from torch import Tensor, nn

from export.adapters import ADAPTER_ROWS, TwoStreamEmbedding, base_layers, replaced_layers, two_stream_layers
from export.adapters.describe import check_delta_size, describe_adapter
from export.adapters.fallback import SplitRows, two_stream_fallback
from export.adapters.parameters import TwoStreamExperts
from export.adapters.road import TwoStreamRoad
from export.adapters.rows import DenseDelta, LowRank
from export.errors import UnsupportedError
from export.experts import every_expert
from export.report import report_adapter
from imsm_core.adapters.attach import adapted_layers, attach_adapter
from imsm_core.adapters.biases import backbone_biases, original_biases
from imsm_core.backbone import load_base_model
from tests.adapters import ADAPTERS, TOKENS, make_siamese_with
from tests.zoo import make_zoo_base

# What a tiny Llama's layers get: what is low rank, diagonal or block-wise in the method stays so in the graph.
FORMS = {
    "lora": {"low rank"},
    "rslora": {"low rank"},
    "lora_bias": {"low rank"},
    "lora_patterns": {"low rank"},
    "lora_layers": {"low rank"},
    "lora_embeddings": {"low rank", "embedding"},
    "lora_tokens": {"low rank", "embedding"},
    "lora_norms": {"low rank", "split rows"},
    "lora_saved_embeddings": {"low rank", "embedding"},
    "dora": {"low rank"},
    "adalora": {"low rank"},
    "ia3": {"diagonal"},
    "vera": {"low rank"},
    "lokr": {"Kronecker"},
    "lokr_full": {"Kronecker"},
    "lokr_factored": {"Kronecker"},
    "oft": {"block rotation"},
    "oft_cayley": {"block rotation"},
    "oft_shared": {"block rotation"},
    "boft": {"block rotation"},
    "ln_tuning": {"split rows"},
    "vblora": {"low rank"},
    "trainable_tokens": {"embedding"},
    "hra": {"low rank"},
    "miss": {"low rank"},
    "delora": {"low rank"},
    "beft": {"bias"},
    "road": {"pair rotation"},
    "hira": {"dense delta"},
    "shira": {"dense delta"},
    "c3a": {"dense delta"},
    "prefix_tuning": set(),
    "prompt_tuning": set(),
    "p_tuning": set(),
}


def forms_of(model: Any) -> dict[str, nn.Module]:
    """The forms, requested as the exporter does."""
    with original_biases(model), torch.no_grad():
        return two_stream_layers(model)


def both_rows(form: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The form's outputs for the same rows in both streams: (base, adapter)."""
    batch, sequence = x.shape[0], x.shape[1]
    mask = torch.cat([torch.zeros(batch, sequence, 1), torch.ones(batch, sequence, 1)])
    with ADAPTER_ROWS.of(mask):
        stacked = form(x if isinstance(form, TwoStreamEmbedding) else torch.cat([x, x]))
        if x.is_floating_point():  # experts hand over their tokens in one list
            flat = form(torch.cat([x, x]).flatten(0, 1))
            torch.testing.assert_close(flat.view(stacked.shape), stacked, rtol=1e-5, atol=1e-5)
    base, adapter = stacked.split(batch)
    return base, adapter


CASES = [
    *[("base_folder", name) for name in ADAPTERS],  # without biases
    *[("qwen2_folder", name) for name in ADAPTERS],  # with biases, tied embeddings
    *[("gpt2_folder", name) for name in ("lora", "lora_bias", "dora", "ia3", "vera", "fourierft", "vblora")],
]  # transposed weights, of those methods that PEFT has them for


@pytest.mark.parametrize(("folder", "name"), CASES)
@torch.no_grad()
def test_base_rows_are_the_frozen_layers_and_adapter_rows_are_pefts(
    folder: str, name: str, request: pytest.FixtureRequest
) -> None:
    model = make_siamese_with(request.getfixturevalue(folder), name).peft_model
    forms = forms_of(model)
    assert {layer.name for layer in adapted_layers(model)} <= set(forms)
    for layer in adapted_layers(model):
        form = forms[layer.name]
        if isinstance(form, SplitRows) or any(isinstance(part, SplitRows) for part in form.modules()):
            continue  # cut in two by an ONNX node: the exported graphs test it
        if isinstance(form, TwoStreamEmbedding):
            x = torch.tensor([[*TOKENS, 5], [7, TOKENS[0], 9, 11, 13]])
        else:
            shape = layer.frozen.get_parameter("weight").shape
            width = shape[0 if type(layer.frozen).__name__ == "Conv1D" else 1]
            x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(len(layer.name)))
        with original_biases(model):
            expected_base = layer.frozen(x)
            base, adapter = both_rows(form, x)
        expected = layer.tuner(x)
        assert torch.equal(base, expected_base)
        torch.testing.assert_close(adapter, expected, rtol=1e-4, atol=1e-4 * (1 + float(expected.abs().max())))
        assert (adapter - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", FORMS)
def test_a_change_keeps_its_structure(base_folder: Path, name: str) -> None:
    model = make_siamese_with(base_folder, name).peft_model
    adapter = describe_adapter("X", forms_of(model), {})
    assert set(adapter["forms"]) == FORMS[name]
    assert (adapter["dense_delta_bytes"] > 0) == ("dense delta" in FORMS[name])


def test_loha_is_two_factors_where_these_are_smaller_and_one_matrix_otherwise(base_folder: Path) -> None:
    forms = forms_of(make_siamese_with(base_folder, "loha").peft_model)  # rank 4, that is 16 when multiplied
    assert isinstance(forms["model.layers.0.self_attn.k_proj"], DenseDelta)  # 16 x 32
    assert isinstance(forms["model.layers.0.mlp.up_proj"], LowRank)  # 60 x 32


def test_veras_matrices_are_shared_between_layers_of_one_size(base_folder: Path) -> None:
    forms: Any = forms_of(make_siamese_with(base_folder, "vera").peft_model)
    first, second = (forms[f"model.layers.{index}.self_attn.q_proj"] for index in range(2))
    assert first.adapter_a is second.adapter_a
    assert first.adapter_b is second.adapter_b
    assert first.adapter_d is not second.adapter_d


def test_adaloras_pruned_ranks_are_left_out(base_folder: Path) -> None:
    model: Any = make_siamese_with(base_folder, "adalora").peft_model
    layers: dict[str, Any] = {layer.name: layer.tuner for layer in adapted_layers(model)}
    name, gone = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        layers[name].lora_E["default"][2:] = 0
        layers[gone].lora_E["default"].zero_()
    forms: Any = forms_of(model)
    assert forms[name].adapter_a.shape[0] == 2
    assert forms[gone] is next(layer.frozen for layer in adapted_layers(model) if layer.name == gone)


@torch.no_grad()
def test_trained_biases_are_a_change_of_the_adapters_rows(gpt2_folder: Path) -> None:
    model = make_siamese_with(gpt2_folder, "lora_all_biases").peft_model
    forms, biases = forms_of(model), backbone_biases(model)
    norm = "transformer.ln_f"
    original, trained = biases[f"{norm}.bias"]
    assert (trained - original).abs().max() > 0.1
    x = torch.randn(2, 3, len(original))
    expected = model.get_base_model().get_submodule(norm)(x)
    with original_biases(model):
        frozen = model.get_base_model().get_submodule(norm)(x)
        mask = torch.cat([torch.zeros(2, 3, 1), torch.ones(2, 3, 1)])
        with ADAPTER_ROWS.of(mask):
            base, adapter = forms[norm](torch.cat([x, x])).split(2)
    assert torch.equal(base, frozen)
    torch.testing.assert_close(adapter, expected)


def test_the_frozen_weight_is_shared_and_not_copied(base_folder: Path) -> None:
    for name in ("lora", "dora", "ia3", "lokr", "oft", "hira", "ln_tuning"):
        model = make_siamese_with(base_folder, name).peft_model
        forms = forms_of(model)
        for layer in adapted_layers(model):
            assert forms[layer.name].base_layer is layer.frozen


def test_whole_matrices_are_reported_with_their_size_and_can_be_refused(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "hira").peft_model
    adapter = describe_adapter("HIRA", forms_of(model), {})
    sizes = [layer.frozen.get_parameter("weight").numel() for layer in adapted_layers(model)]
    assert adapter["dense_delta_bytes"] == 4 * sum(sizes)
    lines: list[str] = []
    report_adapter(adapter, model.get_base_model(), lines.append)
    assert "0.07 MB of that are changes stored as whole matrices" in lines[1]
    check_delta_size(adapter, 0.08)
    with pytest.raises(UnsupportedError, match=r"0\.07 MB of them .* 0\.05 that max_delta_mb allows"):
        check_delta_size(adapter, 0.05)


def test_bytes_count_shared_matrices_once_and_virtual_tokens(base_folder: Path) -> None:
    layer = nn.Linear(4, 6)
    a, b = torch.ones(2, 4), torch.ones(6, 2)
    virtual = {"0.key": np.zeros((2, 3, 8), np.float32)}
    assert describe_adapter("X", {"a": LowRank(layer, a, b)}, virtual)["bytes"] == 4 * (8 + 12 + 48)
    vera = make_siamese_with(base_folder, "vera").peft_model
    shared = {(32, 4): 1, (60, 4): 1, (16, 4): 1}  # A of 32 and 60 inputs, B of 16, 32 and 60 outputs, each once
    vectors = sum(4 + layer.frozen.get_parameter("weight").shape[0] for layer in adapted_layers(vera))
    matrices = 4 * (32 + 60) + 4 * (16 + 32 + 60)
    assert len(shared) == 3
    assert describe_adapter("VERA", forms_of(vera), {})["bytes"] == 4 * (vectors + matrices)


def test_what_cannot_run_by_itself_is_refused_with_its_name() -> None:
    class NeedsMore(nn.Module):
        def forward(self, x: Tensor, routing: Tensor) -> Tensor:
            return x * routing

    with pytest.raises(UnsupportedError, match=r"model\.q_proj is a NeedsMore that needs more than its input"):
        two_stream_fallback("model.q_proj", NeedsMore(), nn.Linear(4, 4), reads_tokens=False)


def test_a_layer_that_is_not_linear_runs_beside_the_frozen_one() -> None:
    assert isinstance(
        two_stream_fallback("x", nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), False), SplitRows
    )


def test_lora_on_a_parameter_of_a_linear_layer_is_a_lora_like_any_other(base_folder: Path) -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"], task_type="CAUSAL_LM")
    model = attach_adapter(load_base_model(str(base_folder)), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    forms = forms_of(model)
    assert {form.adapter_a.shape[0] for form in forms.values() if isinstance(form, LowRank)} == {2}
    assert len(forms) == 2


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_lora_on_experts_changes_each_expert_and_keeps_their_weights(name: str, tmp_path: Path) -> None:
    base = load_base_model(str(make_zoo_base(tmp_path / "base", name)))  # gpt_oss: transposed weights, with biases
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=3, target_modules=[], target_parameters=parameters, task_type="CAUSAL_LM")
    model = attach_adapter(base, config)
    torch.manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.normal_(std=0.3)
    forms = forms_of(model)
    assert len(forms) == 2
    for layer in adapted_layers(model):
        form: Any = forms[layer.name]
        assert isinstance(form, TwoStreamExperts)
        assert form.base_layer is layer.frozen
        assert sorted(form.adapter_a) == ["down_proj", "gate_up_proj"]
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        routed = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1], [2, 0]]), torch.rand(5, 2)
        change = {key: (form.adapter_a[key], form.adapter_b[key]) for key in form.adapter_a}
        expected = layer.tuner(x, *routed)
        torch.testing.assert_close(every_expert(layer.frozen, x, *routed, change), expected, rtol=1e-4, atol=1e-4)
        assert (expected - layer.frozen(x, *routed)).abs().max() > 0.05


@torch.no_grad()
def test_lora_on_a_router_gives_the_adapter_its_own_router(tmp_path: Path) -> None:
    base = load_base_model(str(make_zoo_base(tmp_path / "base", "mixtral")))
    config = LoraConfig(r=3, target_modules=[], target_parameters=["mlp.gate.weight"], task_type="CAUSAL_LM")
    model = attach_adapter(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    layer = adapted_layers(model)[0]
    form: Any = forms_of(model)[layer.name]
    assert isinstance(form, SplitRows)
    x = torch.randn(5, 32)
    for found, expected in zip(form.adapter_layer(x), layer.tuner(x), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(form.base_layer(x), layer.frozen(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rank", [1, 64])
@torch.no_grad()
def test_a_lora_of_any_rank_keeps_it(base_folder: Path, rank: int) -> None:
    config = LoraConfig(r=rank, target_modules=["v_proj"], task_type="CAUSAL_LM")
    model = attach_adapter(load_base_model(str(base_folder)), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    for layer in adapted_layers(model):
        form: Any = forms_of(model)[layer.name]
        assert form.adapter_a.shape[0] == rank
        x = torch.randn(2, 3, 32)
        base, adapter = both_rows(form, x)
        assert torch.equal(base, layer.frozen(x))
        torch.testing.assert_close(adapter, layer.tuner(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@torch.no_grad()
def test_every_variant_of_road_is_two_vectors(base_folder: Path, variant: str) -> None:
    config = RoadConfig(variant=variant, group_size=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = attach_adapter(load_base_model(str(base_folder)), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape))
    forms = forms_of(model)
    for layer in adapted_layers(model):
        assert isinstance(forms[layer.name], TwoStreamRoad)
        x = torch.randn(2, 3, layer.frozen.get_parameter("weight").shape[1])
        base, adapter = both_rows(forms[layer.name], x)
        assert torch.equal(base, layer.frozen(x))
        torch.testing.assert_close(adapter, layer.tuner(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dora_on_the_embeddings_scales_each_dimension(base_folder: Path) -> None:
    config = LoraConfig(r=3, use_dora=True, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = attach_adapter(load_base_model(str(base_folder)), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    layer = adapted_layers(model)[0]
    form = forms_of(model)[layer.name]
    ids = torch.tensor([[3, 70, 258], [0, 5, 9]])
    base, adapter = both_rows(form, ids)
    assert torch.equal(base, layer.frozen(ids))
    torch.testing.assert_close(adapter, layer.tuner(ids), rtol=1e-5, atol=1e-5)
    assert sum(parameter.numel() for parameter in form.parameters()) < 2 * layer.frozen.get_parameter("weight").numel()


def test_layers_are_put_back_after_the_trace(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "lora").peft_model
    before = [layer.tuner for layer in adapted_layers(model)]
    with replaced_layers(model.get_base_model(), base_layers(model)):
        assert not adapted_layers(model)
    assert [layer.tuner for layer in adapted_layers(model)] == before


def test_a_two_stream_layer_outside_a_step_says_so(base_folder: Path) -> None:
    form = next(iter(forms_of(make_siamese_with(base_folder, "lora").peft_model).values()))
    with pytest.raises(RuntimeError, match="outside a traced step"):
        form(torch.zeros(2, 1, 32))
