"""A saved PEFT adapter, read and not yet on a model: its config and its tensors. Safetensors only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import Tensor

from ..errors import AdapterError, first_line, setting
from .configs import read_fields
from .refusals import check_config

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class SavedAdapter:
    """folder: where it was read. tensors: by their names in the file. trained_on: the base model that its config
    names, which nothing is loaded from; empty if it names none."""

    folder: Path
    config: PeftConfig
    tensors: dict[str, Tensor]
    trained_on: str

    @property
    def prefix(self) -> str:
        """What PEFT puts before the names of the causal LM's modules."""
        return "base_model." if self.config.is_prompt_learning else "base_model.model."

    def hint(self) -> str:
        """The end of a message about a base model that does not fit."""
        name = f", {self.trained_on!r}" if self.trained_on else ""
        return f"; if the adapter was trained on another model{name}, give that one by {setting('base')}"


def read_adapter(folder: Path) -> SavedAdapter:
    """The adapter of a standard PEFT folder. Raises AdapterError for a file that is missing or damaged, a config that
    IMSM refuses, and values that are not finite."""
    for name in FILES:
        if not (folder / name).is_file():
            pickled = name == FILES[1] and (folder / "adapter_model.bin").is_file()
            advice = (
                "; its adapter_model.bin is pickled and is not read: load it with PEFT and save it again with "
                "save_pretrained(folder, safe_serialization=True)"
            )
            raise AdapterError(f"{folder} has no {name}{advice if pickled else ''}")
    fields = read_fields(folder / FILES[0])
    fields.pop("runtime_config", None)  # as PEFT reads it
    trained_on = fields.get("base_model_name_or_path")
    try:
        config: PeftConfig = cast(Any, PeftConfig).from_peft_type(**fields)
        check_config(config)
        tensors = load_file(folder / FILES[1])
    except AdapterError:
        raise
    except Exception as error:  # a truncated file, an unknown type of number: all the same to the user
        raise AdapterError(f"cannot load the adapter in {folder}: {first_line(error)}") from error
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise AdapterError(f"the adapter in {folder} holds complex numbers in {name}, which must be real")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"the adapter in {folder} holds values that are not finite, in {name}")
    return SavedAdapter(folder, config, tensors, trained_on if isinstance(trained_on, str) else "")
