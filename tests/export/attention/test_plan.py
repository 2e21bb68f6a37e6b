"""What the probe finds out about an architecture, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from export.attention.plan import MOST_PADDING, plan_attention
from export.errors import UnsupportedError
from export.model_facts import model_facts
from imsm_core.errors import SettingsError

LAYERS = 2
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SHAPE | changes)))
    model.eval()
    return model


def test_llama_rotates_inside_attention() -> None:
    plan = plan_attention(tiny("llama"), LAYERS, 32)
    assert plan.rotary.mode == "fused"
    assert not plan.rotary.interleaved
    assert plan.rotary.cos is not None
    assert plan.rotary.cos.shape == (32 + MOST_PADDING, 8)
    assert [(layer.heads, layer.kv_heads, layer.head_size) for layer in plan.layers] == [(4, 2, 16)] * LAYERS


def test_cohere_is_found_to_rotate_interleaved() -> None:
    assert plan_attention(tiny("cohere"), LAYERS, 32).rotary.interleaved


@pytest.mark.parametrize(("head_dim", "cached"), [(8, 8), (12, 16), (24, 24)])
def test_head_sizes_that_the_kernel_cannot_rotate_get_nodes_and_odd_ones_are_padded(head_dim: int, cached: int) -> None:
    plan = plan_attention(tiny("qwen3", head_dim=head_dim), LAYERS, 32)
    assert plan.rotary.mode == "node"
    assert {layer.cached_head_size for layer in plan.layers} == {cached}


def test_partial_rotation_gets_nodes() -> None:
    assert plan_attention(tiny("stablelm"), LAYERS, 32).rotary.mode == "node"


def test_learned_positions_need_no_rotation() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=32)
    ).eval()
    assert plan_attention(model, LAYERS, 32).rotary.mode == "none"


def test_windows_and_soft_capping_are_taken_per_layer() -> None:
    plan = plan_attention(tiny("gemma2", sliding_window=8, attn_logit_softcapping=30.0, head_dim=16), LAYERS, 32)
    assert [layer.sliding_window for layer in plan.layers] == [8, None]
    assert {layer.softcap for layer in plan.layers} == {30.0}


def test_an_architecture_outside_the_attention_interface_is_named() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("openai-gpt", vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=32)
    )
    with pytest.raises(UnsupportedError, match="architecture 'openai-gpt' is not supported: 0 of its 2 layers"):
        plan_attention(model, LAYERS, 32)


def test_an_architecture_with_a_state_is_named() -> None:
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=1)
    )
    with pytest.raises(
        UnsupportedError, match="'mamba' is not supported: its layers keep a state that is not a key/val"
    ):
        plan_attention(mamba, 1, 32)
    lfm2 = tiny("lfm2", layer_types=["conv", "full_attention"])
    with pytest.raises(UnsupportedError, match=r"'lfm2' is not supported: its layers keep a state .* \(conv\)"):
        plan_attention(lfm2, LAYERS, 32)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("bert", {}, "its attention mask is neither causal nor a causal sliding window"),
        ("llama4_text", {"attention_chunk_size": 8, "head_dim": 16}, "its attention mask is neither causal"),
        ("doge", {}, "DogeAttention makes its attention mask by itself"),
        ("diffllama", {}, "its attention layer 0 runs more than once in a step"),
    ],
)
def test_attention_that_the_node_cannot_express_is_named(kind: str, changes: dict[str, Any], reason: str) -> None:
    model = tiny(kind, **changes)
    with pytest.raises(UnsupportedError, match=f"architecture '{kind}' is not supported: {reason}"):
        plan_attention(model, LAYERS, 32)


def test_the_window_is_the_masks_whatever_the_layer_passes_on() -> None:
    model = tiny("exaone4", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    assert [layer.sliding_window for layer in plan_attention(model, LAYERS, 32).layers] == [8, None]
    assert [layer.sliding_window for layer in plan_attention(model, LAYERS, 8).layers] == [None, None]


def test_a_rotation_of_complex_numbers_gets_nodes() -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
    }
    rotary = plan_attention(tiny("deepseek_v2", num_key_value_heads=4, **latent, **experts), LAYERS, 32).rotary
    assert (rotary.mode, rotary.interleaved) == ("node", True)
    assert rotary.cos is not None
    assert rotary.cos.shape == (32, 4)


def test_unequal_heads_are_padded_to_one_size() -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    plan = plan_attention(tiny("youtu", num_key_value_heads=4, **latent), LAYERS, 32)
    assert {(layer.head_size, layer.value_size, layer.cached_head_size) for layer in plan.layers} == {(16, 12, 16)}


def test_a_rotation_that_changes_with_the_length_has_a_table_up_to_the_length_where_it_changes() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 16,
    }
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    message = "'phi3' is not supported: .* 'longrope' changes with the length .* a context_length of 16 or less has one"
    with pytest.raises(UnsupportedError, match=message) as caught:
        plan_attention(model, LAYERS, 32)
    assert "a --context-length of 16" in caught.value.told(lambda name: f"--{name.replace('_', '-')}")
    tables = plan_attention(model, LAYERS, 16).rotary
    assert tables.cos is not None
    assert tables.cos.shape == (16 + MOST_PADDING, 8)


def test_probing_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    tokens = torch.tensor([[1, 2, 3]])
    before = model(input_ids=tokens).logits
    plan_attention(model, LAYERS, 32)
    torch.testing.assert_close(model(input_ids=tokens).logits, before, rtol=0, atol=0)


def test_facts_come_from_configs_that_spell_them_differently() -> None:
    assert model_facts(tiny("llama")).layers == LAYERS
    gpt2 = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=48)
    )
    facts = model_facts(gpt2)
    assert (facts.layers, facts.hidden_size, facts.context_length) == (3, 32, 48)


def test_a_longer_context_than_the_models_is_refused() -> None:
    assert model_facts(tiny("llama"), 16).context_length == 16
    with pytest.raises(SettingsError, match=r"context_length is 33; the model allows 2 \.\. 32"):
        model_facts(tiny("llama"), 33)
