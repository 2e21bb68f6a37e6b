"""Giving a layer other values, for the tests of rounding."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from export.quantization.weight_format import Array


@torch.no_grad()
def set_weight(layer: nn.Module, values: Array) -> None:
    """values: (N, K), as `weight_of` gives them."""
    weight = layer.get_parameter("weight")
    weight.copy_(torch.from_numpy(values.T if isinstance(layer, Conv1D) else values))
