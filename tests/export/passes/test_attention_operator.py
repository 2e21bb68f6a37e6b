"""When attention becomes this project's own operator, and when not.

What its kernel computes is tested in tests/parity/test_kernels.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest

from export.passes.attention_operator import OPTIONAL, PORTABLE, SOFTCAP, use_own_attention
from export.passes.rewrite import Declined, Outcome
from tests.graphs import graph


def attention_model(
    dtype: str = "float", size: int = 16, attributes: str = "", more: str = "", news: str = "news", heads: int = 1
) -> ir.Model:
    cache = f"{dtype}[b,1,p,{size}]"
    inputs = (
        f"{dtype}[b,t,{(heads + 2) * size}] qkv, {cache} past_key, {cache} past_value, int32[b] lengths, int32 total"
    )
    inputs += f", int32[b] news, {dtype}[1,1,t,n] bias"
    operands = f'qkv, "", "", past_key, past_value, lengths, total, "", "", "", {more or chr(34) * 2}'
    operands += f', "", "", "", "", "", {news}' if news else ""
    call = f"com.microsoft.GroupQueryAttention<num_heads={heads}, kv_num_heads=1, scale=0.25{attributes}>({operands})"
    return graph(f"g ({inputs}) => ({dtype}[b,t,{heads * size}] y, {cache} k, {cache} v) {{ y, k, v = {call} }}")


def test_plain_attention_becomes_the_projects_operator() -> None:
    model = attention_model()
    assert use_own_attention(model) == Outcome(1)
    assert [(node.domain, node.op_type) for node in model.graph] == [("imsm", "GroupQueryAttention")]
    assert [value.name for value in model.graph.outputs] == ["y", "k", "v"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": "float16"}, Declined("its caches are float16")),
        ({"size": 24}, Declined("heads of 24 have no kernel")),
        ({"size": 272}, Declined("heads of 272 have no kernel")),
        ({"attributes": ", softcap=30.0"}, SOFTCAP),
        ({"more": "bias"}, OPTIONAL),
        ({"news": ""}, PORTABLE),
    ],
    ids=["float16", "size", "large", "soft-capping", "bias", "portable"],
)
def test_other_attention_stays(arguments: dict[str, Any], reason: Declined) -> None:
    model = attention_model(**arguments)
    assert use_own_attention(model) == Outcome(0, Counter({reason.reason: 1}))
    assert [node.domain for node in model.graph] == ["com.microsoft"]
    assert not model.functions


def test_the_projects_own_attention_is_not_a_candidate() -> None:
    model = attention_model()
    use_own_attention(model)
    assert use_own_attention(model) == Outcome()
