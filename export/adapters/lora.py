"""LoRA (arXiv 2106.09685): y = W x + scaling * B A x on the adapter's rows, W x on the base's.

W stays shared and unmerged. Both products run on all rows with the base's rows zeroed in between: at r columns that
costs less than cutting the adapter's rows out and putting them back, and the base's rows stay exact, since they get
+ 0.
"""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedError
from . import ADAPTER_ROWS, register


class TwoStreamLora(nn.Module):
    """A frozen linear layer and one LoRA. lora_a: (r, in), lora_b: (out, r) with `scaling` folded in, bias: (out,)
    scaled, or None."""

    def __init__(self, base_layer: nn.Module, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Parameter(lora_a, requires_grad=False)
        self.lora_b = nn.Parameter(lora_b, requires_grad=False)
        self.lora_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) -> (2 * B, S, out)."""
        low = functional.linear(x, self.lora_a) * ADAPTER_ROWS.mask  # (2 * B, S, r), base rows 0
        y: Tensor = self.base_layer(x) + functional.linear(low, self.lora_b)
        return y if self.lora_bias is None else y + self.lora_bias * ADAPTER_ROWS.mask


@register("LORA")
def two_stream_lora(name: str, layer: nn.Module, adapter: str) -> nn.Module:
    """The two-stream form of a PEFT LoRA layer on a linear layer (nn.Linear or Conv1D)."""
    assert isinstance(layer, LoraLayer)
    if adapter not in layer.lora_A:
        raise UnsupportedError(f"{name} has no LoRA matrices for {adapter!r} (LoRA on {type(layer).__name__})")
    if layer.lora_variant.get(adapter) is not None:
        variant = type(layer.lora_variant[adapter]).__name__.removesuffix("Variant").removesuffix("Linear")
        raise UnsupportedError(f"{name} uses LoRA's variant {variant}, which has no two-stream form")
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
        raise UnsupportedError(f"{name} has LoRA on a {type(layer).__name__}, which has no two-stream form")
    scaling = layer.scaling[adapter]
    bias = None if up.bias is None else up.bias.detach() * scaling
    return TwoStreamLora(layer.get_base_layer(), down.weight.detach(), up.weight.detach() * scaling, bias)
