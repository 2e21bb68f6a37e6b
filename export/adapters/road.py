"""RoAd (arXiv 2409.00119): the outputs of a layer, rotated and scaled in pairs: two vectors and a fixed permutation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rows import ADAPTER_ROWS, PeftLayer, constant, linear_weight, on_adapter_rows


class TwoStreamRoad(nn.Module):
    """y * own + y[partner] * other on the adapter's rows. own, other: (out,); partner: (out,) int64."""

    form = "pair rotation"

    def __init__(self, base_layer: nn.Module, own: Tensor, other: Tensor, partner: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_own = constant(own)
        self.adapter_other = constant(other)
        self.partner: Tensor
        self.register_buffer("partner", partner, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) or (2 * B * S, in) -> the same with out."""
        y: Tensor = self.base_layer(x)
        crossed = y[..., self.partner] * (self.adapter_other * ADAPTER_ROWS.mask_for(y))
        return y * on_adapter_rows(self.adapter_own, y) + crossed


def two_stream_road(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT RoAd layer on a linear layer."""
    if adapter not in layer.road_theta or linear_weight(frozen) is None:
        return None
    group = layer.group_size[adapter]
    own, other = _factors(layer, adapter, group)
    partner = torch.arange(len(own)).view(-1, 2, group // 2)[:, [1, 0]].flatten()
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(group // 2).repeat(len(own) // group)
    return TwoStreamRoad(frozen, own, other * sign, partner)


def _factors(layer: PeftLayer, adapter: str, group: int) -> tuple[Tensor, Tensor]:
    """What each output is multiplied by, (out,), and what its partner, before the sign: the paper's three variants
    share an angle and a scale between both halves of a group, have one for each output, or two."""
    theta, alpha = layer.road_theta[adapter].detach(), layer.road_alpha[adapter].detach()
    if layer.variant[adapter] == "road_4":
        (theta, theta_other), (alpha, alpha_other) = (x.view(-1, 2, group).unbind(1) for x in (theta, alpha))
        return (alpha * theta.cos()).flatten(), (alpha_other * theta_other.sin()).flatten()
    if layer.variant[adapter] == "road_1":
        theta, alpha = (x.view(-1, group // 2).repeat_interleave(2, dim=0).flatten() for x in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()
