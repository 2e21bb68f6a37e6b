"""What every two-stream form shares: which rows are the adapter's, and the shapes that a change can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

PeftLayer = Any
"""A tuner layer of PEFT: a module with containers of parameters by the adapter's name, which PEFT does not type."""

TwoStreamForm = Callable[[str, PeftLayer, nn.Module, str], nn.Module | None]
"""(name of the layer, PEFT's tuner layer, the frozen layer in it, name of the active adapter) -> its two-stream form,
or None where the family has no form for such a layer; raises UnsupportedError."""


class AdapterRows:
    """Which rows of a stacked input belong to the adapter stream; set for every traced step."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    @contextmanager
    def of(self, mask: Tensor) -> Iterator[None]:
        """mask: (2 * B, S, 1), 0 for the base stream's rows and 1 for the adapter stream's, inside the block."""
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None

    def mask_for(self, x: Tensor) -> Tensor:
        """0 and 1 in the shape that multiplies x: (2 * B, 1, ...), or (2 * B * S, 1) for flattened tokens, as experts
        get them. Raises RuntimeError outside `of`."""
        if self._mask is None:
            raise RuntimeError("a two-stream layer ran outside a traced step")
        if x.dim() == 2:
            return self._mask.reshape(-1, 1)
        first: Tensor = self._mask[:, :1]  # (2 * B, 1, 1)
        return first.reshape(-1, *[1] * (x.dim() - 1))


ADAPTER_ROWS = AdapterRows()


class TwoStreamEmbedding(nn.Module):
    """A two-stream form whose input is the token ids of one stream, (B, S), and whose output has the rows of both."""

    form = "embedding"


def constant(tensor: Tensor) -> nn.Parameter:
    """A tensor as a weight of the graph."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)


class LowRank(nn.Module):
    """y = W x + bias + B A x on the adapter's rows, W x on the base's.

    a: (r, in), b: (out, r) with every scale folded in, bias: (out,) or None. Both products run on all rows with the
    base's rows zeroed in between: at r columns that costs less than cutting the adapter's rows out and putting them
    back, and the base's rows stay exact, since they get + 0.
    """

    form = "low rank"

    def __init__(self, base_layer: nn.Module, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_a = constant(a)
        self.adapter_b = constant(b)
        self.adapter_bias = None if bias is None else constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) or (2 * B * S, in) -> the same with out."""
        mask = ADAPTER_ROWS.mask_for(x)
        low = functional.linear(x, self.adapter_a) * mask
        y = self.frozen_product(x) + functional.linear(low, self.adapter_b)
        return y if self.adapter_bias is None else y + self.adapter_bias * mask

    def frozen_product(self, x: Tensor) -> Tensor:
        """W x + bias, which a kind of low-rank change may scale on the adapter's rows."""
        product: Tensor = self.base_layer(x)
        return product


class TwoStreamBias(nn.Module):
    """change: (out,), trained minus original bias of `base_layer`, which may be a two-stream form itself."""

    form = "bias"

    def __init__(self, base_layer: nn.Module, change: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_bias = constant(change)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, ..., in) -> the same with out."""
        y: Tensor = self.base_layer(x)
        return y + self.adapter_bias * ADAPTER_ROWS.mask_for(y)


class DenseDelta(nn.Module):
    """y = W x + D x + bias on the adapter's rows. delta: (out, in), bias: (out,) or None."""

    form = "dense delta"

    def __init__(self, base_layer: nn.Module, delta: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_delta = constant(delta)
        self.adapter_bias = None if bias is None else constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) or (2 * B * S, in) -> the same with out."""
        mask = ADAPTER_ROWS.mask_for(x)
        y: Tensor = self.base_layer(x) + functional.linear(x * mask, self.adapter_delta)
        return y if self.adapter_bias is None else y + self.adapter_bias * mask


def smaller_form(base_layer: nn.Module, a: Tensor, b: Tensor) -> nn.Module:
    """The change B A as two factors, or as one matrix where that holds fewer numbers."""
    if a.numel() + b.numel() < b.shape[0] * a.shape[1]:
        return LowRank(base_layer, a, b)
    return DenseDelta(base_layer, b @ a)


def on_adapter_rows(scale: Tensor, x: Tensor) -> Tensor:
    """`scale` on the adapter's rows of something like x, and exactly 1 on the base's."""
    return 1 + ADAPTER_ROWS.mask_for(x) * (scale - 1)


def linear_weight(layer: nn.Module) -> Tensor | None:
    """(out, in) of nn.Linear or of transformers' Conv1D, which keeps it transposed; None for anything else."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    if isinstance(layer, Conv1D):
        return weight.detach().T
    return weight.detach() if isinstance(layer, nn.Linear) else None


def block_products(x: Tensor, blocks: Tensor) -> Tensor:
    """x: (..., D * b), blocks: (D, b, b) -> each part of x times its block."""
    count, size, _ = blocks.shape
    parts = x.reshape(*x.shape[:-1], count, 1, size)
    return torch.matmul(parts, blocks).reshape(x.shape)
