"""VeRA (arXiv 2310.11454): W x + b * B (d * A x), with one random A and B for the whole model and trained vectors b, d.

A and B stay shared in the graph: layers of the same size read the same matrix, which the file holds once.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.nn import functional

from .rows import ADAPTER_ROWS, PeftLayer, constant, linear_weight

_SHARED: WeakValueDictionary[tuple[int, int, int], nn.Parameter] = WeakValueDictionary()


class TwoStreamVera(nn.Module):
    """a: (r, in), b: (out, r), both shared; scale_d: (r,), scale_b: (out,)."""

    form = "low rank"

    def __init__(
        self, base_layer: nn.Module, a: nn.Parameter, b: nn.Parameter, scale_d: Tensor, scale_b: Tensor
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_a = a
        self.adapter_b = b
        self.adapter_d = constant(scale_d)
        self.adapter_scale = constant(scale_b)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) or (2 * B * S, in) -> the same with out."""
        low = functional.linear(x, self.adapter_a) * self.adapter_d * ADAPTER_ROWS.mask_for(x)
        y: Tensor = self.base_layer(x) + functional.linear(low, self.adapter_b) * self.adapter_scale
        return y


def two_stream_vera(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT VeRA layer on a linear layer."""
    weight = linear_weight(frozen)
    if adapter not in layer.vera_lambda_d or weight is None:
        return None
    rows, columns = weight.shape
    a, b = layer.vera_A[adapter], layer.vera_B[adapter]
    return TwoStreamVera(
        frozen,
        _shared(a, a.shape[0], columns),
        _shared(b, rows, b.shape[1]),
        layer.vera_lambda_d[adapter].detach(),
        layer.vera_lambda_b[adapter].detach(),
    )


def _shared(whole: Tensor, rows: int, columns: int) -> nn.Parameter:
    """The upper left corner of `whole`, as the same weight for every layer that asks for it."""
    key = (whole.data_ptr(), rows, columns)
    if key not in _SHARED:
        corner = constant(whole[:rows, :columns])
        _SHARED[key] = corner
        return corner
    return _SHARED[key]
