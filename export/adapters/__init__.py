"""The two-stream forms of PEFT's tuner layers: one file per adapter family, one registration line each.

A two-stream form is a module that replaces a tuner layer before the trace. Its input holds the rows of both streams,
(2 * B, ...), base rows first; it applies the frozen layer to all of them, so that its weight is read once, and the
adapter's change to the adapter's rows alone. What no family claims goes to `fallback`, which knows no PEFT type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from imsm_core.adapters.attach import adapted_layers, causal_lm, peft_type

from . import adalora, fallback, ia3, ln_tuning, loha, lokr, lora, road, rotation, trainable_tokens, vblora, vera
from .biases import add_bias_changes
from .rows import ADAPTER_ROWS, TwoStreamEmbedding, TwoStreamForm

TWO_STREAM_FORMS: dict[str, TwoStreamForm] = {
    "LORA": lora.two_stream_lora,
    "ADALORA": adalora.two_stream_adalora,
    "IA3": ia3.two_stream_ia3,
    "VERA": vera.two_stream_vera,
    "LOHA": loha.two_stream_loha,
    "LOKR": lokr.two_stream_lokr,
    "OFT": rotation.two_stream_oft,
    "BOFT": rotation.two_stream_boft,
    "LN_TUNING": ln_tuning.two_stream_norm,
    "ROAD": road.two_stream_road,
    "VBLORA": vblora.two_stream_vblora,
    "TRAINABLE_TOKENS": trainable_tokens.two_stream_tokens,
}
"""By PEFT type, as `peft.PeftType` spells it."""

__all__ = [
    "ADAPTER_ROWS",
    "TWO_STREAM_FORMS",
    "TwoStreamEmbedding",
    "base_layers",
    "replaced_layers",
    "two_stream_layers",
]


def two_stream_layers(peft_model: PeftModel) -> dict[str, nn.Module]:
    """The two-stream form of every layer that the adapter touches, by its name inside the causal LM.

    Runs where the backbone has its original biases (`imsm_core.adapters.biases.original_biases`). Raises
    UnsupportedError naming the layer and the PEFT type for what has none.
    """
    adapter = peft_model.active_adapter
    family = TWO_STREAM_FORMS.get(peft_type(peft_model.peft_config[adapter]), fallback.no_form)
    embeddings = causal_lm(peft_model).get_input_embeddings()
    forms: dict[str, nn.Module] = {}
    for layer in adapted_layers(peft_model):
        reads_tokens = layer.tuner is embeddings
        if isinstance(layer.tuner, ModulesToSaveWrapper):
            copies = layer.tuner.modules_to_save
            forms[layer.name] = fallback.split_form(copies[adapter], layer.frozen, reads_tokens)
            continue
        if isinstance(layer.tuner, TrainableTokensWrapper):
            form = trainable_tokens.two_stream_tokens(layer.name, layer.tuner.token_adapter, layer.frozen, adapter)
        else:
            form = family(layer.name, layer.tuner, layer.frozen, adapter)
        if form is None or (isinstance(form, TwoStreamEmbedding) and not reads_tokens):
            form = fallback.two_stream_fallback(layer.name, layer.tuner, layer.frozen, reads_tokens)
        forms[layer.name] = form
    add_bias_changes(peft_model, forms)
    return forms


def base_layers(peft_model: PeftModel) -> dict[str, nn.Module]:
    """The frozen layer under every tuner layer: what a base-only graph is traced with."""
    return {layer.name: layer.frozen for layer in adapted_layers(peft_model)}


@contextmanager
def replaced_layers(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Put `layers` into `model` by name for the time of the block."""
    originals = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in originals.items():
            model.set_submodule(name, layer)
