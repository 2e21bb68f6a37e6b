"""The rotation of GPT-J and CodeGen: interleaved, of the first part of each head, from a table of sines and cosines."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotary import rotary_node


class SinusoidalRotation:
    """table: (positions, D), sines first, cosines after them; rotates the first D elements of each head."""

    def __init__(self, table: Tensor) -> None:
        half = table.shape[-1] // 2
        self.sin, self.cos = table[:, :half].contiguous(), table[:, half:].contiguous()

    def __call__(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """x: (rows, heads, S, head_dim), position_ids: (rows, S) -> like x."""
        width = 2 * self.cos.shape[-1]
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        rotated = rotary_node(x[..., :width], position_ids, cos, sin, interleaved=True)
        return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)
