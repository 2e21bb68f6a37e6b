"""The two-stream form of any other tuner layer, found by running it.

Most PEFT methods turn a linear layer into another one. The layer is run on the unit vectors to see which: a change of
low rank becomes two factors, any other change one matrix. A layer that is not linear, such as a norm, runs on the
adapter's rows by itself, beside the frozen one on the base's; it reads a shared weight twice, and the file still holds
it once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from imsm_core.errors import first_line

from ..errors import UnsupportedError
from ..streams import split_streams
from .rows import DenseDelta, LowRank, PeftLayer, TwoStreamBias, TwoStreamEmbedding, linear_weight

SAME = 1e-4  # a change that predicts the layer's output to this part of its largest value is the layer's change


class SplitRows(nn.Module):
    """The frozen layer on the base's rows, PEFT's on the adapter's."""

    form = "split rows"

    def __init__(self, base_layer: nn.Module, adapter_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer = adapter_layer

    def forward(self, *inputs: Tensor) -> Any:
        """inputs: (2 * B, ...) or (2 * B * S, ...) each -> the layer's output, or outputs, for the same rows."""
        pairs = [split_streams(x, 2) for x in inputs]
        base = self.base_layer(*(pair[0] for pair in pairs))
        adapter = self.adapter_layer(*(pair[1] for pair in pairs))
        if isinstance(base, Tensor):
            return torch.cat([base, adapter])
        return tuple(torch.cat(parts) for parts in zip(base, adapter, strict=True))


class SplitEmbedding(TwoStreamEmbedding):
    """Each stream has its own embedding."""

    def __init__(self, base_layer: nn.Module, adapter_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer = adapter_layer

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, S) -> (2 * B, S, d)."""
        return torch.cat([self.base_layer(input_ids), self.adapter_layer(input_ids)])


def no_form(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """A family without its own form."""
    return None


def split_form(layer: nn.Module, frozen: nn.Module, reads_tokens: bool) -> nn.Module:
    """Each stream runs its own layer. reads_tokens: the layer turns token ids into embeddings."""
    return SplitEmbedding(frozen, layer) if reads_tokens else SplitRows(frozen, layer)


@torch.no_grad()
def two_stream_fallback(name: str, layer: nn.Module, frozen: nn.Module, reads_tokens: bool) -> nn.Module:
    """The two-stream form of a layer that no family claims. Raises UnsupportedError if it cannot be run by itself."""
    weight = linear_weight(frozen)
    if weight is None:
        return split_form(layer, frozen, reads_tokens)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")
            found = _linear_change(layer, frozen, weight.shape[1])
    except Exception as error:  # a layer that needs more than its input may fail in any way
        raise UnsupportedError(
            f"{name} is a {type(layer).__name__} that needs more than its input to run "
            f"({type(error).__name__}: {first_line(error)}); it has no two-stream form"
        ) from error
    if found is None:
        return SplitRows(frozen, layer)
    delta, bias = found
    factors = _factors(delta, float(weight.abs().max()))
    if factors is None:
        return DenseDelta(frozen, delta, bias)
    if not len(factors[0]):
        return frozen if bias is None else TwoStreamBias(frozen, bias)
    return LowRank(frozen, *factors, bias)


def _linear_change(layer: nn.Module, frozen: nn.Module, width: int) -> tuple[Tensor, Tensor | None] | None:
    """(delta (out, in), bias (out,) or None) such that layer(x) = frozen(x) + delta x + bias; None if there is none."""
    origin = torch.zeros(1, 1, width)
    units = torch.eye(width)[None]

    def change(x: Tensor) -> Tensor:
        return layer(x)[0].double() - frozen(x)[0].double()  # type: ignore[no-any-return]

    bias = change(origin)[0]
    delta = (change(units) - bias).T
    sample = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
    expected = layer(sample)[0].double()
    predicted = frozen(sample)[0].double() + sample[0].double() @ delta.T + bias
    if not (predicted - expected).abs().max() <= SAME * (1e-3 + expected.abs().max()):
        return None
    return delta.float(), bias.float() if bias.any() else None


def _factors(delta: Tensor, weight_scale: float) -> tuple[Tensor, Tensor] | None:
    """(a (r, in), b (out, r)) with b a = delta up to rounding, or None if delta itself is smaller.

    delta is a difference of float32 outputs, so values below their rounding count as zero.
    """
    rows, columns = delta.shape
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    rounding = torch.finfo(torch.float32).eps * (rows + columns) ** 0.5 * (weight_scale + float(delta.abs().max()))
    rank = int((values > rounding).sum())
    if rank * (rows + columns) >= rows * columns:
        return None
    return right[:rank].float(), (left[:, :rank] * values[:rank]).float()
