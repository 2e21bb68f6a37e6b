"""Tiny models, tokenizers, siamese models and CHECKPOINT folders for the tests, made on the spot from a seed.

Every weight is random and large enough to matter: a swapped stream, a dropped adapter or a gate that is not applied
changes the numbers by far more than the tolerances.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from imsm_core.adapters.attach import attach_adapter, peft_type
from imsm_core.adapters.methods import peft_config
from imsm_core.backbone import fingerprint, hidden_size, load_base_model, load_tokenizer
from imsm_core.checkpoint import CheckpointInfo, save_checkpoint
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel

HEADS, KV_HEADS, LAYERS, CONTEXT = 4, 2, 2, 128
BOS, EOS, PAD, VOCABULARY = 0, 1, 2, 259  # three special tokens, then the 256 bytes

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(path: Path, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer in `path` (one token a byte, so any text encodes; a prompt gets <s> in front)."""
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=chat_template
    )
    fast.save_pretrained(str(path))
    return load_tokenizer(str(path))


def make_config(kind: str, head_dim: int = 8, tied: bool = False) -> PreTrainedConfig:
    """d = 4 * head_dim, two layers; two key/value heads where the architecture has them."""
    width = HEADS * head_dim
    tokens: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=width, n_layer=LAYERS, n_head=HEADS, **tokens
        )
    configs: dict[str, Callable[..., PreTrainedConfig]] = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
    }
    return configs[kind](
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width - 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        **tokens,
    )


def make_base_folder(
    path: Path,
    kind: str = "llama",
    seed: int = 0,
    head_dim: int = 8,
    tied: bool = False,
    chat_template: str | None = None,
) -> Path:
    """A base model in Hugging Face form, safetensors and tokenizer, of kind llama, qwen2, qwen3 or gpt2 (whose
    embeddings are always tied)."""
    return write_base_folder(path, make_config(kind, head_dim, tied), seed, chat_template)


def write_base_folder(path: Path, config: PreTrainedConfig, seed: int = 0, chat_template: str | None = None) -> Path:
    """A base model of any causal LM's config, in Hugging Face form, with random weights and a tokenizer."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # norms and biases keep their centre
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise * (0.5 if "emb" in name or "wte" in name else 1.5 / config.hidden_size**0.5))
    model.save_pretrained(str(path))
    make_tokenizer(path, chat_template)
    return path


def randomize(model: SiameseModel, seed: int, scale: float = 0.25) -> None:
    """Give every weight of the adapter and the gate a random value, LoRA's B (zero at first) among them. The adapter's
    values do not depend on the kind of gate."""
    with torch.no_grad():
        for name, parameter in sorted(model.trainable_parameters().items()):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def make_siamese(
    base_folder: Path,
    gate_kind: str = "query_aware",
    rank: int = 4,
    target_modules: Sequence[str] | None = None,
    seed: int = 1,
    gate_rank: int = 3,
    dropout: float = 0.0,
) -> SiameseModel:
    """A siamese model with a random non-zero LoRA of `rank` (scale 2) and a random gate, in eval mode."""
    base = load_base_model(str(base_folder))
    gate = make_gate(gate_kind, hidden_size(base), gate_rank, dropout)
    config = peft_config("lora", rank, 2 * rank, dropout, target_modules)
    model = SiameseModel(attach_adapter(base, config), gate)
    randomize(model, seed)
    return model.eval()


def save_tiny_checkpoint(model: SiameseModel, base_folder: Path, path: Path, force: bool = False) -> CheckpointInfo:
    """Write the CHECKPOINT folder of `model` and return what its imsm.json says."""
    info = CheckpointInfo(
        base_model=str(base_folder),
        base_revision=None,
        base_fingerprint=fingerprint(load_base_model(str(base_folder))),
        gate_kind=model.gate.kind,
        gate_rank=model.gate.rank,
        peft_type=peft_type(model.peft_model.peft_config[model.peft_model.active_adapter]),
        training={"seed": 7},
        data={"rows": 3},
        metrics={"final_loss": 1.5},
    )
    save_checkpoint(model, info, path, force)
    return info


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
