"""(IA)3 (arXiv 2205.05638): W (l * x) in feed-forward layers, l * (W x) elsewhere; a diagonal change that stays one."""

from __future__ import annotations

from torch import Tensor, nn

from .rows import PeftLayer, constant, linear_weight, on_adapter_rows


class TwoStreamScale(nn.Module):
    """scale: (in,) on the adapter's rows of the input, or (out,) on those of the output."""

    form = "diagonal"

    def __init__(self, base_layer: nn.Module, scale: Tensor, on_input: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_scale = constant(scale)
        self.on_input = on_input

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) or (2 * B * S, in) -> the same with out."""
        scale = on_adapter_rows(self.adapter_scale, x)
        y: Tensor = self.base_layer(x * scale) if self.on_input else self.base_layer(x) * scale
        return y


def two_stream_ia3(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT (IA)3 layer on a linear layer."""
    if adapter not in layer.ia3_l or linear_weight(frozen) is None:
        return None
    return TwoStreamScale(frozen, layer.ia3_l[adapter].detach().flatten(), layer.is_feedforward)
