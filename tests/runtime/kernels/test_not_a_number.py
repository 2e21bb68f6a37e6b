"""What is not a number stays so, in the rows that it belongs to and in no other: a damaged file must not give text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .nodes import Inputs, run

INPUTS, OUTPUTS, RANK = 160, 40, 4  # no whole chunk of 128
PRODUCTS = ("QuantizedMatMul", "QuantizedMatMulLowRank", "QuantizedSwiGLU", "QuantizedSwiGLULowRank")
BAD = (np.nan, np.inf, -np.inf)
BITS = (4, 6, 8)
ROW_COUNTS = (1, 3, 20)  # read column by column up to 16, in tiles from then on


def product(operator: str, rows: int, bits: int, zero_points: bool = False) -> tuple[Inputs, dict[str, Any]]:
    """A product of random values, the second half of whose rows has a low-rank change where the operator has one."""
    random = np.random.default_rng(rows)
    blocks = INPUTS // 32

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    inputs: Inputs = {"x": values(rows, INPUTS)}
    names = ("gate_", "up_") if "SwiGLU" in operator else ("",)
    for name in names:
        inputs[f"{name}weights"] = random.integers(0, 256, (OUTPUTS, blocks, 32 if bits == 8 else 16), np.uint8)
        inputs[f"{name}scales"] = values(OUTPUTS, blocks)
        zeros = random.integers(0, 256, (OUTPUTS, -(-blocks // 2) if bits == 4 else blocks), np.uint8)
        inputs[f"{name}zeros"] = zeros if zero_points else None
        inputs[f"{name}bias"] = values(OUTPUTS)
    if operator.endswith("LowRank"):
        inputs["rows"] = (np.arange(rows) >= rows // 2).astype(np.float32)
        for name in names:
            inputs |= {f"{name}a": values(INPUTS, RANK), f"{name}b": values(RANK, OUTPUTS)}
    if bits == 6:
        inputs |= {f"{name}more": random.integers(0, 256, (OUTPUTS, 2, 32), np.uint8) for name in names}
    return inputs, {"K": INPUTS, "N": OUTPUTS, "bits": bits, "block_size": 32}


def damaged(inputs: Inputs, name: str, place: tuple[int, ...], value: float) -> Inputs:
    copy = inputs[name].copy()
    copy[place] = value
    return inputs | {name: copy}


def assert_damaged(found: np.ndarray, right: np.ndarray, where: Any) -> None:
    """`found` is `right`, except that nothing in `where` is finite."""
    assert np.isfinite(right).all()
    assert not np.isfinite(found[where]).any()
    rest = np.ones(found.shape, bool)
    rest[where] = False
    np.testing.assert_array_equal(found[rest], right[rest])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("operator", PRODUCTS)
def test_an_activation(operator: str, bits: int, rows: int, bad: float) -> None:
    for zero_points in (False, True):
        inputs, attributes = product(operator, rows, bits, zero_points)
        right = run(operator, inputs, attributes)[0]
        for column in (0, 17, INPUTS - 1):
            row = rows - 1 if column else 0
            assert_damaged(run(operator, damaged(inputs, "x", (row, column), bad), attributes)[0], right, row)


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("operator", PRODUCTS)
def test_a_scale_or_a_bias(operator: str, half: bool, rows: int) -> None:
    inputs, attributes = product(operator, rows, 4)
    names = [name for name in inputs if name.endswith("scales")]
    if half:
        inputs |= {name: inputs[name].astype(np.float16) for name in names}
    right = run(operator, inputs, attributes)[0]
    for name in [*names, *(name for name in inputs if name.endswith("bias"))]:
        place = (7, 3) if name in names else (7,)
        found = run(operator, damaged(inputs, name, place, np.nan), attributes)[0]
        assert_damaged(found, right, (slice(None), 7))


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("operator", [name for name in PRODUCTS if name.endswith("LowRank")])
def test_a_low_rank_change(operator: str, rows: int) -> None:
    inputs, attributes = product(operator, rows, 4)
    right = run(operator, inputs, attributes)[0]
    changed = slice(rows // 2, None)
    for name in [name for name in inputs if name.endswith("a")]:
        found = run(operator, damaged(inputs, name, (40, 1), np.nan), attributes)[0]
        assert_damaged(found, right, changed)
    for name in [name for name in inputs if name.endswith("b")]:
        found = run(operator, damaged(inputs, name, (1, 9), np.nan), attributes)[0]
        assert_damaged(found, right, (changed, 9))
    factors = damaged(inputs, "rows", (rows - 1,), np.nan)
    assert_damaged(run(operator, factors, attributes)[0], right, rows - 1)


@pytest.mark.parametrize("rows", ROW_COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_activations_of_zero_are_numbers(bits: int, rows: int) -> None:
    inputs, attributes = product("QuantizedMatMul", rows, bits, True)
    found = run("QuantizedMatMul", inputs | {"x": np.zeros((rows, INPUTS), np.float32)}, attributes)[0]
    np.testing.assert_array_equal(found, np.broadcast_to(inputs["bias"], found.shape))


HEADS, KV_HEADS, SIZE = 4, 2, 16


def attention(
    known: list[int], new: list[int], tokens: int, rotary: bool = True, window: int = -1
) -> tuple[Inputs, dict[str, Any]]:
    """Two rows with `known` tokens and `new` ones, queries, keys and values apart."""
    random = np.random.default_rng(tokens)

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    lengths = [old + fresh for old, fresh in zip(known, new, strict=True)]
    capacity = max(known) + tokens
    inputs: Inputs = {
        "query": values(2, tokens, HEADS * SIZE),
        "key": values(2, tokens, KV_HEADS * SIZE),
        "value": values(2, tokens, KV_HEADS * SIZE),
        "past_key": values(2, KV_HEADS, capacity, SIZE),
        "past_value": values(2, KV_HEADS, capacity, SIZE),
        "seqlens_k": np.array(lengths, np.int32) - np.int32(1),
        "total": np.array(capacity, np.int32),
        "cos": values(capacity, SIZE // 2) if rotary else None,
        "sin": values(capacity, SIZE // 2) if rotary else None,
        "query_seqlens": np.array(new, np.int32),
    }
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3, "do_rotary": int(rotary)}
    return inputs, attributes | {"local_window_size": window}


STEPS: dict[str, Callable[[], tuple[Inputs, dict[str, Any]]]] = {
    "prefill": lambda: attention([5, 3], [6, 4], 6),
    "tiles": lambda: attention([70, 140], [70, 70], 70),
    "decode": lambda: attention([5, 30], [1, 1], 1),
    "decode in parts": lambda: attention([1300, 600], [1, 1], 1),
    "without rotation": lambda: attention([5, 3], [6, 4], 6, rotary=False),
    "window": lambda: attention([70, 20], [6, 6], 6, window=9),
}


def heads(found: np.ndarray) -> np.ndarray:
    """(rows, tokens, heads, size)"""
    return found.reshape(*found.shape[:2], HEADS, SIZE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("step", STEPS)
def test_a_query(step: str, bad: float) -> None:
    inputs, attributes = STEPS[step]()
    right = heads(run("GroupQueryAttention", inputs, attributes)[0])
    token = int(inputs["query_seqlens"][1]) - 1
    found = run("GroupQueryAttention", damaged(inputs, "query", (1, token, 2 * SIZE + 1), bad), attributes)[0]
    assert_damaged(heads(found), right, (1, token, 2))


@pytest.mark.parametrize("name", ["key", "value", "past_key", "past_value"])
@pytest.mark.parametrize("step", STEPS)
def test_a_key_or_a_value(step: str, name: str) -> None:
    """It reaches the queries that see it, of the heads that share it: those behind it, as far as the window goes."""
    inputs, attributes = STEPS[step]()
    right = heads(run("GroupQueryAttention", inputs, attributes)[0])
    fresh = int(inputs["query_seqlens"][1])
    known = int(inputs["seqlens_k"][1]) + 1 - fresh
    for position in range(max(known - 4, 0), known) if name.startswith("past") else range(known, known + fresh):
        place = (1, 1, position, 3) if name.startswith("past") else (1, position - known, SIZE + 3)
        found = heads(run("GroupQueryAttention", damaged(inputs, name, place, np.nan), attributes)[0])
        seen = np.zeros(right.shape, bool)
        window = attributes["local_window_size"]
        for token in range(fresh):
            behind = known + token - position
            seen[1, token, 2:] = behind >= 0 and (window < 0 or behind < window)
        if name.endswith("value"):  # one element of the head
            seen &= np.arange(SIZE) == 3
        assert_damaged(found, right, seen)


@pytest.mark.parametrize("step", ["prefill", "without rotation"])
def test_padding_and_the_rest_of_a_cache_may_hold_anything(step: str) -> None:
    inputs, attributes = STEPS[step]()
    right = run("GroupQueryAttention", inputs, attributes)[0]
    fresh = int(inputs["query_seqlens"][1])
    anything: Inputs = {name: inputs[name].copy() for name in inputs if inputs[name] is not None}
    for name in ("query", "key", "value"):
        anything[name][1, fresh:] = np.nan
    for name in ("past_key", "past_value"):
        anything[name][1, :, int(inputs["seqlens_k"][1]) + 1 - fresh :] = np.nan
    np.testing.assert_array_equal(run("GroupQueryAttention", inputs | anything, attributes)[0], right)
