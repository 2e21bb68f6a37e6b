"""Plain attention as this project's operator, whose kernel reads a cache once for all heads that share it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from . import functions
from .graph import add_node, nodes_of, operand, replace_value
from .rewrite import Declined, Rewrite

HEAD_SIZE_STEP, LARGEST_HEAD_SIZE = 16, 256
NAME = "GroupQueryAttention"
PORTABLE = Declined("the portable form has one node per stream")
OPTIONAL = Declined("it has a bias, sinks or scales")
SOFTCAP = Declined("its scores are soft-capped")
_INTEGERS = ("num_heads", "kv_num_heads", "do_rotary", "rotary_interleaved", "local_window_size")
_ATTRIBUTES = (*_INTEGERS, "scale")
_DEFAULTS = {"do_rotary": 0, "rotary_interleaved": 0, "local_window_size": -1}
_QUERY_SEQLENS, _PAST_KEY = 16, 3
_TAKEN = (0, 1, 2, 3, 4, 5, 6, 7, 8, _QUERY_SEQLENS)  # of the inputs
_INPUTS = "query, key, value, past_key, past_value, seqlens_k, total, cos, sin, query_seqlens"
_TYPES = {name: "int" for name in _INTEGERS} | {"scale": "float"}
_BODY = (
    f"y, present_key, present_value = com.microsoft.{NAME} <"
    + ", ".join(f"{name}: {_TYPES[name]} = @{name}" for name in _ATTRIBUTES)
    + "> (query, key, value, past_key, past_value, seqlens_k, total, cos, sin, "
    + '"", ' * (_QUERY_SEQLENS - 9)
    + "query_seqlens)"
)


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in nodes_of(model, NAME) if node.domain != functions.DOMAIN)


def _check(node: ir.Node) -> ir.Node | Declined:
    """The kernel computes with float32 caches and lengths of the new tokens, and with nothing else that is optional."""
    if operand(node, _QUERY_SEQLENS) is None:
        return PORTABLE
    past = node.inputs[_PAST_KEY]
    assert past is not None
    assert past.dtype is not None
    assert past.shape is not None
    if past.dtype != ir.DataType.FLOAT:
        return Declined(f"its caches are {past.dtype.name.lower()}")
    if any(value is not None and place not in _TAKEN for place, value in enumerate(node.inputs)):
        return OPTIONAL
    if node.attributes.get_float("softcap", 0.0) != 0.0:
        return SOFTCAP
    size = past.shape[-1]
    if not isinstance(size, int) or size % HEAD_SIZE_STEP or size > LARGEST_HEAD_SIZE:
        return Declined(f"heads of {size} have no kernel")
    return node


def _rewrite(model: ir.Model, node: ir.Node) -> None:
    attributes = {name: node.attributes.get_int(name, _DEFAULTS.get(name)) for name in _INTEGERS}
    operands = [node.inputs[place] for place in _TAKEN]
    scale = node.attributes.get_float("scale")
    own = add_node(node, NAME, operands, outputs=3, domain=functions.DOMAIN, **attributes, scale=scale)
    for old, new in zip(node.outputs, own.outputs, strict=True):
        replace_value(old, new)
    model.graph.remove(node, safe=True)
    functions.define(model, NAME, _ATTRIBUTES, _INPUTS, "y, present_key, present_value", _BODY)


use_own_attention = Rewrite(
    "use_own_attention",
    "com.microsoft.GroupQueryAttention -> imsm.GroupQueryAttention, a function of the graph that is the same node",
    _candidates,
    _check,
    _rewrite,
)
