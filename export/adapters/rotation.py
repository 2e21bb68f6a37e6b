"""OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243): W R x, with R orthogonal and made of small blocks.

The adapter's rows are rotated block by block before the frozen layer; R itself, (in, in), is never stored. BOFT's R is
a product of block-diagonal factors with a permutation around each, and scales the outputs as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .rows import ADAPTER_ROWS, PeftLayer, block_products, constant, linear_weight, on_adapter_rows


class Factor(NamedTuple):
    """blocks: (D, b, b), applied as x @ block. order: (in,) int64, the permutation of x before the blocks, which is
    undone after them, or None."""

    blocks: Tensor
    order: Tensor | None = None


class TwoStreamRotation(nn.Module):
    """scale: (out,) on the output without the frozen layer's bias (base_bias), or None."""

    form = "block rotation"

    def __init__(
        self,
        base_layer: nn.Module,
        factors: Sequence[Factor],
        scale: Tensor | None = None,
        base_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_blocks = nn.ParameterList([constant(factor.blocks) for factor in factors])
        self.orders = [(f"order_{index}", f"inverse_{index}") for index in range(len(factors))]
        for (order, inverse), factor in zip(self.orders, factors, strict=True):
            self.register_buffer(order, factor.order, persistent=False)
            self.register_buffer(inverse, None if factor.order is None else factor.order.argsort(), persistent=False)
        self.adapter_scale = None if scale is None else constant(scale)
        unscaled = None if scale is None or base_bias is None else (1 - scale) * base_bias
        self.adapter_bias = None if unscaled is None else constant(unscaled)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) or (2 * B * S, in) -> the same with out."""
        mask = ADAPTER_ROWS.mask_for(x)
        rotated = x
        for blocks, names in zip(self.adapter_blocks, self.orders, strict=True):
            order, inverse = (getattr(self, name) for name in names)
            if order is None:
                rotated = block_products(rotated, blocks)
            else:
                rotated = block_products(rotated[..., order], blocks)[..., inverse]
        y: Tensor = self.base_layer(torch.where(mask > 0, rotated, x))
        if self.adapter_scale is not None:
            y = y * on_adapter_rows(self.adapter_scale, y)
        return y if self.adapter_bias is None else y + self.adapter_bias * mask


def two_stream_oft(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT OFT layer on a linear layer."""
    if adapter not in layer.oft_R or linear_weight(frozen) is None:
        return None
    rotation = layer.oft_R[adapter]
    return TwoStreamRotation(frozen, [Factor(_blocks(rotation.get_weight().detach(), rotation.block_size))])


def two_stream_boft(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT BOFT layer on a linear layer."""
    if adapter not in layer.boft_R or linear_weight(frozen) is None:
        return None
    skew = layer.boft_R[adapter].detach()  # (factors, D, b, b)
    blocks = layer.cayley_batch(skew.flatten(0, 1)).view(skew.shape)
    factors = [Factor(one, permutation.argmax(dim=0)) for one, permutation in zip(blocks, layer.boft_P, strict=True)]
    bias = getattr(frozen, "bias", None)
    return TwoStreamRotation(
        frozen,
        factors[::-1],  # the product F[n-1] ... F[0] stands to the right of x
        layer.boft_s[adapter].detach().flatten(),
        None if bias is None else bias.detach(),
    )


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks (D, b, b) of a block-diagonal matrix (D * b, D * b)."""
    count = matrix.shape[0] // size
    return torch.stack([matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])
