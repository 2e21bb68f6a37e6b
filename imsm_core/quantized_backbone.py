"""Training against the quantized backbone that will be shipped, so that the adapter learns to correct its error.

As in QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the frozen weights have the values of int4 or int8 blocks while
the adapter is trained. Here they stay float32, so that a symmetric export in blocks of the same size gives the very
same values: rounding what is rounded already changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .choices import BITS, BLOCK_SIZE, check_rounding


@torch.no_grad()
def round_backbone(model: PreTrainedModel, precision: str, block_size: int = BLOCK_SIZE) -> None:
    """Round the weights of all linear layers and experts, the lm_head and the input embeddings in place, before an
    adapter is attached.

    Norms, biases and position embeddings stay as they are. Raises SettingsError as `check_rounding`.
    """
    check_rounding(precision, block_size)
    embeddings = model.get_input_embeddings()
    rounded: set[int] = set()  # tied weights once
    for module in model.modules():
        if holds_experts(module):
            _round_experts(module, BITS[precision], block_size)
        if not isinstance(module, nn.Linear | Conv1D) and module is not embeddings:
            continue
        weight = module.get_parameter("weight")
        if id(weight) not in rounded:
            rounded.add(id(weight))
            transposed = isinstance(module, Conv1D)  # (in, out)
            values = nearest_in_blocks(weight.T if transposed else weight, BITS[precision], block_size)
            weight.copy_(values.T if transposed else values)


def holds_experts(module: nn.Module) -> bool:
    """Whether the module has the weights of a mixture's experts, as transformers marks them."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _round_experts(experts: Any, bits: int, block_size: int) -> None:
    """Every matrix of every expert: (experts, out, in), or (experts, in, out) where they are transposed."""
    for weight in experts.parameters(recurse=False):
        if weight.dim() == 3:
            rows = weight.transpose(1, 2) if experts.is_transposed else weight
            rounded = nearest_in_blocks(rows.reshape(-1, rows.shape[2]), bits, block_size).view(rows.shape)
            weight.copy_(rounded.transpose(1, 2) if experts.is_transposed else rounded)


def nearest_in_blocks(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """weight: (N, K) float32 -> the same shape, rounded symmetrically as onnxruntime's quantize_matmul_4bits
    and _8bits do, to the bit: the value of the largest magnitude in a block of inputs gets the lowest code."""
    channels, inputs = weight.shape
    blocks = functional.pad(weight, (0, -inputs % block_size)).reshape(channels, -1, block_size)
    highest, lowest = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    half = 1 << bits - 1
    scale = torch.where(highest.abs() > lowest.abs(), highest, lowest) / -half
    factor = torch.where(scale.abs() < torch.finfo(scale.dtype).tiny, 0.0, 1 / scale)  # a block of zeros, or of dust
    codes = torch.floor(blocks * factor + (half + 0.5)).clamp(0, 2 * half - 1)  # halves go up
    return ((codes - half) * scale).reshape(channels, -1)[:, :inputs]
