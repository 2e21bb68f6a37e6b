"""Which layers both streams may share, found from the adapter's layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from export.adapters import two_stream_layers
from export.streams import StreamLayout
from export.trunk import decoder_layers, trunk_length
from imsm_core.adapters.biases import original_biases
from imsm_core.backbone import load_base_model
from tests.adapters import make_siamese_with
from tests.builders import LAYERS, make_siamese
from tests.zoo import make_zoo_base


@pytest.mark.parametrize(
    ("adapted", "expected"),
    [
        (["model.layers.1.mlp.down_proj"], 1),
        (["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"], 1),
        (["model.layers.1.input_layernorm"], 1),
        (["model.layers.0.mlp.down_proj"], 0),
        (["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj"], 0),
        (["model.layers.1.mlp.down_proj", "model.embed_tokens"], 0),
        (["model.layers.1.mlp.down_proj", "model.norm"], 0),
        (["model.layers_of_another_kind.1"], 0),
        ([], 0),
    ],
)
def test_the_trunk_ends_at_the_first_layer_that_the_adapter_changes(
    base_folder: Path, adapted: list[str], expected: int
) -> None:
    assert trunk_length(load_base_model(str(base_folder)), LAYERS, adapted) == expected


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ("lora_layers", 1),
        ("lora_patterns", 1),
        ("lora", 0),
        ("lora_embeddings", 0),
        ("lora_tokens", 0),
        ("trainable_tokens", 0),
        ("ln_tuning", 0),  # the final norm too
    ],
)
def test_adapters_leave_the_layers_below_them_alone(base_folder: Path, adapter: str, expected: int) -> None:
    model = make_siamese_with(base_folder, adapter)
    assert trunk_length(model.causal_lm, LAYERS, two_stream_layers(model.peft_model)) == expected


def test_trained_biases_of_the_first_layer_end_the_trunk(gpt2_folder: Path) -> None:
    model = make_siamese_with(gpt2_folder, "lora_all_biases")
    with original_biases(model.peft_model):
        assert trunk_length(model.causal_lm, LAYERS, two_stream_layers(model.peft_model)) == 0


def test_layers_are_found_under_other_names_and_experts_are_not_layers(tmp_path: Path, gpt2_folder: Path) -> None:
    model = make_siamese(gpt2_folder, target_modules=["h.1.mlp.c_fc"]).causal_lm
    assert trunk_length(model, LAYERS, ["transformer.h.1.mlp.c_fc"]) == 1
    found = decoder_layers(load_base_model(str(make_zoo_base(tmp_path / "base", "mixtral"))), LAYERS)
    assert found is not None
    assert found[0] == "model.layers"


def test_a_model_with_two_lists_of_layers_has_no_trunk(base_folder: Path) -> None:
    model = load_base_model(str(base_folder))
    model.more = nn.ModuleList([nn.Identity() for _ in range(LAYERS)])
    assert trunk_length(model, LAYERS, ["model.layers.1.mlp.down_proj"]) == 0


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (StreamLayout(1), [("base",), ("base",)]),
        (StreamLayout(2), [("both",), ("both",)]),
        (StreamLayout(2, trunk=1), [("shared",), ("both",)]),
        (StreamLayout(2, portable=True), [("base", "adapter")] * 2),
        (StreamLayout(2, trunk=1, portable=True), [("shared",), ("base", "adapter")]),
    ],
)
def test_a_layers_groups_follow_from_streams_trunk_and_form(
    layout: StreamLayout, groups: list[tuple[str, ...]]
) -> None:
    assert [layout.groups(layer) for layer in range(2)] == groups


def test_only_what_has_one_row_a_text_is_stacked() -> None:
    layout = StreamLayout(2, trunk=1)
    one, both, broadcast = torch.arange(6.0).view(3, 2), torch.arange(12.0).view(6, 2), torch.ones(1, 2)
    found = layout.stack_all({"a": (one, None), "b": [both, broadcast], "c": True}, rows=6)
    torch.testing.assert_close(found["a"][0], torch.cat([one, one]))
    assert found["a"][1] is None
    assert found["b"][0] is both
    assert found["b"][1] is broadcast
    assert found["c"] is True
