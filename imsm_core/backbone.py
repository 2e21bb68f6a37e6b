"""The frozen backbone: loading it, its fingerprint, its last hidden states, and its head.

Works on any Hugging Face causal LM through the interface of `PreTrainedModel`; knows no architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .errors import BaseModelError


def load_base_model(name: str, revision: str | None = None) -> PreTrainedModel:
    """The causal LM at a local folder or hub id, in float32 and eval mode, every parameter frozen.

    Raises BaseModelError if it is not there or cannot be read (safetensors only; nothing is unpickled).
    """
    _check_local_folder(name)
    try:
        with _without_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # transformers, safetensors and the hub raise a dozen unrelated types here
        raise BaseModelError(f"cannot load the base model {name!r}: {first_line(error)}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would fill in random values
        raise BaseModelError(f"the base model {name!r} lacks {len(missing)} weights, such as {missing[0]}")
    model.requires_grad_(False)
    frozen: PreTrainedModel = model.eval()
    return frozen


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises BaseModelError if it has none that `tokenizer.json` can hold."""
    _check_local_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # as in load_base_model
        raise BaseModelError(f"cannot load the tokenizer of {name!r}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise BaseModelError(f"the tokenizer of {name!r} has no tokenizer.json form, which the runtime needs")
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


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


def _check_local_folder(name: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise BaseModelError(f"no base model at {name!r}: the folder does not exist")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message (with the second if it ends in a colon), or else its type's name."""
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError) and lines:  # its message is the bare key
        lines[0] = f"KeyError: {lines[0]}"
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines[0] = " ".join(f"{lines[0]} {lines[1]}".split())
    return lines[0] if lines else type(error).__name__
