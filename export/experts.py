"""Mixture-of-experts layers as com.microsoft.MoE nodes, which compute for each token only the experts it is routed to.

transformers' experts interface lets a function stand in for the experts of every architecture that uses it. The node
is chosen by what it costs on a real model: gathering each token's experts would copy gigabytes of weights in a prefill
of 512 tokens, and computing every expert for every token is num_experts / top_k times the arithmetic. Experts whose
activation the node lacks are computed that expensive way, one after the other, so that only one expert's memory is
needed.

The node routes by itself, with a softmax over the top k of its router input. It gets the logarithms of the model's own
routing weights, so that this softmax returns them divided by their sum, and its output is multiplied by that sum.

MoE: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .replaced import replaced

_NOT_ROUTED = -1e30  # the router input of the experts that a token is not routed to, where the type can hold it
_SMALLEST_WEIGHT = 1e-37
_NAME = "imsm_emit"


@dataclass(frozen=True)
class SwiGLU:
    """G * sigmoid(alpha * G) * (L + beta), G clamped above and L to both sides by `limit`."""

    interleaved: bool
    alpha: float
    beta: float
    limit: float | None

    def attributes(self) -> dict[str, Any]:
        """As the MoE node spells them; its CPU kernel takes interleaved rows only (swiglu_fusion 1)."""
        attributes: dict[str, Any] = {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": self.alpha,
            "activation_beta": self.beta,
        }
        return attributes if self.limit is None else attributes | {"swiglu_limit": self.limit}

    def __call__(self, gate_up: Tensor) -> Tensor:
        if self.interleaved:
            gate, up = gate_up[..., 0::2], gate_up[..., 1::2]
        else:
            half = gate_up.shape[-1] // 2
            gate, up = gate_up[..., :half], gate_up[..., half:]
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


ExpertsPlan = dict[nn.Module, SwiGLU | None]
"""The experts module of every layer -> its activation; None: one that the node lacks."""

_plan: ExpertsPlan | None = None
_laid: dict[nn.Module, _Weights] = {}  # of one traced step: two streams that lay out the same weights share them


def plan_experts(model: PreTrainedModel) -> ExpertsPlan:
    """What the experts of every layer compute, found from values before the trace, which has none."""
    return {module: _recognized(module) for module in model.modules() if hasattr(module, "has_post_expert_norm")}


@contextmanager
def emitting_experts(model: PreTrainedModel, plan: ExpertsPlan) -> Iterator[None]:
    """Inside the block the experts of every layer emit nodes."""
    global _plan
    _laid.clear()
    _plan = plan
    try:
        with replaced(model.config, "_experts_implementation", _NAME):
            yield
    finally:
        _plan = None
        _laid.clear()


def _emit(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states: (T, d); top_k_index, top_k_weights: (T, k) -> (T, d). `experts` has the weights of all experts and
    the flags that transformers' `use_experts_implementation` gives it."""
    assert _plan is not None
    swiglu = _plan[experts]
    if swiglu is None:
        return every_expert(experts, hidden_states, top_k_index, top_k_weights)
    return _node(_laid_out(experts, swiglu), swiglu, hidden_states, top_k_index, top_k_weights)


class _Weights(NamedTuple):
    """As the node wants them, gate and up interleaved. up: (experts, 2 f, d), down: (experts, d, f), biases or None."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def _laid_out(experts: Any, swiglu: SwiGLU) -> _Weights:
    if experts not in _laid:
        _laid[experts] = _lay_out(experts, swiglu)
    return _laid[experts]


def _lay_out(experts: Any, swiglu: SwiGLU) -> _Weights:
    up, down = experts.gate_up_proj, experts.down_proj
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    return _Weights(
        up if swiglu.interleaved else _interleaved(up),
        _rows(experts, "gate_up_proj_bias", swiglu.interleaved),
        down,
        _rows(experts, "down_proj_bias", True),
    )


def _node(
    weights: _Weights, swiglu: SwiGLU, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    dtype = hidden_states.dtype
    logs = top_k_weights.float().clamp(min=_SMALLEST_WEIGHT).log().to(dtype)
    not_routed = max(_NOT_ROUTED, torch.finfo(dtype).min)
    router = hidden_states.new_full((1, weights.up.shape[0]), not_routed).expand(hidden_states.shape[0], -1)
    output = torch.onnx.ops.symbolic(
        "com.microsoft::MoE",
        [hidden_states, router.scatter(1, top_k_index, logs), *weights],
        {"k": top_k_index.shape[1], "normalize_routing_weights": 1, **swiglu.attributes()},
        dtype=dtype,
        shape=hidden_states.shape,
        version=1,
    )
    return output * top_k_weights.sum(-1, keepdim=True).to(dtype)


ExpertsChange = dict[str, tuple[Tensor, Tensor]]
"""A low-rank change of all experts' weights by parameter name: a (experts, r, in) and b (experts, out, r), b a."""


def emit_changed_experts(
    experts: Any, change: ExpertsChange, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `_emit`, for experts whose weights an adapter changes. The node has no place for a change before the
    activation, so that every expert is computed for every token, all at once, from the node's own weights."""
    assert _plan is not None
    swiglu = _plan[experts]
    if swiglu is None:
        return every_expert(experts, hidden_states, top_k_index, top_k_weights, change)
    weights = _laid_out(experts, swiglu)
    up_change = change.get("gate_up_proj")
    if up_change is not None and not swiglu.interleaved:
        up_change = (up_change[0], _interleaved(up_change[1]))
    gate_up = _product(hidden_states[None], weights.up, weights.up_bias, up_change)  # (experts, T, 2 f)
    inner = replace(swiglu, interleaved=True)(gate_up)
    outputs = _product(inner, weights.down, weights.down_bias, change.get("down_proj"))  # (experts, T, d)
    zeros = hidden_states.new_zeros(1, 1).expand(hidden_states.shape[0], weights.up.shape[0])
    routed = zeros.scatter(1, top_k_index, top_k_weights.to(zeros.dtype))  # (T, experts)
    return (outputs * routed.T[..., None]).sum(0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, change: tuple[Tensor, Tensor] | None) -> Tensor:
    """x: (1 or experts, T, in), weight: (experts, out, in), which stays as the file holds it -> (experts, T, out)."""
    product = torch.onnx.ops.symbolic(
        "com.microsoft::FusedMatMul",
        [x, weight],
        {"transB": 1},
        dtype=x.dtype,
        shape=(weight.shape[0], x.shape[1], weight.shape[1]),
        version=1,
    )
    if bias is not None:
        product = product + bias[:, None]
    if change is not None:
        a, b = change
        product = product + torch.matmul(torch.matmul(x, a.transpose(1, 2)), b.transpose(1, 2))
    return product


def _recognized(experts: Any) -> SwiGLU | None:
    """The SwiGLU that the experts' gating computes, found from its values; None: it is not one."""
    if not experts.has_gate or experts.has_post_expert_norm:
        return None
    sample = torch.linspace(-20, 20, 2 * 64).view(2, -1)[:, torch.randperm(64, generator=torch.manual_seed(0))]
    limit = getattr(experts, "limit", None)
    candidates = [
        SwiGLU(bool(interleaved), alpha, beta, bound)
        for interleaved in (False, True)
        for alpha, beta in ((1.0, 0.0), (float(getattr(experts, "alpha", 1.702)), 1.0))
        for bound in (None, *([float(limit)] if limit else []))
    ]
    with torch.no_grad():
        wanted = experts._apply_gate(sample)
        for candidate in candidates:
            if torch.allclose(candidate(sample), wanted, atol=1e-5, rtol=1e-5):
                return candidate
    return None


def _interleaved(gate_up: Tensor) -> Tensor:
    """(experts, [gate | up], ...) -> (experts, [gate 0, up 0, gate 1, ...], ...); done in the file, not at run time."""
    experts, rows, *rest = gate_up.shape
    return gate_up.reshape(experts, 2, rows // 2, *rest).transpose(1, 2).reshape(experts, rows, *rest)


def _rows(experts: Any, name: str, as_is: bool) -> Tensor | None:
    if not experts.has_bias:
        return None
    bias: Tensor = getattr(experts, name)
    return bias if as_is else _interleaved(bias)


def every_expert(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    change: ExpertsChange | None = None,
) -> Tensor:
    """Every expert for every token, weighted by 0 where the token is not routed to it."""
    count = experts.num_experts
    zeros = torch.zeros_like(hidden_states[:, :1]).expand(-1, count)
    weights = zeros.scatter(1, top_k_index, top_k_weights.to(zeros.dtype))
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    total = torch.zeros_like(hidden_states)
    for index in range(count):
        inner = _linear(experts, name, index, hidden_states, change)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        output = _linear(experts, "down_proj", index, inner, change)
        if experts.has_post_expert_norm:
            output = experts.post_expert_norm(output)
        total = total + output * weights[:, index : index + 1]
    return total


def _linear(experts: nn.Module, name: str, index: int, x: Tensor, change: ExpertsChange | None) -> Tensor:
    weight = getattr(experts, name)[index]
    bias = getattr(experts, f"{name}_bias")[index] if experts.has_bias else None
    product = functional.linear(x, weight.T if experts.is_transposed else weight, bias)
    if change is not None and name in change:
        a, b = (part[index] for part in change[name])
        product = product + functional.linear(functional.linear(x, a), b)
    return product


ALL_EXPERTS_FUNCTIONS.register(_NAME, _emit)
