"""An adapter put on a model without memory first, on PyTorch's meta device: whether its sizes fit is known before
anything of its size is allocated."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import warnings
from dataclasses import replace

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..errors import AdapterError
from .saved import SavedAdapter

_LOOK_AT_VALUES = ("BOFT", "FROD", "SHIRA", "UNILORA")  # these construct from values, which meta tensors do not have
_MISMATCH = re.compile(
    r"size mismatch for (?P<name>\S+): copying a param with shape torch\.Size\((?P<found>\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((?P<wanted>\[.*?\])\)"
)


def check_memory(model: PreTrainedModel, config: PeftConfig) -> None:
    """Raise AdapterError if a new adapter of `config` would be larger than this machine's memory."""
    peft_model = _on_meta(model, config)
    if peft_model is None:
        return
    backbone = sum(parameter.numel() for parameter in model.parameters())
    size = 4 * (sum(parameter.numel() for parameter in peft_model.parameters()) - backbone)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise AdapterError(
            f"the adapter would have {size / 1e9:,.0f} GB of weights, and this machine has {memory / 1e9:,.0f} GB of "
            "memory; choose a lower rank"
        )


def check_sizes(model: PreTrainedModel, saved: SavedAdapter) -> None:
    """Raise AdapterError if the tensors of `saved` do not have the shapes of an adapter of its config on `model`."""
    peft_model = _on_meta(model, saved.config)
    if peft_model is None:
        return
    tensors = {name: tensor.to("meta") for name, tensor in saved.tensors.items()}
    with contextlib.suppress(NotImplementedError):  # loading looks at values: AdaLoRA's ranks that were taken away
        load_tensors(peft_model, replace(saved, tensors=tensors))


def load_tensors(peft_model: PeftModel, saved: SavedAdapter) -> None:
    """PEFT's own loading of an adapter. Raises AdapterError for a tensor that is missing or has another shape."""
    try:
        set_peft_model_state_dict(peft_model, saved.tensors)
    except KeyError as error:
        raise AdapterError(
            f"the weights in {saved.folder} do not match its adapter_config.json: {error.args[0]} is missing"
        ) from error
    except RuntimeError as error:
        found = list(_MISMATCH.finditer(str(error)))
        if not found:
            raise
        name, was, wanted = found[0].group("name", "found", "wanted")
        raise AdapterError(
            f"the adapter in {saved.folder} does not fit: {name} is {was} in its file and {wanted} by its "
            f"adapter_config.json on this base model ({len(found)} such){saved.hint()}"
        ) from error


def _on_meta(model: PreTrainedModel, config: PeftConfig) -> PeftModel | None:
    """The adapter on the model without values; None if its method looks at them. Raises what PEFT raises."""
    if getattr(config.peft_type, "value", config.peft_type) in _LOOK_AT_VALUES:
        return None
    config = copy.deepcopy(config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real adapter warns again
        empty: nn.Module = type(model)(copy.deepcopy(model.config))
        try:
            return get_peft_model(empty.requires_grad_(False), config)
        except RuntimeError:  # looks at values too; what is really wrong is raised by the real adapter
            return None
