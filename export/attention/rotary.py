"""Rotary position embedding as one ONNX node, or none at all.

transformers' modelling files each define `apply_rotary_pos_emb(q, k, cos, sin)`, or one on complex numbers. For the
trace it is replaced, if a numerical probe shows which of the known rotations it computes:

    fused    the rotation happens inside GroupQueryAttention (`do_rotary`); q and k pass through untouched
    node     one com.microsoft.RotaryEmbedding node each for q and k
    traced   not recognized: the function stays and is traced as it is, so that the graph is correct, if not short

Rotation: Su et al., RoFormer (arXiv 2104.09864), equation 34; "half" pairs element i with i + D/2, "interleaved"
pairs 2i with 2i + 1.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from imsm_core.errors import setting

from ..errors import UnsupportedError
from ..replaced import replaced

FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_emb")  # the second: where the rotation multiplies complex numbers
Mode = Literal["fused", "node", "traced", "none"]


@dataclass
class RotaryPlan:
    """How rotation is written into the graph. cos, sin: (context, D/2) float32 tables, None where they are not needed.
    fixed: rotary modules that look at the text's length -> what they give within the context, (1, context, D) each."""

    mode: Mode
    interleaved: bool = False
    cos: Tensor | None = None
    sin: Tensor | None = None
    fixed: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass
class RotaryCall:
    """What the probe saw of one call: the rotated query that was returned, and the rotation's style."""

    query: Tensor
    style: Literal["half", "interleaved"] | None
    width: int


def modelling_module(model: PreTrainedModel) -> ModuleType:
    """The transformers module that defines the architecture."""
    return sys.modules[type(model).__module__]


def rotary_function(model: PreTrainedModel) -> Callable[..., Any] | None:
    """The architecture's function that rotates queries and keys, if it has one under a known name."""
    name = _function_name(model)
    return None if name is None else getattr(modelling_module(model), name)


def _function_name(model: PreTrainedModel) -> str | None:
    return next((name for name in FUNCTIONS if hasattr(modelling_module(model), name)), None)


def replaced_rotary(model: PreTrainedModel, function: Callable[..., Any] | None) -> AbstractContextManager[None]:
    """Swap the architecture's rotary function for `function` (None leaves it), also in a shared module."""
    name = _function_name(model)
    if function is None or name is None:
        return nullcontext()
    return replaced(modelling_module(model), name, function)


def recognize(function: Callable[..., Any], result: Any, *args: Any, **kwargs: Any) -> RotaryCall:
    """Which rotation the architecture's function computed; style None: none that we know, or not of (query, key)."""
    query = args[0]
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    cos, sin, complex_table = bound.get("cos"), bound.get("sin"), bound.get("freqs_cis")
    if not isinstance(result, tuple) or len(result) != 2:
        return RotaryCall(query, None, query.shape[-1])
    rotated = result[0]
    style: Literal["half", "interleaved"] | None = None
    if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.ndim == 3 and cos.shape[-1] == query.shape[-1]:
        half = cos.shape[-1] // 2
        if _same(rotated, _rotate_half(query, cos[..., :half], sin[..., :half])):
            style = "half"
        elif _same(rotated, _rotate_interleaved(query, cos[..., 0::2], sin[..., 0::2])):
            style = "interleaved"
    elif (
        isinstance(complex_table, Tensor)
        and (*query.shape[-2:-1], query.shape[-1] // 2) == complex_table.shape[-2:]
        and _same(rotated, _rotate_interleaved(query, complex_table.real, complex_table.imag))
    ):
        style = "interleaved"
    return RotaryCall(rotated, style, query.shape[-1])


def tables(model: PreTrainedModel, context: int, interleaved: bool) -> tuple[Tensor, Tensor] | None:
    """cos and sin for positions 0 .. context - 1, each (context, D/2) float32; None if the backbone does not have one
    rotary module for all layers."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if not isinstance(rotary, nn.Module) or list(inspect.signature(rotary.forward).parameters) != ["x", "position_ids"]:
        return None
    found = _tables_of(copy.deepcopy(rotary), context, {})
    if len(found) == 1:
        return found[0][0].real.float().contiguous(), found[0][0].imag.float().contiguous()
    cos, sin = found
    half = cos.shape[-1] // 2
    pick = slice(0, None, 2) if interleaved else slice(0, half)
    return cos[0, :, pick].float().contiguous(), sin[0, :, pick].float().contiguous()


def refuse_changing_rotation(model: PreTrainedModel, context: int) -> None:
    """Raises UnsupportedError if a rotation of the model changes with the length of the text, up to `context`."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None or list(inspect.signature(module.forward).parameters)[:2] != ["x", "position_ids"]:
            continue
        rotary = copy.deepcopy(module)  # some keep what they computed for the longest text so far
        for layer_type in [{"layer_type": name} for name in kinds] if isinstance(kinds, dict) else [{}]:
            shorter = {length: _tables_of(rotary, length, layer_type) for length in (1, max(1, context // 2))}
            longest = _tables_of(rotary, context, layer_type)
            for length, found in shorter.items():
                if not all(torch.equal(one[:, :length], other) for one, other in zip(longest, found, strict=True)):
                    raise UnsupportedError(_why_no_table(rotary))


def fixed_tables(model: PreTrainedModel, context: int) -> dict[nn.Module, tuple[Tensor, ...]]:
    """`RotaryPlan.fixed`, after `refuse_changing_rotation` found that they do not change within the context."""
    changing = [module for module in model.modules() if getattr(module, "rope_type", None) in ("dynamic", "longrope")]
    return {module: _tables_of(copy.deepcopy(module), context, {}) for module in changing}


@contextmanager
def fixed_rotary(plan: RotaryPlan) -> Iterator[None]:
    """Inside the block the modules of `plan.fixed` look their tables up and do not look at the text's length, which a
    trace cannot."""
    try:
        for module, found in plan.fixed.items():
            module.forward = partial(_look_up, found)
        yield
    finally:
        for module in plan.fixed:
            module.__dict__.pop("forward", None)


def _look_up(found: tuple[Tensor, ...], x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
    return tuple(table[0][position_ids] for table in found)


def _tables_of(rotary: nn.Module, length: int, layer_type: dict[str, str]) -> tuple[Tensor, ...]:
    """Each (1, length, D): cos and sin, or one complex table."""
    found = rotary(torch.zeros(1), torch.arange(length)[None], **layer_type)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _why_no_table(rotary: nn.Module) -> str:
    kind = getattr(rotary, "rope_type", "default")
    rope = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(rotary, "original_max_seq_len", None)
    remedy = f"; a {setting('context_length')} of {original} or less has one" if original else ""
    return (
        f"rotary embedding of type {kind!r} changes with the length of the text, so that cached keys would have to be "
        f"rotated again; it has no table{remedy}"
    )


def rotary_node(x: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (rows, heads, S, D), position_ids: (rows, S) -> x rotated, by one com.microsoft.RotaryEmbedding node."""
    return torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        [x, position_ids, cos, sin],
        {"interleaved": int(interleaved)},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5, rtol=1e-5)
