"""The frozen backbone: loading it, its fingerprint, its last hidden states, and its head.

Works on any Hugging Face causal LM through the interface of `PreTrainedModel`; knows no architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .base_formats import fp8_in_whole_blocks, quantization_config
from .base_source import (
    check_causal,
    check_own_code,
    check_tokenizer,
    find_source,
    quiet_libraries,
    read_config,
    reason,
    without_kernels,
)
from .base_weights import check_complete, check_end_tokens, check_layers, check_stored, make_float32, stored_weights
from .errors import BaseModelError
from .template_trial import check_templates
from .text_part import text_part


def load_base_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """The causal LM in a folder, in a GGUF file or at a hub id, in float32 and eval mode, every parameter frozen. Of a
    multimodal model it is the text part; weights that are stored in fp8, mxfp4 or GGUF's formats become floats.

    Raises BaseModelError if it is not there, cannot be read or is not whole. Safetensors and GGUF only: nothing is
    unpickled, and no code that comes with a model runs.
    """
    source = find_source(name, revision)
    fields = read_config(source)
    check_own_code(source, fields)
    quantization = quantization_config(source, fields)
    stored = stored_weights(source)
    try:
        with quiet_libraries(), fp8_in_whole_blocks():
            config = AutoConfig.from_pretrained(source.place, **source.arguments())
            part = text_part(name, config)
            config = without_kernels(config if part is None else part.config)
            check_causal(source, config)
            if stored is not None:
                check_layers(source, config, stored)
                with torch.device("meta"):
                    skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
                check_stored(source, skeleton, stored, quantization is not None)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.place,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # and refused in one line
                quantization_config=quantization,
                key_mapping=part and part.key_mapping,
                **source.arguments(),
            )
    except BaseModelError:
        raise
    except Exception as error:  # transformers, safetensors and the hub raise a dozen unrelated types here
        raise BaseModelError(f"cannot load the base model {name!r}: {reason(source, error)}") from error
    model, loading = loaded
    if part is not None:
        loading["unexpected_keys"] = set(filter(part.has, loading["unexpected_keys"]))
    check_complete(source, model, loading)
    check_end_tokens(source, model)
    make_float32(source, model)
    model.requires_grad_(False)
    frozen: PreTrainedModel = model.eval()
    return frozen


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises BaseModelError if it has none that `tokenizer.json` can hold."""
    source = find_source(name, revision)
    check_tokenizer(source)
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(source.place, **source.arguments())
            tokenizer("a")  # a setting of the wrong type, such as model_max_length, shows only here
    except Exception as error:  # as in load_base_model
        raise BaseModelError(f"cannot load the tokenizer of {name!r}: {reason(source, error)}") from error
    if not tokenizer.is_fast:
        raise BaseModelError(f"the tokenizer of {name!r} has no tokenizer.json form, which the runtime needs")
    if why := check_templates(tokenizer.chat_template):
        raise BaseModelError(f"the chat template of {name!r} cannot be used: {why}")
    return tokenizer


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the name, shape and float32 bytes of every parameter, tied ones once, before PEFT wraps them."""
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def hidden_size(model: PreTrainedModel) -> int:
    """d, the width of the last hidden state: what the lm_head reads."""
    head = model.get_output_embeddings()
    if head is None:
        raise BaseModelError(f"{type(model).__name__} has no lm_head; IMSM needs a causal language model")
    return int(head.weight.shape[-1])


def embedded_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model can read: perhaps fewer than its tokenizer has."""
    embeddings: Any = model.get_input_embeddings()  # PEFT's, where an adapter trains some of them
    return int(embeddings.weight.shape[0])


def last_hidden_state(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """(B, S, d): the backbone's output after its final norm, without lm_head and without a cache."""
    hidden: Tensor = model.base_model(use_cache=False, **inputs).last_hidden_state
    return hidden


def apply_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (B, N, vocab) of `hidden` (B, N, d): everything that the causal LM does after its backbone.

    The model's own forward runs with the backbone replaced by a stub that returns `hidden`, so that logit scales
    and soft-capping, which some architectures apply after the lm_head, are included.
    """
    with _backbone_returning(model, hidden):
        logits: Tensor = model(inputs_embeds=hidden, use_cache=False).logits
    return logits


@dataclass
class _BackboneOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Has every field that a causal LM of any architecture reads from its backbone's output."""

    router_logits: tuple[Tensor, ...] | None = None


@contextmanager
def _backbone_returning(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    backbones = {model.base_model, model.get_decoder()} - {model}  # OPT's causal LM calls the decoder inside
    calls: list[None] = []

    def stub(*args: Any, **kwargs: Any) -> _BackboneOutput:
        calls.append(None)
        return _BackboneOutput(last_hidden_state=hidden)

    for backbone in backbones:
        backbone.forward = stub
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.__dict__.pop("forward", None)
    if not calls:
        raise BaseModelError(f"{type(model).__name__} does not separate its backbone from its lm_head")
