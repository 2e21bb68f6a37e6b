"""Adapters that were trained after tokens were added, as PEFT and trl leave them: embeddings, tokenizer and template in
one folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests.builders import VOCABULARY

NEW = [VOCABULARY, VOCABULARY + 1]
TEXT = torch.tensor([[0, 70, NEW[0], 80, 90, NEW[1], 100]])
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WAYS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "copied embeddings": {"modules_to_save": ["embed_tokens"]},
    "trained tokens": {"trainable_token_indices": NEW},
    "trained tokens by name": {"trainable_token_indices": {"embed_tokens": NEW}},
    "lora on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "copied embeddings and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "trained tokens of both": {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
    "tokens alone": {"peft_type": "TRAINABLE_TOKENS"},
}
"""How an adapter treats the rows of the tokens that were added before it was made."""


def resized(base: Path, seed: int, rows: int = VOCABULARY + 2) -> PreTrainedModel:
    """The base model with random rows for added tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if rows > VOCABULARY:
                module.weight[VOCABULARY:] = 0.5 * torch.randn(rows - VOCABULARY, 32, generator=generator)
    resized_model: PreTrainedModel = model.eval()
    return resized_model


def save_tokenizer(base: Path, folder: Path, template: str | None = TEMPLATE) -> None:
    """The base model's tokenizer with the two added tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))


def train(base: Path, folder: Path, way: str, rows: int = VOCABULARY + 2, **saving: Any) -> PeftModel:
    """The PEFT model of a random adapter, saved in `folder` with its tokenizer. What it trains is random, but for a
    copy of the lm_head, which only has new rows for the added tokens."""
    torch.manual_seed(3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tied embeddings and about storing them
        model = get_peft_model(resized(base, 1, rows), config(way))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                first = VOCABULARY if "lm_head.modules_to_save" in name else 0
                parameter[first:] += 0.2 * torch.randn_like(parameter[first:])
        model.save_pretrained(str(folder), **saving)
    save_tokenizer(base, folder)
    return model.eval()


def config(way: str) -> PeftConfig:
    """One of WAYS."""
    options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | WAYS[way]
    if options.pop("peft_type", "LORA") == "TRAINABLE_TOKENS":
        return TrainableTokensConfig(token_indices=NEW, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    return LoraConfig(task_type="CAUSAL_LM", **options)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """(1, 7, vocabulary) over TEXT."""
    found: Tensor = model(TEXT).logits
    return found
