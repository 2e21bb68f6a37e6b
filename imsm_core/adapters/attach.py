"""A PEFT adapter on a frozen base model: attaching a new one, loading a saved one, and where it sits.

Works with any method that changes layers one by one or puts virtual tokens in front of the text; `refusals.py` says
what contradicts IMSM and why. The backbone's weights stay the same to the bit; that is checked.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from ..errors import AdapterError, first_line
from .biases import backbone_biases, keep_original_biases
from .configs import warnings_unless_refused
from .refusals import BackboneSnapshot, check_config, check_fits, check_new_config
from .saved import FILES, SavedAdapter, read_adapter
from .trial import check_memory, check_sizes, load_tensors
from .vocabulary import fit_vocabulary


def attach_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A new adapter on `model`, whose own weights stay frozen. Raises AdapterError if the method is refused or does
    not fit the model, or if a target module matches no layer."""
    wanted: str | set[str] | None = getattr(config, "target_modules", None)
    check_new_config(config)
    check_fits(config, model)
    before = BackboneSnapshot(model)
    try:
        check_memory(model, config)
        with known_warnings_ignored():
            peft_model = get_peft_model(model, config)
    except AdapterError:
        raise
    except Exception as error:  # PEFT raises a dozen types for a layer or a size that a method does not support
        raise AdapterError(f"the adapter does not fit the model: {first_line(error)}") from error
    _settle(peft_model, before)
    names = [f".{layer.name}" for layer in adapted_layers(peft_model)]
    for target in sorted(wanted) if isinstance(wanted, set) else []:
        if not any(name.endswith(f".{target}") for name in names):  # PEFT accepts them if one matches
            raise AdapterError(f"the target module {target!r} matches no layer of the model")
    if getattr(config, "use_asa", False):
        raise AdapterError("AdaMSS with use_asa needs a training callback that IMSM does not run; set use_asa to false")
    if not any(parameter.requires_grad for parameter in peft_model.parameters()):
        raise AdapterError(f"there is nothing to train: this {peft_type(config)} config has no trainable parameter")
    return peft_model


@warnings_unless_refused()
def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of a standard PEFT folder on `model`. Raises AdapterError; reads safetensors only.

    Adapters of virtual tokens come back frozen: their files hold the tokens, not the encoder that was trained.
    """
    saved, _ = fit_vocabulary(model, read_adapter(folder))
    return put_on(model, saved)


def put_on(model: PreTrainedModel, saved: SavedAdapter) -> PeftModel:
    """`load_adapter` of an adapter that has been read, and fitted to the model's vocabulary."""
    config: Any = saved.config
    task = str(getattr(saved.config.task_type, "value", saved.config.task_type))
    try:
        check_fits(config, model)
        before = BackboneSnapshot(model)
        config.inference_mode = config.is_prompt_learning
        check_sizes(model, saved)
        with known_warnings_ignored():
            peft_model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task, PeftModel)(model, config)
            load_tensors(peft_model, saved)
            free_lm_head(peft_model)
            expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    except AdapterError:
        raise
    except Exception as error:  # PEFT raises a dozen types for a layer or a size that a method does not support
        reason = first_line(error).rstrip(".")
        if reason.startswith("Target modules "):  # PEFT names all of them
            layers = config.target_modules
            first = layers if isinstance(layers, str) else next(iter(sorted(layers or [])), "none")
            reason = f"this {model.config.model_type} model has none of its target modules, such as {first!r}"
        raise AdapterError(f"cannot load the adapter in {saved.folder}: {reason}{saved.hint()}") from error
    if differing := sorted(expected.keys() ^ saved.tensors.keys()):  # PEFT would keep initial values
        raise AdapterError(
            f"the weights in {saved.folder} do not match its adapter_config.json: {len(differing)} missing or "
            f"unexpected, such as {differing[0]}{saved.hint()}"
        )
    for name, tensor in saved.tensors.items():
        if not tensor.is_floating_point() and expected[name].is_floating_point():
            raise AdapterError(f"the adapter in {saved.folder} holds integers in {name}, which must be floating-point")
    _settle(peft_model, before)
    return peft_model


def save_adapter(peft_model: PeftModel, folder: Path) -> None:
    """Write the active adapter as a standard PEFT folder, which must not exist."""
    name = peft_model.active_adapter
    with known_warnings_ignored():
        peft_model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
    if name != "default":  # PEFT writes any other adapter into a subfolder of its name
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()
    _sort_sets(peft_model.peft_config[name], folder / FILES[0])


def _sort_sets(config: PeftConfig, file: Path) -> None:
    """PEFT writes a set, such as target_modules, in an order that changes from run to run."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    ordered = {name: sorted(value) for name, value in fields.items() if isinstance(getattr(config, name, None), set)}
    file.write_text(json.dumps(fields | ordered, indent=2, sort_keys=True), encoding="utf-8")


def _settle(peft_model: PeftModel, before: BackboneSnapshot) -> None:
    """Put the frozen lm_head back, keep the backbone's original biases, and refuse what IMSM cannot use."""
    free_lm_head(peft_model)
    biases = before.trained_biases()
    head = causal_lm(peft_model).get_output_embeddings()
    if head is not None and any(bias is parameter for bias, _ in biases.values() for parameter in head.parameters()):
        raise AdapterError("the adapter trains the lm_head's bias; IMSM keeps the lm_head frozen, for both streams")
    before.check_unchanged(peft_model)
    keep_original_biases(peft_model, biases)
    check_adapter(peft_model)


def check_adapter(peft_model: PeftModel) -> None:
    """Raise AdapterError if several adapters are active at once, or one is merged or on the lm_head."""
    check_config(peft_model.peft_config[peft_model.active_adapter])
    if len(names := peft_model.active_adapters) > 1:
        raise AdapterError(f"{len(names)} adapters are active at once ({', '.join(names)}); activate one of them")
    model = causal_lm(peft_model)
    head, backbone = model.get_output_embeddings(), set(model.base_model.modules())
    for layer in adapted_layers(peft_model):
        if layer.tuner not in backbone or any(module is head for module in layer.tuner.modules()):
            raise AdapterError(f"the adapter touches {layer.name}; IMSM keeps the lm_head frozen, for both streams")
        if getattr(layer.tuner, "merged", False):
            raise AdapterError(f"the adapter is merged into {layer.name}; unmerge it first")
    backbone_biases(peft_model)


def free_lm_head(peft_model: PeftModel) -> None:
    """Trained tokens of tied embeddings: PEFT wraps the lm_head along with the embeddings. The lm_head is
    frozen and shared by both streams, so the wrapper is removed; its values are those of the embeddings and are saved
    there."""
    model = causal_lm(peft_model)
    head: Any = model.get_output_embeddings()
    layer = head.token_adapter if isinstance(head, TrainableTokensWrapper) else head
    if isinstance(layer, TrainableTokensLayer) and layer.tied_adapter is not None:
        model.set_output_embeddings(layer.get_base_layer())


def causal_lm(peft_model: PeftModel) -> PreTrainedModel:
    """The Hugging Face causal LM inside the PEFT model, with the adapter's layers in place."""
    return cast(PreTrainedModel, peft_model.get_base_model())


def peft_type(config: PeftConfig) -> str:
    """The name of the PEFT method as `peft.PeftType` spells it, such as LORA."""
    return str(getattr(config.peft_type, "value", config.peft_type))


@contextmanager
def known_warnings_ignored() -> Iterator[None]:
    """Hide PEFT's warnings about what this package handles or refuses itself."""
    with warnings.catch_warnings():
        for message in (
            "fan_in_fan_out is set to",  # GPT-2's transposed layers, for which PEFT corrects the config
            "Found missing adapter keys",  # refused in `load_adapter`
            "Model has `tie_word_embeddings=True`",  # the lm_head stays frozen, whatever the embeddings do
            "`is_gradient_checkpointing` is deprecated",  # a transformers function that PEFT calls by its old name
            "Careful, disabling adapter layers with bias",  # the base stream swaps the original biases in
            "Unsupported layer type",  # norms; they have no input size and need none
            "`lora_bias=True` was passed but the targeted layer",  # concerns merging
            "Detected that the base layer has no bias term",  # concerns merging
            r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape",  # biases, and AdaLoRA's layers left without rank
            r"The following rank_pattern keys did not match any targeted module.*\['[^']*\.lora_E'",  # AdaLoRA's keys
            "Failed to load the CUDA extension",  # BOFT's kernel; PyTorch computes the same
            "Setting boft_n_butterfly_factor to 1",
        ):
            warnings.filterwarnings("ignore", message)
        yield


class AdaptedLayer(NamedTuple):
    """A module that the adapter changes: its name inside the causal LM, PEFT's module, which the adapter stream runs,
    and the frozen original in it, which the base stream runs."""

    name: str
    tuner: nn.Module
    frozen: nn.Module


def adapted_layers(peft_model: PeftModel) -> list[AdaptedLayer]:
    """Every module of the causal LM that differs between the streams, in the model's order; only the outermost
    of nested ones. Empty for methods that only add virtual tokens. Trained biases are in `backbone_biases` instead."""
    layers: list[AdaptedLayer] = []
    for name, module in causal_lm(peft_model).named_modules():
        if layers and name.startswith(f"{layers[-1].name}."):
            continue
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        adapters = module._get_available_adapters()  # empty for a method that keeps its values in the model
        if adapters and peft_model.active_adapter not in adapters:
            continue
        frozen = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        layers.append(AdaptedLayer(name, cast(nn.Module, module), frozen))
    return layers
