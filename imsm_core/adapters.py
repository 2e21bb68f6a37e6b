"""The PEFT methods that training offers, with the paper's defaults. One line here adds one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from .errors import AdapterError


def _lora(rank: int, alpha: int, dropout: float, target_modules: str | list[str]) -> PeftConfig:
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )


PEFT_METHODS: dict[str, Callable[[int, int, float, str | list[str]], PeftConfig]] = {"lora": _lora}


def peft_config(
    method: str, rank: int = 16, alpha: int = 16, dropout: float = 0.1, target_modules: Sequence[str] | None = None
) -> PeftConfig:
    """The PEFT config of `method` on `target_modules` (None: every linear layer but the lm_head).

    Defaults are the authors' released ones. Raises AdapterError for a method that training does not offer.
    """
    if method not in PEFT_METHODS:
        raise AdapterError(f"unsupported PEFT method {method!r}; choose one of {', '.join(PEFT_METHODS)}")
    if rank < 1:
        raise AdapterError(f"adapter rank is {rank}; it must be at least 1")
    if not alpha > 0:
        raise AdapterError(f"adapter alpha is {alpha}; it must be above 0")
    if not 0 <= dropout < 1:
        raise AdapterError(f"adapter dropout is {dropout}; it must be in [0, 1)")
    return PEFT_METHODS[method](rank, alpha, dropout, list(target_modules) if target_modules else "all-linear")


def attach_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A new adapter on `model`, whose own weights stay frozen. Raises AdapterError if a target module matches no
    layer."""
    wanted: str | set[str] | None = getattr(config, "target_modules", None)
    try:
        with _known_warnings_ignored():
            peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(f"the adapter does not fit the model: {str(error).splitlines()[0]}") from error
    check_adapter(peft_model)
    names = [f".{layer.name}" for layer in adapted_layers(peft_model)]
    for target in sorted(wanted) if isinstance(wanted, set) else []:
        if not any(name.endswith(f".{target}") for name in names):  # PEFT is content if one of them matches
            raise AdapterError(f"the target module {target!r} matches no layer of the model")
    return peft_model


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of a standard PEFT folder on `model`. Raises AdapterError; reads safetensors only."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} has no {name}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        _check_config(config)
        with _known_warnings_ignored():
            peft_model = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)
            expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        found = load_file(folder / "adapter_model.safetensors")
    except AdapterError:
        raise
    except Exception as error:  # a truncated file, another shape, an unknown type: all mean the same to the user
        reason = str(error).strip().splitlines()
        raise AdapterError(f"cannot load the adapter in {folder}: {reason[0] if reason else error!r}") from error
    check_adapter(peft_model)
    if differing := sorted(expected.keys() ^ found.keys()):  # PEFT would go on with initial values
        raise AdapterError(
            f"the weights in {folder} are not those of its adapter_config.json: {len(differing)} missing or too many, "
            f"such as {differing[0]}"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise AdapterError(f"the adapter in {folder} holds values that are not finite")
    return peft_model


def check_adapter(peft_model: PeftModel) -> None:
    """Raise AdapterError for what contradicts the method: one lm_head and one set of embeddings, both frozen."""
    _check_config(peft_model.peft_config[peft_model.active_adapter])
    model = cast(PreTrainedModel, peft_model.get_base_model())
    for layer in adapted_layers(peft_model):
        if layer.tuner is model.get_output_embeddings() or layer.tuner is model.get_input_embeddings():
            raise AdapterError(f"the adapter touches {layer.name}; IMSM keeps the embeddings and the lm_head frozen")


def _check_config(config: PeftConfig) -> None:
    kind = peft_type(config)
    if kind.lower() not in PEFT_METHODS:
        raise AdapterError(f"unsupported PEFT type {kind}; supported: {', '.join(PEFT_METHODS).upper()}")
    modules_to_save = getattr(config, "modules_to_save", None)
    if modules_to_save:
        raise AdapterError(f"modules_to_save={modules_to_save} trains whole modules; IMSM keeps them frozen")
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise AdapterError(f"bias={bias!r} trains the backbone's own biases; IMSM keeps them frozen")
    if getattr(config, "trainable_token_indices", None):
        raise AdapterError("trainable_token_indices trains embeddings; IMSM keeps them frozen")


def peft_type(config: PeftConfig) -> str:
    """The name of the PEFT method as `peft.PeftType` spells it, such as LORA."""
    return str(getattr(config.peft_type, "value", config.peft_type))


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    """Without what PEFT warns of and this package handles: GPT-2's transposed layers, for which it corrects the
    config itself, adapter weights that differ from their config and a tied lm_head, which are refused, and a
    transformers function that PEFT still calls by its old name."""
    with warnings.catch_warnings():
        for message in (
            "fan_in_fan_out is set to",
            "Found missing adapter keys",
            "Model has `tie_word_embeddings=True`",
            "`is_gradient_checkpointing` is deprecated",
        ):
            warnings.filterwarnings("ignore", message)
        yield


class AdaptedLayer(NamedTuple):
    """A layer that the adapter touches: its name inside the causal LM, PEFT's tuner layer, the frozen layer in it."""

    name: str
    tuner: nn.Module
    frozen: nn.Module


def adapted_layers(peft_model: PeftModel) -> list[AdaptedLayer]:
    """Every layer that the adapter touches, in the model's order."""
    modules = peft_model.get_base_model().named_modules()
    return [
        AdaptedLayer(name, cast(nn.Module, module), module.get_base_layer())
        for name, module in modules
        if isinstance(module, BaseTunerLayer)
    ]
