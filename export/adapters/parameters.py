"""LoRA on single parameters (PEFT's target_parameters), which is how PEFT reaches mixtures of experts: the experts'
weights are one parameter of three dimensions, the router's one of two."""

from __future__ import annotations

import copy

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..experts import ExpertsChange, emit_changed_experts
from ..streams import split_streams
from .fallback import SplitRows
from .rows import PeftLayer, constant


class TwoStreamExperts(nn.Module):
    """The frozen experts on the base's rows; the same weights and a low-rank change of each expert on the adapter's."""

    form = "low rank"

    def __init__(self, base_layer: nn.Module, change: ExpertsChange) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_a = nn.ParameterDict({name: constant(a) for name, (a, _) in change.items()})
        self.adapter_b = nn.ParameterDict({name: constant(b) for name, (_, b) in change.items()})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: (2 * B * S, d); top_k_index, top_k_weights: (2 * B * S, k) -> (2 * B * S, d)."""
        pairs = [split_streams(x, 2) for x in (hidden_states, top_k_index, top_k_weights)]
        change = {name: (self.adapter_a[name], self.adapter_b[name]) for name in self.adapter_a}
        base = self.base_layer(*(pair[0] for pair in pairs))
        return torch.cat([base, emit_changed_experts(self.base_layer, change, *(pair[1] for pair in pairs))])


def two_stream_parameters(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module:
    """The two-stream form of LoRA on parameters of a module that is not a linear layer. Raises UnsupportedError for
    three-dimensional parameters of anything but experts."""
    wrappers: list[PeftLayer] = []
    while isinstance(layer, ParamWrapper):
        wrappers.append(layer)
        layer = layer.base_layer
    if all(wrapper.get_param().dim() == 2 for wrapper in wrappers):
        return SplitRows(frozen, _merged(frozen, wrappers, adapter))
    if not hasattr(frozen, "is_transposed"):
        raise UnsupportedError(
            f"{name} has LoRA on parameters of a {type(frozen).__name__} (target_parameters), which is not a "
            "mixture of experts that uses transformers' experts interface; it has no two-stream form"
        )
    return TwoStreamExperts(frozen, {wrapper.parameter_name: _factors(wrapper, adapter) for wrapper in wrappers})


def _factors(wrapper: PeftLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """a (experts, r, in) and b (experts, out, r) with the scale folded in."""
    left, right, scaling = wrapper.get_delta_factors(adapter)
    if wrapper.get_base_layer().is_transposed:  # the parameter and its change are (experts, in, out)
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    return right.detach(), left.detach() * scaling


def _merged(frozen: nn.Module, wrappers: list[PeftLayer], adapter: str) -> nn.Module:
    """A copy of a small module, a router, with its changed parameters."""
    merged = copy.deepcopy(frozen)
    for wrapper in wrappers:
        parameter = merged.get_parameter(wrapper.parameter_name)
        parameter.data = parameter.data + wrapper.get_delta_weight(adapter).detach()
    return merged
