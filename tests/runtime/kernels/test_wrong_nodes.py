"""A node that contradicts itself raises an exception that says how, in every kernel."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from .nodes import HEADS, KV_HEADS, NODES, PAST, RANK, ROWS, SIZE, TOKENS, WIDTH, Inputs, K, N, floats, run


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


SEPARATE = {"query": floats(2, TOKENS, HEADS * SIZE), "key": floats(2, TOKENS, KV_HEADS * SIZE)}
WRONG_INPUTS: list[tuple[str, Inputs, str]] = [
    (
        "QuantizedMatMul",
        {"weights": np.zeros((N, 16), np.uint8)},
        "weights is (33, 16); it must be (N 33, blocks 2, bytes of a block 16), or have 1056 elements in one dimension",
    ),
    (
        "QuantizedMatMul",
        {"weights": np.zeros(1055, np.uint8)},
        "weights is (1055); it must be (N 33, blocks 2, bytes of a block 16), or have 1056 elements",
    ),
    (
        "QuantizedMatMul",
        {"scales": floats(N - 1, 2)},
        "scales is (32, 2); it must be (N 33, blocks 2), or have 66 elements in one dimension",
    ),
    ("QuantizedMatMul", {"scales": floats(2, N)}, "scales is (2, 33); it must be (N 33, blocks 2), or"),
    ("QuantizedMatMul", {"scales": np.ones((N, 2), np.int32)}, "scales is int32; it must be float32 or float16"),
    ("QuantizedMatMul", {"scales": np.ones((N, 2))}, "scales is float64; it must be float32 or float16"),
    (
        "QuantizedMatMul",
        {"zeros": np.zeros((1, 1), np.uint8)},
        "zero_points is (1, 1); it must be (N 33, bytes of zero points 1), or",
    ),
    ("QuantizedMatMul", {"bias": floats(1)}, "bias is (1); it must be (N 33)"),
    (
        "QuantizedMatMul",
        {"more": np.zeros((N, 2, 4), np.uint8)},
        "more is (33, 2, 4); it must be (N 33, groups of 128 1, bytes of a group 0), or have 0 elements",
    ),
    ("QuantizedGather", {"ids": np.array([[0], [N]])}, "ids is 33 in row 1; it must be below N 33 and not negative"),
    ("QuantizedGather", {"ids": np.array([[-1]])}, "ids is -1 in row 0; it must be below N 33 and not negative"),
    ("QuantizedGather", {"ids": np.zeros([1] * 8, np.int64)}, "ids has 8 dimensions; it may have 7"),
    (
        "QuantizedGather",
        {"more": np.zeros((N, 2, 4), np.uint8)},
        "more is (33, 2, 4); it must be (N 33, groups of 128 1, bytes of a group 32)",
    ),
    ("QuantizedGather", {"scales": floats(N, 3)}, "scales is (33, 3); it must be (N 33, blocks 2)"),
    ("QuantizedGather", {"zeros": np.zeros((N, 1), np.uint8)}, "zero_points is (33, 1); it must be (N 33, blocks 2)"),
    ("QuantizedMatMul", {"x": floats(ROWS, K - 1)}, "x is (6, 63); it must be (..., K 64)"),
    ("QuantizedMatMul", {"x": np.array(1, np.float32)}, "x is (); it must be (..., K 64)"),
    ("QuantizedMatMul", {"x": floats(*[1] * 8, K)}, "x has 9 dimensions; it may have 8"),
    (
        "QuantizedMatMulLowRank",
        {"rows": floats(4)},
        "rows is (4); it must have a number of elements that divides rows 6",
    ),
    (
        "QuantizedMatMulLowRank",
        {"rows": floats(0)},
        "rows is (0); it must have a number of elements that divides rows 6",
    ),
    ("QuantizedMatMulLowRank", {"a": floats(K - 1, RANK)}, "a is (63, 4); it must be (K 64, rank)"),
    ("QuantizedMatMulLowRank", {"a": floats(K * RANK)}, "a is (256); it must be (K 64, rank)"),
    ("QuantizedMatMulLowRank", {"b": floats(RANK + 1, N)}, "b is (5, 33); it must be (rank 4, N 33)"),
    ("QuantizedMatMulLowRank", {"b": floats(RANK, N - 1)}, "b is (4, 32); it must be (rank 4, N 33)"),
    ("QuantizedMatMulLowRank", {"a": np.ones((K, RANK))}, "a is float64; it must be float32 or float16"),
    ("QuantizedSwiGLU", {"up_weights": np.zeros((1, 2, 16), np.uint8)}, "up_weights is (1, 2, 16); it must be (N 33, "),
    ("QuantizedSwiGLULowRank", {"up_b": floats(RANK, 1)}, "up_b is (4, 1); it must be (rank 4, N 33)"),
    (
        "GroupQueryAttention",
        {"query": floats(2, TOKENS, WIDTH - 16)},
        "query is (2, 2, 112); it must be (rows 2, tokens, width 128)",
    ),
    (
        "GroupQueryAttention",
        {"query": floats(2 * TOKENS, WIDTH)},
        "query is (4, 128); it must be (rows 2, tokens, width 128)",
    ),
    ("GroupQueryAttention", SEPARATE, "value is missing; key and value must be given both, or neither"),
    (
        "GroupQueryAttention",
        SEPARATE | {"value": floats(2, TOKENS, 16)},
        "value is (2, 2, 16); it must be (rows 2, tokens 2, width 32)",
    ),
    (
        "GroupQueryAttention",
        {"past_key": floats(2, 1, PAST, SIZE)},
        "past_key is (2, 1, 7, 16); it must be (rows, kv_num_heads 2, positions, head size)",
    ),
    (
        "GroupQueryAttention",
        {"past_value": floats(2, KV_HEADS, 1, SIZE)},
        "past_value is (2, 2, 1, 16); it must be (rows 2, kv_num_heads 2, positions 7, head size 16)",
    ),
    ("GroupQueryAttention", {"seqlens_k": ints(6)}, "seqlens_k is (1); it must have 2 elements (rows 2)"),
    ("GroupQueryAttention", {"query_seqlens": ints(2)}, "query_seqlens is (1); it must have 2 elements (rows 2)"),
    (
        "GroupQueryAttention",
        {"query_seqlens": ints(2, -1)},
        "query_seqlens is -1 for row 1; it must be 0 to the tokens of the step, 2",
    ),
    (
        "GroupQueryAttention",
        {"query_seqlens": ints(3, 2)},
        "query_seqlens is 3 for row 0; it must be 0 to the tokens of the step, 2",
    ),
    (
        "GroupQueryAttention",
        {"seqlens_k": ints(-5, 5)},
        "seqlens_k is -5 for row 0; it must be 1 to 6, as 2 tokens are new, past_key holds 7 and total is 7",
    ),
    ("GroupQueryAttention", {"seqlens_k": ints(7, 5)}, "seqlens_k is 7 for row 0; it must be 1 to 6"),
    (
        "GroupQueryAttention",
        {"seqlens_k": ints(9, 5), "total": np.array(12, np.int32)},
        "seqlens_k is 9 for row 0; it must be 1 to 8, as 2 tokens are new, past_key holds 7 and total is 12",
    ),
    ("GroupQueryAttention", {"seqlens_k": ints(2**31 - 1, 5)}, "seqlens_k is 2147483647 for row 0; it must be 1 to 6"),
    ("GroupQueryAttention", {"total": np.array(-1, np.int32)}, "total is -1; it must be 0 or more"),
    ("GroupQueryAttention", {"total": ints()}, "total is (0); it must have one element"),
    (
        "GroupQueryAttention",
        {"cos": floats(6, 8), "sin": floats(6, 8)},
        "seqlens_k is 6 for row 0; it must be below the 6 positions of cos and sin",
    ),
    (
        "GroupQueryAttention",
        {"sin": floats(1, SIZE // 2)},
        "sin is (1, 8); it must be (positions 16, half of the rotated part 8)",
    ),
    (
        "GroupQueryAttention",
        {"cos": floats(16, 9), "sin": floats(16, 9)},
        "cos is (16, 9); it must have at most 8 columns, half of the head size",
    ),
    ("GroupQueryAttention", {"cos": None, "sin": None}, "cos is missing"),
]
WRONG_ATTRIBUTES: list[tuple[str, dict[str, Any], str]] = [
    ("QuantizedMatMul", {"K": 0}, "K is 0; it must be 1 to 2147483647"),
    ("QuantizedMatMul", {"K": None}, "K is 0; it must be 1 to 2147483647"),
    ("QuantizedMatMul", {"K": 64.0}, "attribute K has the wrong type"),
    ("QuantizedMatMul", {"K": "64"}, "attribute K has the wrong type"),
    ("QuantizedMatMul", {"N": -1}, "N is -1; it must be 1 to 2147483647"),
    ("QuantizedMatMul", {"N": N - 2**63}, "it must be 1 to 2147483647"),
    ("QuantizedMatMul", {"bits": 3}, "bits is 3; it must be 4, 5, 6 or 8"),
    ("QuantizedGather", {"bits": 4}, "bits is 4; it must be 5 or 6"),
    ("QuantizedGather", {"block_size": 64}, r"weights is \(33, 2, 16\); it must be \(N, blocks, bytes of a block 32\)"),
    ("QuantizedSwiGLU", {"block_size": 16}, "block_size is 16; it must be 32, 64 or 128"),
    ("GroupQueryAttention", {"num_heads": 0}, "num_heads is 0; it must be 1 to 2147483647"),
    ("GroupQueryAttention", {"kv_num_heads": 0}, "kv_num_heads is 0; it must be 1 to 2147483647"),
    ("GroupQueryAttention", {"kv_num_heads": -1}, "kv_num_heads is -1; it must be 1 to 2147483647"),
    ("GroupQueryAttention", {"kv_num_heads": 3}, "num_heads is 4; it must be a multiple of kv_num_heads 3"),
    ("GroupQueryAttention", {"num_heads": 2**40}, "num_heads is 1099511627776; it must be 1 to 2147483647"),
    ("GroupQueryAttention", {"do_rotary": 2}, "do_rotary is 2; it must be 0 to 1"),
    ("GroupQueryAttention", {"do_rotary": 1.0}, "attribute do_rotary has the wrong type"),
    ("GroupQueryAttention", {"local_window_size": -2}, "local_window_size is -2; it must be -1 to 2147483647"),
    ("GroupQueryAttention", {"scale": 1}, "attribute scale has the wrong type"),
    ("GroupQueryAttention", {"scale": float("nan")}, "scale is nan; it must be finite"),
    ("GroupQueryAttention", {"scale": float("inf")}, "scale is inf; it must be finite"),
]


def identifier(value: object) -> str:
    return value if isinstance(value, str) else ",".join(value) if isinstance(value, dict) else ""


@pytest.mark.parametrize("operator", NODES)
def test_the_nodes_are_right_before_something_is_changed(operator: str) -> None:
    assert np.isfinite(run(operator, *NODES[operator])[0]).all()


@pytest.mark.parametrize(("operator", "changed", "message"), WRONG_INPUTS, ids=identifier)
def test_inputs_that_do_not_fit(operator: str, changed: Inputs, message: str) -> None:
    inputs, attributes = NODES[operator]
    with pytest.raises(Exception, match=re.escape(f"{operator}: {message}")):
        run(operator, inputs | changed, attributes)


@pytest.mark.parametrize("size", [8, 72, 272])
def test_a_head_size_without_a_kernel(size: int) -> None:
    inputs, attributes = NODES["GroupQueryAttention"]
    cache = floats(2, KV_HEADS, PAST, size)
    with pytest.raises(Exception, match=f"the head size is {size}; it must be a multiple of 16 up to 256"):
        run("GroupQueryAttention", inputs | {"past_key": cache, "past_value": cache}, attributes)


@pytest.mark.parametrize(("operator", "changed", "message"), WRONG_ATTRIBUTES, ids=identifier)
def test_attributes_that_contradict(operator: str, changed: dict[str, Any], message: str) -> None:
    inputs, attributes = NODES[operator]
    kept = {name: value for name, value in (attributes | changed).items() if value is not None}
    with pytest.raises(Exception, match=message):
        run(operator, inputs, kept)


@pytest.mark.parametrize(("operator", "missing"), [(name, key) for name in NODES for key in NODES[name][0]])
def test_an_input_that_is_left_out_is_optional_or_an_exception(operator: str, missing: str) -> None:
    inputs, attributes = NODES[operator]
    if missing.endswith(("zeros", "bias", "key", "value")) and not missing.startswith("past"):
        run(operator, inputs | {missing: None}, attributes)
        return
    with pytest.raises(Exception, match=r"marked single|has input size|is missing"):
        run(operator, inputs | {missing: None}, attributes)


@pytest.mark.parametrize("bits", [5, 6])
def test_low_bits_that_are_missing_or_another_widths(bits: int) -> None:
    inputs, attributes = NODES["QuantizedMatMul"]
    inputs, attributes = inputs | {"zeros": None}, attributes | {"bits": bits}
    with pytest.raises(Exception, match="QuantizedMatMul: more is missing"):
        run("QuantizedMatMul", inputs, attributes)
    more = {5: np.zeros((N, 1, 16), np.uint8), 6: np.zeros((N, 1, 32), np.uint8)}
    assert np.isfinite(run("QuantizedMatMul", inputs | {"more": more[bits]}, attributes)[0]).all()
    with pytest.raises(
        Exception, match=rf"more is .*; it must be \(N 33, groups of 128 1, bytes of a group {16 * bits - 64}\)"
    ):
        run("QuantizedMatMul", inputs | {"more": more[11 - bits]}, attributes)


def test_an_output_that_no_memory_holds_is_an_exception() -> None:
    inputs, attributes = NODES["GroupQueryAttention"]
    heads, size = 64, 256  # 2^48 bytes a cache, more than a process can address
    cache = floats(2, heads, PAST, size)
    large = {"query": floats(2, TOKENS, 3 * heads * size), "past_key": cache, "past_value": cache}
    large |= {"total": np.array(2**31 - 1, np.int32)}
    with pytest.raises(Exception, match=r"[Aa]lloc"):
        run("GroupQueryAttention", inputs | large, attributes | {"num_heads": heads, "kv_num_heads": heads})


def test_caches_are_kept_where_there_is_no_new_token() -> None:
    inputs, attributes = NODES["GroupQueryAttention"]
    nothing = {"query": floats(2, 0, WIDTH), "query_seqlens": np.zeros(2, np.int32)}
    y, keys, values = run("GroupQueryAttention", inputs | nothing, attributes)
    assert y.shape == (2, 0, HEADS * SIZE)
    np.testing.assert_array_equal(keys, inputs["past_key"])
    np.testing.assert_array_equal(values, inputs["past_value"])
