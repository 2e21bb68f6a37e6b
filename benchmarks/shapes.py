"""The model shapes that the benchmarks measure, with random weights: only time and memory mean anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from imsm_core.siamese import SiameseModel

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
GATE, GATE_RANK = "query_aware", 8


@dataclass(frozen=True)
class Sizes:
    """What determines how many bytes a decode step reads. layer_weights: every layer's projections; adapter_weights:
    both factors of a LoRA of the given rank on each of the seven projections."""

    layer_weights: int
    head_weights: int
    adapter_weights: int
    cache_values_per_token: int


def sizes(shape: dict[str, Any], rank: int) -> Sizes:
    """The counts for one shape."""
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    head = shape.get("head_dim", width // shape["num_attention_heads"])
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    projections = [(width, queries), (width, keys), (width, keys), (queries, width)]
    projections += [(width, inner), (width, inner), (inner, width)]
    return Sizes(
        layer_weights=layers * sum(a * b for a, b in projections),
        head_weights=width * shape["vocab_size"],
        adapter_weights=layers * sum(rank * (a + b) for a, b in projections),
        cache_values_per_token=2 * layers * keys,
    )


def random_base(shape: dict[str, Any]) -> PreTrainedModel:
    """A causal LM of this shape with the library's own random initialization, from seed 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    config.eos_token_id = 1  # onnxruntime-genai's builder wants one; no run here stops at it
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.requires_grad_(False)
    model.eval()
    return model


def random_siamese(base: PreTrainedModel, rank: int) -> SiameseModel:
    """LoRA on all seven projections and a query-aware gate, every factor random and non-zero, from seed 1."""
    import torch

    from imsm_core.adapters.attach import attach_adapter
    from imsm_core.adapters.methods import peft_config
    from imsm_core.backbone import hidden_size
    from imsm_core.gates import make_gate
    from imsm_core.siamese import SiameseModel

    torch.manual_seed(1)
    model = SiameseModel(attach_adapter(base, peft_config("lora", rank)), make_gate(GATE, hidden_size(base), GATE_RANK))
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def small_tokenizer(size: int = 2) -> PreTrainedTokenizerFast:
    """Of `size` tokens, at least two: the benchmarks feed token ids, but exporters want a tokenizer to copy, and draw
    random tokens from it for what they measure."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = {"<s>": 0, "</s>": 1, **{f"<{index}>": index for index in range(2, size)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(tokens, [])), bos_token="<s>", eos_token="</s>"
    )
