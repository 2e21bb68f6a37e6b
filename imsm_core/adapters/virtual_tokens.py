"""Virtual tokens: PEFT methods that put trained vectors in front of the adapter stream's text and change no layer.

Prompt tuning and p-tuning add input embeddings, prefix tuning adds entries to every layer's key/value cache. Either
way the text's positions begin at V, as in PEFT's own forward, and the V virtual positions are not in the result: they
are neither query nor text, and the base stream never sees them.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..backbone import last_hidden_state
from ..errors import AdapterError, DataError
from .attach import causal_lm, peft_type

_CACHE_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


def virtual_tokens(peft_model: PeftModel) -> int:
    """V, how many virtual tokens stand before the adapter stream's text; 0 for methods that change layers."""
    config: Any = peft_model.peft_config[peft_model.active_adapter]
    return int(config.num_virtual_tokens) if config.is_prompt_learning else 0


def context_length(model: PreTrainedModel) -> int | None:
    """How many positions the model has, or None if its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def adapter_hidden_state(
    peft_model: PeftModel, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None
) -> Tensor:
    """(B, S, d): the adapter stream's last hidden states at the text's positions.

    input_ids: (B, S) int64, right-padded; attention_mask: (B, S), 0 at padding. cache: of the virtual tokens
    (`virtual_token_cache`), which then do not run again; the text is appended to it. Raises DataError if virtual tokens
    and text together are longer than the model's context.
    """
    model = causal_lm(peft_model)
    count, (rows, length) = virtual_tokens(peft_model), input_ids.shape
    if count == 0:
        return last_hidden_state(model, input_ids=input_ids, attention_mask=attention_mask)
    context = context_length(model)
    if context is not None and count + length > context:
        raise DataError(
            f"a text of {length} tokens after {count} virtual tokens is longer than the model's context of {context}"
        )
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(rows, count), attention_mask], dim=1)
    if cache is None and _prompts_are_cache(peft_model):
        cache = peft_model.get_prompt(batch_size=rows)
    if cache is not None:
        hidden: Tensor = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return hidden
    text: Tensor = model.get_input_embeddings()(input_ids)
    embeddings = torch.cat([_prompt_embeddings(peft_model, rows, text.dtype), text], dim=1)  # (B, V + S, d)
    return last_hidden_state(model, inputs_embeds=embeddings, attention_mask=attention_mask)[:, count:]


@torch.no_grad()
def prompt_cache(peft_model: PeftModel) -> list[tuple[Tensor, Tensor]]:
    """The adapter stream's key/value cache after only the virtual tokens: per layer a key and a value, each
    (1, kv_heads, V, head_size) float32. Empty without virtual tokens. For a layer whose sliding window is not larger
    than V it may hold only the last window - 1 virtual tokens: the text never sees the others there.

    Raises AdapterError if a layer has no such cache, for example because it shares another layer's.
    """
    count, cache = virtual_tokens(peft_model), virtual_token_cache(peft_model)
    if cache is None:
        return []
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        kept = {count, min(count, layer.sliding_window - 1) if layer.is_sliding else count}
        if layer.keys is None or layer.keys.dim() != 4 or layer.keys.shape[2] not in kept:
            raise AdapterError(f"layer {index} of the model does not cache the {count} virtual tokens")
    return [(layer.keys.float().clone(), layer.values.float().clone()) for layer in layers]


@torch.no_grad()
def virtual_token_cache(peft_model: PeftModel, rows: int = 1) -> Any:
    """The adapter stream's cache of `rows` rows after only the virtual tokens, as transformers keeps it; None without
    virtual tokens."""
    if virtual_tokens(peft_model) == 0:
        return None
    if _prompts_are_cache(peft_model):
        return peft_model.get_prompt(batch_size=rows)
    model, cache = causal_lm(peft_model), DynamicCache()
    prompts = _prompt_embeddings(peft_model, rows, model.dtype)
    model.base_model(inputs_embeds=prompts, past_key_values=cache, use_cache=True)
    return cache


def _prompts_are_cache(peft_model: PeftModel) -> bool:
    return peft_type(peft_model.peft_config[peft_model.active_adapter]) in _CACHE_TYPES


def _prompt_embeddings(peft_model: PeftModel, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, V, d)"""
    prompts: Tensor = peft_model.get_prompt(batch_size=rows)
    return prompts.to(dtype)
