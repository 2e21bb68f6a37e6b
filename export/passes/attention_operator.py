"""Plain attention as this project's operator, whose kernel reads a cache once for all heads that share it.

com.microsoft.GroupQueryAttention -> imsm.GroupQueryAttention, a function of the graph that is the same node

Attention with biases, sinks, soft-capping or int8 caches stays, and the portable form.
"""

from __future__ import annotations

import onnx_ir as ir

from . import functions, weights

HEAD_SIZE_STEP, LARGEST_HEAD_SIZE = 16, 256
NAME = "GroupQueryAttention"
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


def use_own_attention(model: ir.Model) -> int:
    """Returns how many attention nodes became the project's own operator."""
    count = 0
    for node in list(model.graph):
        if not _fits(node):
            continue
        attributes = {name: node.attributes.get_int(name, _DEFAULTS.get(name)) for name in _INTEGERS}
        operands = [node.inputs[index] for index in _TAKEN]
        scale = node.attributes.get_float("scale")
        own = weights.add_node(node, NAME, operands, outputs=3, domain=functions.DOMAIN, **attributes, scale=scale)
        for old, new in zip(node.outputs, own.outputs, strict=True):
            weights.replace_value(old, new)
        model.graph.remove(node, safe=True)
        count += 1
    if count:
        functions.define(
            model, f"{NAME} <{', '.join(_ATTRIBUTES)}> ({_INPUTS}) => (y, present_key, present_value)", _BODY
        )
    return count


def _fits(node: ir.Node) -> bool:
    """Whether the kernel computes it: float32 caches, lengths of the new tokens, and nothing else that is optional."""
    inputs = list(node.inputs)
    if node.op_type != NAME or len(inputs) <= _QUERY_SEQLENS or inputs[_QUERY_SEQLENS] is None:
        return False
    past = inputs[_PAST_KEY]
    if past is None or past.dtype != ir.DataType.FLOAT or past.shape is None or not isinstance(past.shape[-1], int):
        return False
    other = [value for index, value in enumerate(inputs) if value is not None and index not in _TAKEN]
    size = past.shape[-1]
    plain = not other and node.attributes.get_float("softcap", 0.0) == 0.0
    return plain and size % HEAD_SIZE_STEP == 0 and size <= LARGEST_HEAD_SIZE
