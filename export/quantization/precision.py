"""A PyTorch model that computes in the type of an artifact, with the weights that the file has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..settings import ExportSettings
from .weight_format import QuantizedWeight, dequantize, round_to_nearest

_TRACED_MODEL = "model."  # what the causal LM is called inside the traced module


def compute_dtype(settings: ExportSettings) -> torch.dtype:
    """What the backbone computes in."""
    dtype: torch.dtype = getattr(torch, settings.dtype_name)
    return dtype


def layer_weight(model: PreTrainedModel, name: str) -> tuple[nn.Module, Tensor]:
    """The layer and its weight that the traced module calls `name`, with or without an adapter around the layer."""
    layer = _layer(model, name.removesuffix(".weight"))
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    elif isinstance(layer, AuxiliaryTrainingWrapper):
        layer = layer.original_module
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return layer, weight


def _layer(model: PreTrainedModel, name: str) -> nn.Module:
    path = name.removeprefix(_TRACED_MODEL)
    try:
        return model.get_submodule(path)
    except AttributeError:
        return model.get_submodule(path.replace(".base_layer", ""))


def rounded_weights(model: PreTrainedModel, rounded: Mapping[str, QuantizedWeight]) -> AbstractContextManager[None]:
    """Inside the block the model has the values of `rounded`, by the weights' names in the traced module."""

    def values() -> Iterator[tuple[Tensor, Tensor]]:
        for name, quantized in rounded.items():
            layer, weight = layer_weight(model, name)
            transposed = isinstance(layer, Conv1D)
            found = torch.from_numpy(dequantize(quantized, weight.shape[0 if transposed else 1]))
            yield weight, found.T.contiguous() if transposed else found

    return _replaced_data(values())


def rounded_experts(
    model: PreTrainedModel, names: Sequence[str], bits: int, block_size: int, symmetric: bool
) -> AbstractContextManager[None]:
    """Inside the block the weights of all experts that the traced module calls `names` have values that are rounded to
    the nearest."""

    def values() -> Iterator[tuple[Tensor, Tensor]]:
        for name in names:
            path, _, parameter = name.rpartition(".")
            experts: Any = _layer(model, path)
            weight = experts.get_parameter(parameter)
            rows = weight.data.transpose(1, 2) if experts.is_transposed else weight.data  # (experts, out, in)
            flat = rows.reshape(-1, rows.shape[2]).numpy()
            rounded = dequantize(round_to_nearest(flat, bits, block_size, symmetric), rows.shape[2])
            found = torch.from_numpy(rounded).view(rows.shape)
            yield weight, found.transpose(1, 2).contiguous() if experts.is_transposed else found

    return _replaced_data(values())


def computing_in(model: PreTrainedModel, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Inside the block the model's parameters are of `dtype`. Buffers stay: the frequencies of rotary embeddings lose
    too much in half precision."""
    return _converted(model, lambda weight: weight.to(dtype))


def rounded_to(model: PreTrainedModel, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Inside the block the model computes in float32 with weights that have been through `dtype`."""
    return _converted(model, lambda weight: weight.to(dtype).float())


def _converted(model: PreTrainedModel, convert: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Inside the block the model's float32 parameters are converted."""
    floats = [parameter for parameter in model.parameters() if parameter.dtype == torch.float32]
    return _replaced_data((parameter, convert(parameter.data)) for parameter in floats)


@contextmanager
def _replaced_data(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside the block tensors have other values, made one by one; afterwards they have their own data again."""
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor, data in values:
            originals.append((tensor, tensor.data))
            tensor.data = data
        yield
    finally:
        for tensor, original in reversed(originals):  # a tied weight was replaced more than once
            tensor.data = original
