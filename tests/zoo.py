"""A tiny configuration of every decoder-only architecture that exports, by name, to run a whole matrix of exports on.

Where an architecture has more than one layout (heads, rotations, windows), each layout has a name of its own. Windows
are smaller than the texts of the export's own check, so that a window off by one shows there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tests.builders import BOS, CONTEXT, EOS, HEADS, KV_HEADS, LAYERS, PAD, VOCABULARY, write_base_folder

WIDTH, WINDOW = 32, 8
TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
# The names that most configs have, and the older ones of GPT-2's descendants.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 60,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    **TOKENS,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_head": HEADS,
    "n_layer": LAYERS,
    "n_positions": CONTEXT,
    **TOKENS,
}
EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Multi-head latent attention: keys of 16, values of 12.
LATENT: dict[str, Any] = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def _config(model_type: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **(COMMON | settings))


def _gpt2(model_type: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(model_type, **(GPT2 | settings))


ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "apertus": _config("apertus"),
    "arcee": _config("arcee", head_dim=8),
    "biogpt": _config("biogpt"),
    "bitnet": _config("bitnet"),
    "bloom": lambda: AutoConfig.for_model(
        "bloom", vocab_size=VOCABULARY, hidden_size=48, n_layer=LAYERS, n_head=6, seq_length=CONTEXT, **TOKENS
    ),
    "codegen": _gpt2("codegen", rotary_dim=4, n_ctx=CONTEXT),
    "cohere": _config("cohere"),
    "cohere2": _config(
        "cohere2", head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "ctrl": _gpt2("ctrl", dff=60),
    "cwm": _config("cwm", head_dim=8, sliding_window=WINDOW),
    "deepseek_v2": _config(
        "deepseek_v2",
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        **LATENT,
    ),
    "deepseek_v3": _config(
        "deepseek_v3",
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        **LATENT,
    ),
    "ernie4_5": _config("ernie4_5", head_dim=8),
    "ernie4_5_moe": _config(
        "ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=20, moe_layer_start_index=1
    ),
    "exaone4": _config("exaone4", sliding_window=WINDOW, sliding_window_pattern=2),
    "falcon": _config("falcon"),
    "falcon, ALiBi": _config("falcon", hidden_size=48, num_attention_heads=6, multi_query=False, alibi=True),
    "falcon, new": _config("falcon", new_decoder_architecture=True, num_kv_heads=KV_HEADS),
    "flex_olmo": _config("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "gemma": _config("gemma", head_dim=16),
    "gemma2": _config("gemma2", head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=30.0),
    "gemma3": _config(
        "gemma3_text", head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "glm": _config("glm", head_dim=8),
    "glm4": _config("glm4", head_dim=8),
    "glm4_moe": _config("glm4_moe", head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=20),
    "gpt2": _gpt2("gpt2"),
    "gpt_bigcode": _gpt2("gpt_bigcode"),
    "gpt_neo": _config(
        "gpt_neo", num_layers=LAYERS, num_heads=HEADS, attention_types=[[["global", "local"], 1]], window_size=WINDOW
    ),
    "gpt_neox": _config("gpt_neox", num_key_value_heads=HEADS),
    "gpt_oss": _config("gpt_oss", head_dim=8, sliding_window=WINDOW, **LOCAL_EXPERTS),
    "gptj": _gpt2("gptj", rotary_dim=4),
    "granite": _config("granite"),
    "granite_swa": _config("granite_swa", sliding_window=WINDOW),
    "granitemoe": _config("granitemoe", **LOCAL_EXPERTS),
    "granitemoeshared": _config("granitemoeshared", shared_intermediate_size=24, **LOCAL_EXPERTS),
    "granitemoehybrid": _config(
        "granitemoehybrid",
        layer_types=["attention"] * LAYERS,
        shared_intermediate_size=24,
        mamba_n_heads=8,
        **LOCAL_EXPERTS,
    ),
    "helium": _config("helium", head_dim=8),
    "hunyuan_v1_dense": _config("hunyuan_v1_dense", head_dim=8),
    "hunyuan_v1_moe": _config("hunyuan_v1_moe", head_dim=8, num_experts=4, moe_topk=2),
    "hyperclovax": _config("hyperclovax"),
    "internlm3": _config("internlm3", head_dim=20),
    "iquestcoder": _config("iquestcoder", head_dim=24),
    "jais2": _config("jais2"),
    "lfm2": _config("lfm2", layer_types=["full_attention"] * LAYERS),
    "llama": _config("llama"),
    "llama, 1 layer, multi-query": _config("llama", num_hidden_layers=1, num_key_value_heads=1, head_dim=80),
    "llama, llama3 scaling": _config(
        "llama",
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama, dynamic scaling": _config("llama", **_rope("dynamic", factor=4.0)),
    "llama, linear scaling": _config("llama", **_rope("linear", factor=4.0)),
    "llama, yarn scaling": _config("llama", **_rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "mellum": _config("mellum", head_dim=8, **EXPERTS),
    "ministral": _config("ministral", head_dim=8, sliding_window=WINDOW),
    "ministral3": _config("ministral3", head_dim=8),
    "minicpm3": _config("minicpm3", **LATENT),
    "mistral": _config("mistral", sliding_window=WINDOW, num_hidden_layers=3),
    "mixtral": _config("mixtral", sliding_window=WINDOW, **LOCAL_EXPERTS),
    "mpt": lambda: AutoConfig.for_model(
        "mpt", vocab_size=VOCABULARY, d_model=48, n_heads=6, n_layers=LAYERS, max_seq_len=CONTEXT, **TOKENS
    ),
    "nanochat": _config("nanochat"),
    "nemotron": _config("nemotron"),
    "olmo": _config("olmo"),
    "olmo2": _config("olmo2"),
    "olmo3": _config("olmo3", sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "olmoe": _config("olmoe", num_experts=6, num_experts_per_tok=3),
    "opt": _config("opt", num_key_value_heads=HEADS, ffn_dim=60, word_embed_proj_dim=WIDTH),
    "opt, projected embeddings": _config("opt", ffn_dim=60, word_embed_proj_dim=16, do_layer_norm_before=False),
    "persimmon": _config("persimmon"),
    "phi": _config("phi"),
    "phi3": _config("phi3", sliding_window=WINDOW),
    "phimoe": _config("phimoe", sliding_window=WINDOW, **LOCAL_EXPERTS),
    "qwen1.5": _config("qwen2", num_key_value_heads=HEADS),
    "qwen2": _config("qwen2", head_dim=16, tie_word_embeddings=True),
    "qwen2_moe": _config("qwen2_moe", shared_expert_intermediate_size=24, **EXPERTS),
    "qwen3": _config("qwen3", head_dim=16),
    "qwen3_moe": _config("qwen3_moe", head_dim=16, **EXPERTS),
    "seed_oss": _config("seed_oss", head_dim=8),
    "smollm3": _config("smollm3", no_rope_layers=[1, 0]),
    "stablelm": _config("stablelm"),
    "starcoder2": _config("starcoder2", sliding_window=WINDOW),
    "vaultgemma": _config("vaultgemma", head_dim=8, sliding_window=WINDOW),
    "xglm": _config("xglm", d_model=WIDTH, attention_heads=HEADS, num_layers=LAYERS, ffn_dim=60),
    "youtu": _config("youtu", **LATENT),
}


# Decoder-only architectures that are refused by name, each for a reason of its own.
REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "mamba": _config("mamba", state_size=4),
    "rwkv": _config("rwkv", attention_hidden_size=WIDTH, context_length=CONTEXT),
    "recurrent_gemma": _config("recurrent_gemma", lru_width=WIDTH, attention_window_size=WINDOW, head_dim=8),
    "jamba": _config("jamba", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4),
    "qwen3_next": _config("qwen3_next", head_dim=16, num_experts=4, num_experts_per_tok=2),
    "lfm2, convolutions": _config("lfm2", layer_types=["conv", "full_attention"]),
    "llama4_text": _config("llama4_text", head_dim=8, attention_chunk_size=WINDOW, num_local_experts=2),
}


def make_zoo_base(path: Path, name: str, seed: int = 0) -> Path:
    """A base model of an architecture by its name here, in Hugging Face form, with random weights and a tokenizer."""
    return write_base_folder(path, (ARCHITECTURES | REFUSED)[name](), seed)
