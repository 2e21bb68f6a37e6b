"""Which PEFT adapters contradict IMSM, by name and with the reason.

IMSM runs one frozen backbone as two streams and one frozen lm_head. So an adapter has to leave the backbone's own
weights unchanged, and may only change how some layers compute or put virtual tokens in front of the text.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import AdapterError
from .patterns import check_patterns

REFUSED_TYPES = {
    "MULTITASK_PROMPT_TUNING": "it needs a task id with every text",
    "POLY": "it needs a task id with every text",
    "ADAPTION_PROMPT": "it replaces whole attention modules with its own code",
    "XLORA": "it mixes several adapters with a classifier that needs an extra pass",
    "SHADOW": "it runs a second network beside the layers, instead of changing layers or adding virtual tokens",
    "OSF": "it replaces the backbone's own weights with their decomposition",
    "LILY": "its router averages over the whole text and batch, so that a token sees later ones",
    "CPT": "it has its own training loss, on texts with a type for every token",
}

_LORA_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
_CHANGES_BACKBONE = "changes the backbone's own weights, which the base stream needs as they are"
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "switches the adapter on in the middle of a text",
    "arrow_config": "routes between several adapters",
    "layer_replication": "repeats layers of the backbone, and the base stream needs the backbone unchanged",
    "megatron_config": "needs Megatron's parallel layers",
    "monteclora_config": "draws random weights and has its own training loss",
    "kasa_config": _CHANGES_BACKBONE,
    "sample_at_inference": "draws random numbers at inference",
}


def check_config(config: PeftConfig) -> None:
    """Raise AdapterError for what the config alone shows to be unsupported."""
    check_type(str(getattr(config.peft_type, "value", config.peft_type)))
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        raise AdapterError(f"the adapter is for the task {task}; IMSM needs one for CAUSAL_LM")
    for option, reason in _REFUSED_OPTIONS.items():
        if getattr(config, option, None):
            raise AdapterError(f"the adapter's {option} is not supported: it {reason}")
    init: Any = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_LORA_INITS):
        raise AdapterError(f"init_lora_weights={init!r} is not supported: it {_CHANGES_BACKBONE}")
    check_finite({field.name: getattr(config, field.name) for field in dataclasses.fields(config)})
    virtual = getattr(config, "num_virtual_tokens", None)
    if config.is_prompt_learning and (type(virtual) is not int or virtual < 1):
        raise AdapterError(f"the adapter's num_virtual_tokens is {virtual!r}; it must be a whole number of at least 1")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str | list | dict) and field.type in ("int", "float", int, float):
            raise AdapterError(f"the adapter's {field.name} is {value!r}; it must be a number")


def check_new_config(config: PeftConfig) -> None:
    """`check_config`, and what is allowed in a trained adapter but not in a new one."""
    check_config(config)
    if (init := getattr(config, "init_lora_weights", None)) == "eva":
        raise AdapterError(
            f"init_lora_weights={init!r} is not supported: it needs an extra pass over the data to start from"
        )


def check_type(kind: str) -> None:
    """Raise AdapterError for a PEFT type that contradicts IMSM."""
    if kind in REFUSED_TYPES:
        raise AdapterError(f"the PEFT type {kind} is not supported: {REFUSED_TYPES[kind]}")


def check_finite(fields: dict[str, Any]) -> None:
    """Raise AdapterError naming the field of a config that holds a number that is not finite."""
    for name, value in fields.items():
        if not _finite(value):
            raise AdapterError(f"the adapter's {name} is not finite")


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_fits(config: PeftConfig, model: PreTrainedModel) -> None:
    """Raise AdapterError if a config names tokens that `model` does not have, or its lm_head, or has a pattern that
    cannot be used on its modules."""
    check_patterns(config, model)
    embeddings: Any = model.get_input_embeddings()
    chosen = getattr(config, "trainable_token_indices", None)
    found = list(chosen.values()) if isinstance(chosen, dict) else [] if chosen is None else [chosen]
    if hasattr(config, "token_indices"):
        found.append(config.token_indices)
    for indices in found:
        check_tokens(indices, int(embeddings.weight.shape[0]))
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    saved = getattr(config, "modules_to_save", None) or []
    if head is not None and any(f".{name}".endswith(f".{end}") for end in saved):
        raise AdapterError(f"the adapter touches {name}; IMSM keeps the lm_head frozen, for both streams")


def check_tokens(indices: Any, vocabulary: int) -> None:
    """Raise AdapterError unless `indices` are distinct tokens, at least one."""
    if not isinstance(indices, list) or not indices or not all(type(index) is int for index in indices):
        raise AdapterError(f"the adapter's token_indices is {indices!r}; it must be a list of token ids, at least one")
    if outside := [index for index in indices if not 0 <= index < vocabulary]:
        raise AdapterError(f"the token id {outside[0]} is not in the model's vocabulary of {vocabulary}")
    if len(set(indices)) < len(indices):
        raise AdapterError("the adapter's token_indices names a token twice")


class BackboneSnapshot:
    """The backbone's weights as they were before an adapter was attached."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._parameters = dict(model.named_parameters())
        self._checksums = {name: _checksum(parameter) for name, parameter in self._parameters.items()}
        self._biases = {
            name: parameter.detach().clone()
            for name, parameter in self._parameters.items()
            if name.split(".")[-1] == "bias"
        }

    def trained_biases(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """The backbone's own biases that are now trained in place, by name: the parameter and its original value."""
        return {
            name: (self._parameters[name], original)
            for name, original in self._biases.items()
            if self._parameters[name].requires_grad
        }

    def check_unchanged(self, peft_model: PeftModel) -> None:
        """Raise AdapterError if a weight was replaced, changed or made trainable, trained biases excepted."""
        there = {id(parameter) for parameter in peft_model.parameters()}
        excepted = self.trained_biases()
        for name, parameter in self._parameters.items():
            if name in excepted:
                continue
            if id(parameter) not in there or parameter.requires_grad or _checksum(parameter) != self._checksums[name]:
                raise AdapterError(f"the adapter is not supported: it {_CHANGES_BACKBONE} ({name})")


def _checksum(parameter: Tensor) -> int:
    """The sum of the value's bits, read as integers: any change to a value changes it."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return int(parameter.detach().contiguous().view(bits).sum())
