"""Whether a base model's files hold the weights that its config asks for, all of them and as numbers.

Most is found out before anything is allocated: from the headers of local files and a model without memory.
"""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base_source import BaseSource
from .errors import BaseModelError, first_line

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PACKED = 8  # how many weights a stored element may hold at most, where the weights are quantized
# What checkpoints hold beside weights: masks and scales of caches, which are computed or not used.
_HARMLESS = re.compile(r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$|\.[kv]_(cache_)?scale$|\.rotary_emb\.")


class Stored(NamedTuple):
    """What a file's header says of a weight. dtype: as safetensors spells it, such as BF16."""

    shape: tuple[int, ...]
    dtype: str


def stored_weights(source: BaseSource) -> dict[str, Stored] | None:
    """What the headers of a local folder's files say of its weights; None for anything else. Raises BaseModelError if
    there are none, or a file is missing or damaged."""
    folder = source.folder
    if folder is None or source.gguf_file:
        return None
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif (folder / _INDEX).is_file():
        files = _shards(source, folder / _INDEX)
    elif list(folder.glob("*.safetensors")):  # in another form, which transformers may know
        return None
    else:
        raise BaseModelError(f"the base model {source.name!r} has no *.safetensors{_pickled(folder)}")
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    header = opened.get_slice(name)
                    stored[name] = Stored(tuple(header.get_shape()), header.get_dtype())
        except Exception as error:  # safetensors and the system raise several types
            raise BaseModelError(
                f"cannot load the base model {source.name!r}: {file.name} is damaged or cut short: {first_line(error)}"
            ) from error
    return stored


def _shards(source: BaseSource, index: Path) -> list[Path]:
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        files = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise BaseModelError(f"{index} is damaged: {first_line(error)}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise BaseModelError(
            f"the base model {source.name!r} is not complete: it lacks {missing[0]}, which its index names"
        )
    return files


def _pickled(folder: Path) -> str:
    if not list(folder.glob("*.bin")) + list(folder.glob("*.pt")) + list(folder.glob("*.pth")):
        return ""
    return (
        "; its weights are pickled, and pickles are not read: convert them with AutoModelForCausalLM.from_pretrained"
        "(DIR).save_pretrained(NEW) from transformers, if you trust where they come from"
    )


def check_layers(source: BaseSource, config: PreTrainedConfig, stored: dict[str, Stored]) -> None:
    """Raise BaseModelError if the config asks for more layers than there are weights: building them takes long."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(stored):
        raise BaseModelError(_misfit(source, f"it says {layers} layers, and there are {len(stored)} weights"))


def check_stored(source: BaseSource, skeleton: PreTrainedModel, stored: dict[str, Stored], quantized: bool) -> None:
    """Raise BaseModelError if the files hold whole numbers for weights, or less than half of what the model without
    memory has: transformers would make up the rest, however large."""
    for name, _ in skeleton.named_parameters():
        if not quantized and name in stored and stored[name].dtype[0] in "IUB" and stored[name].dtype != "BF16":
            kind = stored[name].dtype
            raise BaseModelError(f"the base model {source.name!r} is quantized: {name} is {kind}; give it in floats")
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or {})
    needed = sum(value.numel() for name, value in skeleton.state_dict().items() if name not in tied)
    there = sum(prod(weight.shape) for weight in stored.values())
    if needed > 2 * there * (_PACKED if quantized else 1):
        raise BaseModelError(_misfit(source, f"it asks for {needed:,} values, and the files hold {there:,}"))


def _misfit(source: BaseSource, why: str) -> str:
    return f"the config.json of {source.name!r} does not fit its weights: {why}"


def check_complete(source: BaseSource, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Raise BaseModelError for weights that the files lack, that have another shape, or that the model does not use:
    it would not compute what it was trained to. loading: what transformers reports."""
    if names := sorted(loading["missing_keys"]):  # transformers fills in random values
        raise BaseModelError(f"the base model {source.name!r} lacks {len(names)} weights, such as {names[0]}")
    for name, found, wanted in sorted(loading["mismatched_keys"]):
        raise BaseModelError(_misfit(source, f"{name} is {tuple(found)} in the files, {tuple(wanted)} by the config"))
    if names := sorted(name for name in loading["unexpected_keys"] if not _harmless(name, model.config)):
        raise BaseModelError(
            f"the base model {source.name!r} has {len(names)} weights that a {model.config.model_type!r} model by its "
            f"config.json does not use, such as {names[0]}; if they are not needed, save it without them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) from transformers"
        )


def check_end_tokens(source: BaseSource, model: PreTrainedModel) -> None:
    """Raise BaseModelError if the tokens that end a text are no token ids: transformers takes whatever stands there."""
    ends: Any = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in listed):
        raise BaseModelError(
            f"the generation_config.json of {source.name!r} is damaged: eos_token_id is {ends!r}, which is no token id "
            "and no list of them"
        )


def _harmless(name: str, config: PreTrainedConfig) -> bool:
    """Whether a weight that the model does not use is known to change nothing."""
    if _HARMLESS.search(name) or re.match(r"(model\.)?mtp[._]", name):
        return True
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)  # layers that predict further tokens stand behind the others
    further = getattr(config, "num_nextn_predict_layers", None) or 0
    return layer is not None and 0 <= int(layer[1]) - int(config.num_hidden_layers) < further


@torch.no_grad()
def make_float32(source: BaseSource, model: PreTrainedModel) -> None:
    """Every parameter and floating-point buffer in float32. Raises BaseModelError if one is stored in another type
    than a float of at least 16 bits, or holds values that are not finite."""
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _FLOATS:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise BaseModelError(
                f"the base model {source.name!r} is quantized: {name} is {kind}; give its float weights"
            )
        if not _finite(parameter):
            raise BaseModelError(f"the base model {source.name!r} holds values that are not finite, in {name}")
        parameter.data = parameter.data.float()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                setattr(module, name, buffer.float())


def _finite(values: Tensor) -> bool:
    """Whether all are. The extremes of a tensor with a NaN are NaN."""
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())
