"""Tiny multimodal models with random weights, one of each kind whose text part is taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, PreTrainedModel

from tests.builders import BOS, CONTEXT, EOS, PAD, VOCABULARY, make_tokenizer

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "patch_size": 14,
}
_THREE_POSITIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_CLIP = _VISION | {"model_type": "clip_vision_model"}
_PIXTRAL = _VISION | {"model_type": "pixtral", "head_dim": 16}
_AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
_RESAMPLER = {
    "hidden_size": 64,
    "resampler_n_heads": 2,
    "resampler_head_dim": 16,
    "num_key_value_heads": 2,
    "resampler_depth": 1,
    "resampler_n_latents": 4,
}


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return _TEXT | {"model_type": kind} | more


CONFIGS: dict[str, dict[str, Any]] = {
    "aria": {"text_config": _TEXT | {"moe_num_experts": 4, "moe_topk": 2}, "vision_config": _VISION},
    "deepseek_vl": {"text_config": _text("llama"), "vision_config": _VISION},
    "exaone4_5": {"text_config": _text("exaone4", sliding_window=8), "vision_config": _QWEN},
    "gemma3": {"text_config": _TEXT | {"sliding_window": 8}, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "idefics2": {"text_config": _text("mistral"), "vision_config": _VISION, "perceiver_config": _RESAMPLER},
    "idefics3": {"text_config": _text("llama"), "vision_config": _VISION},
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": _VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "lfm2_vl": {"text_config": _text("lfm2", layer_types=["full_attention"] * 2), "vision_config": _VISION},
    "lighton_ocr": {"text_config": _text("qwen3"), "vision_config": _PIXTRAL},
    "llava": {"text_config": _text("llama"), "vision_config": _CLIP},
    "llava_next": {"text_config": _text("mistral"), "vision_config": _CLIP},
    "llava_next_video": {"text_config": _text("llama"), "vision_config": _CLIP},
    "llava_onevision": {
        "text_config": _text("qwen2"),
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
    },
    "mistral3": {"text_config": _text("mistral"), "vision_config": _PIXTRAL, "spatial_merge_size": 2},
    "ovis2": {
        "text_config": _text("qwen2"),
        "vision_config": _VISION | {"vocab_size": 64},
        "hidden_size": 64,
        "vocab_size": VOCABULARY,
    },
    "qwen2_5_vl": {"text_config": _TEXT | _THREE_POSITIONS, "vision_config": _QWEN},
    "qwen2_audio": {"text_config": _text("qwen2"), "audio_config": _AUDIO},
    "qwen2_vl": {"text_config": _TEXT | _THREE_POSITIONS, "vision_config": _QWEN | {"hidden_size": 64}},
    "qwen3_vl": {"text_config": _TEXT | _THREE_POSITIONS, "vision_config": _QWEN | {"deepstack_visual_indexes": [0]}},
    "qwen3_vl_moe": {
        "text_config": _TEXT | _THREE_POSITIONS | _EXPERTS,
        "vision_config": _QWEN | {"deepstack_visual_indexes": [0]},
    },
    "smolvlm": {"text_config": _text("llama"), "vision_config": _VISION},
    "video_llava": {"text_config": _text("llama"), "vision_config": _CLIP},
    "vipllava": {"text_config": _text("llama"), "vision_config": _CLIP, "vision_feature_layers": [-1]},
    "voxtral": {"text_config": _text("llama"), "audio_config": _VISION},
}


def make_multimodal(folder: Path, kind: str, tied: bool = False, chat_template: str | None = None) -> PreTrainedModel:
    """The whole model of `kind`, in eval mode, and in `folder` with a tokenizer as transformers saves it."""
    torch.manual_seed(0)
    config: Any = CONFIG_MAPPING[kind]
    model: PreTrainedModel = AutoModelForMultimodalLM.from_config(
        config(**CONFIGS[kind], tie_word_embeddings=tied)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            else:  # norms and biases keep their centre
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(str(folder))
    make_tokenizer(folder, chat_template)
    return model
