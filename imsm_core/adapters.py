"""The PEFT methods that training offers, with the paper's defaults. One line here adds one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from .errors import AdapterError


def _lora(rank: int, alpha: float, dropout: float, target_modules: str | list[str]) -> PeftConfig:
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )


PEFT_METHODS: dict[str, Callable[[int, float, float, str | list[str]], PeftConfig]] = {"lora": _lora}


def peft_config(
    method: str, rank: int = 16, alpha: float = 16, dropout: float = 0.1, target_modules: Sequence[str] | None = None
) -> PeftConfig:
    """The PEFT config of `method` on `target_modules` (None: every linear layer but the lm_head).

    Defaults are the authors' released ones. Raises AdapterError for a method that training does not offer.
    """
    if method not in PEFT_METHODS:
        raise AdapterError(f"unsupported PEFT method {method!r}; choose one of {', '.join(PEFT_METHODS)}")
    if rank < 1:
        raise AdapterError(f"adapter rank is {rank}; it must be at least 1")
    return PEFT_METHODS[method](rank, alpha, dropout, list(target_modules) if target_modules else "all-linear")


def attach_adapter(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """A new adapter on `model`, whose own weights stay frozen. Raises AdapterError if no layer matches."""
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(f"the adapter does not fit the model: {str(error).splitlines()[0]}") from error
    check_adapter(peft_model)
    return peft_model


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter of a standard PEFT folder on `model`. Raises AdapterError; reads safetensors only."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise AdapterError(f"{folder} has no {name}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        peft_model = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=True)
    except Exception as error:  # a truncated file, another shape, an unknown type: all mean the same to the user
        raise AdapterError(f"cannot load the adapter in {folder}: {str(error).strip().splitlines()[0]}") from error
    check_adapter(peft_model)
    return peft_model


def check_adapter(peft_model: PeftModel) -> None:
    """Raise AdapterError for what contradicts the method: one lm_head and one set of embeddings, both frozen."""
    config = peft_model.peft_config[peft_model.active_adapter]
    kind = config.peft_type.value
    if kind.lower() not in PEFT_METHODS:
        raise AdapterError(f"unsupported PEFT type {kind}; supported: {', '.join(PEFT_METHODS).upper()}")
    if getattr(config, "modules_to_save", None):
        raise AdapterError(f"modules_to_save={config.modules_to_save} trains whole modules; IMSM keeps them frozen")
    model = peft_model.get_base_model()
    for name, layer in tuner_layers(peft_model):
        if layer is model.get_output_embeddings() or layer is model.get_input_embeddings():
            raise AdapterError(f"the adapter touches {name}; IMSM keeps the embeddings and the lm_head frozen")


def tuner_layers(peft_model: PeftModel) -> list[tuple[str, BaseTunerLayer]]:
    """The layers that the adapter touches, as (name inside the causal LM, tuner layer)."""
    modules = peft_model.get_base_model().named_modules()
    return [(name, module) for name, module in modules if isinstance(module, BaseTunerLayer)]
