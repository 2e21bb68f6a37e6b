"""The runtime's kernels compute what the functions of the graph say, compared by value: products with NumPy's own
rounding of activations, attention with onnxruntime's operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export.passes.attention_operator import use_own_attention
from export.passes.half_adapter import store_adapter_in_half, store_in_half
from export.passes.low_rank import pack_low_rank
from export.passes.pack_codes import pack_codes
from export.passes.quantized_matmul import fuse_quantized_matmul
from export.passes.quantized_swiglu import fuse_quantized_swiglu
from export.quantization.weight_format import QuantizedWeight, dequantize, in_bytes, round_to_nearest
from runtime.engine import own_kernels
from tests.graphs import graph, kinds, with_weights

if own_kernels.library() is None:
    pytest.skip(own_kernels.describe(), allow_module_level=True)

ROUNDED_TOGETHER = 32  # activations with one scale


def run_twice(model: ir.Model, feed: dict[str, Any], threads: int = 2) -> tuple[list[Any], list[Any]]:
    """The outputs with the kernels, and with onnxruntime's own."""
    outputs = []
    for kernels in (True, False):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if kernels:
            options.register_custom_ops_library(str(own_kernels.library()))
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        outputs.append(session.run(None, feed))
    return outputs[0], outputs[1]


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations as the kernel sees them: int8 times one scale a block."""
    rows, width = x.shape
    padded = np.zeros((rows, -(-width // ROUNDED_TOGETHER) * ROUNDED_TOGETHER), np.float32)
    padded[:, :width] = x
    blocks = padded.reshape(rows, -1, ROUNDED_TOGETHER)
    largest = np.abs(blocks).max(-1, keepdims=True)
    factor = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    found = np.rint(blocks * factor).astype(np.float64) * (largest / 127)
    kept: np.ndarray = found.reshape(rows, -1)[:, :width]
    return kept


def product(
    inputs: int, outputs: int, block: int, rank: int, bias: bool, half: bool, bits: int = 4, symmetric: bool = True
) -> tuple[ir.Model, dict[str, np.ndarray], np.ndarray]:
    """A product with quantized weights and a low-rank change, fused; its constants, and what its weights stand for."""
    random = np.random.default_rng(inputs * outputs + rank)
    values = random.standard_normal((outputs, inputs)) + (0 if symmetric else 0.7)
    rounded = round_to_nearest(values.astype(np.float32), bits, block, symmetric)
    weight = rounded if rounded.more is None else in_bytes(rounded)
    constants = {
        "w": weight.packed,
        "s": weight.scales,
        "bias": random.standard_normal(outputs).astype(np.float32),
        "l.adapter_a": random.standard_normal((inputs, rank)).astype(np.float32),
        "l.adapter_b": random.standard_normal((rank, outputs)).astype(np.float32),
    }
    declared = [
        f"uint8[{','.join(map(str, weight.packed.shape))}] w",
        f"float[{','.join(map(str, weight.scales.shape))}] s",
        *([] if weight.zero_points is None else [f"uint8[{','.join(map(str, weight.zero_points.shape))}] z"]),
        *([f"float[{outputs}] bias"] if bias else []),
        *([f'float[{inputs},{rank}] "l.adapter_a", float[{rank},{outputs}] "l.adapter_b"'] if rank else []),
    ]
    if weight.zero_points is not None:
        constants["z"] = weight.zero_points
    attributes = f"K={inputs}, N={outputs}, bits={weight.bits}, block_size={block}, accuracy_level=4"
    zeros = '""' if weight.zero_points is None else "z"
    operands = f'x, w, s, {zeros}, "", bias' if bias else f"x, w, s, {zeros}"
    change = """
        low = MatMul(x, "l.adapter_a")
        kept = Mul(low, rows)
        change = MatMul(kept, "l.adapter_b")
        y = Add(plain, change)
    """
    text = f"""g (float[b,t,{inputs}] x, float[b,t,1] rows, {", ".join(declared)}) => (float[b,t,{outputs}] y) {{
        {"plain" if rank else "y"} = com.microsoft.MatMulNBits<{attributes}>({operands}) {change if rank else ""} }}"""
    model = with_weights(graph(text), constants)
    if half:
        assert store_adapter_in_half(model).fired == sum(constants[f"l.adapter_{name}"].size >= 1024 for name in "ab")
    assert fuse_quantized_matmul(model).fired == 1
    assert pack_codes(model).fired == (rounded.more is not None)
    (node,) = model.graph
    assert node.op_type == ("QuantizedMatMulLowRank" if rank else "QuantizedMatMul")
    assert node.attributes.get_int("bits") == bits
    if not rank:
        model.graph.inputs.pop(1)
    return model, constants, dequantize(weight, inputs).astype(np.float64)


ROW_COUNTS = [(2, 1), (1, 1), (2, 2), (3, 1), (5, 1), (2, 8), (2, 9), (2, 130), (1, 600)]
SOME_COUNTS = [(1, 1), (2, 2), (3, 1), (5, 1), (1, 40)]  # all that differ in how weights are read


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "rows"),
    [
        *((bits, rows) for bits in (4, 8) for rows in ROW_COUNTS),
        *((bits, rows) for bits in (5, 6) for rows in SOME_COUNTS),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("inputs", "outputs", "block", "rank", "bias", "half"),
    [
        (64, 96, 32, 0, False, False),
        (896, 200, 32, 16, True, False),
        (1024, 70, 128, 48, True, True),  # blocks of ranks, as packed projections have
        (200, 33, 64, 5, False, False),  # no whole block, register or task
        (40, 1, 32, 1, True, False),
        (4864, 65, 32, 24, False, True),
        (300, 20, 32, 8, False, True),  # A in float16, B too small for it
    ],
)
def test_products(
    inputs: int,
    outputs: int,
    block: int,
    rank: int,
    bias: bool,
    half: bool,
    bits: int,
    symmetric: bool,
    rows: tuple[int, int],
) -> None:
    model, constants, weight = product(inputs, outputs, block, rank, bias, half, bits, symmetric)
    batch, tokens = rows
    random = np.random.default_rng(tokens)
    x = random.standard_normal((batch, tokens, inputs)).astype(np.float32)
    x[0, 0, :ROUNDED_TOGETHER] = 0  # a block without a scale
    factors = np.zeros((batch, tokens, 1), np.float32)
    factors[batch // 2 :] = 1
    mine, theirs = run_twice(model, {"x": x, "rows": factors} if rank else {"x": x})
    flat = x.reshape(-1, inputs)
    expected = rounded(flat) @ weight.T + (constants["bias"] if bias else 0)
    if rank:
        stored = [constants[f"l.adapter_{name}"] for name in "ab"]
        a, b = (values.astype(np.float16) if half and values.size >= 1024 else values for values in stored)
        expected += (flat.astype(np.float64) @ a.astype(np.float64) * factors.reshape(-1, 1)) @ b.astype(np.float64)
    size = np.abs(expected).max()
    np.testing.assert_allclose(mine[0].reshape(-1, outputs), expected, atol=3e-6 * size, rtol=0)
    np.testing.assert_allclose(theirs[0].reshape(-1, outputs), expected, atol=0.02 * size, rtol=0)


def test_one_factor_for_all_tokens_of_a_row() -> None:
    model, _, _ = product(64, 32, 32, 4, False, False)
    x = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    shared, each = (np.array([0, 0.5], np.float32).reshape(2, 1, 1) * np.ones((1, n, 1), np.float32) for n in (1, 5))
    model.graph.inputs[1].shape = ir.Shape(["b", "u", 1])
    np.testing.assert_array_equal(
        run_twice(model, {"x": x, "rows": shared})[0], run_twice(model, {"x": x, "rows": each})[0]
    )
    with pytest.raises(Exception, match=r"rows is \(1, 3, 1\); it must have a number of elements that divides rows 10"):
        run_twice(model, {"x": x, "rows": np.ones((1, 3, 1), np.float32)})


def swiglu(
    inputs: int, outputs: int, block: int, rank: int, up_bias: bool, bits: int
) -> tuple[ir.Model, dict[str, Any], dict[str, QuantizedWeight]]:
    """The two products of SwiGLU, fused; its constants and its weights."""
    random = np.random.default_rng(outputs)
    constants: dict[str, Any] = {}
    found: dict[str, QuantizedWeight] = {}
    declared, lines = [], []
    for name in ("gate", "up"):
        weight = round_to_nearest(random.standard_normal((outputs, inputs)).astype(np.float32), bits, block, True)
        weight = weight if weight.more is None else in_bytes(weight)
        found[name] = replace(weight, scales=weight.scales.astype(np.float16).astype(np.float32))
        constants |= {f"{name}.w": weight.packed, f"{name}.s": found[name].scales}
        declared.append(f'uint8[{",".join(map(str, weight.packed.shape))}] "{name}.w"')
        declared.append(f'float[{",".join(map(str, weight.scales.shape))}] "{name}.s"')
        zeros = '""'
        if weight.zero_points is not None:
            constants[f"{name}.z"], zeros = weight.zero_points, f'"{name}.z"'
            declared.append(f'uint8[{",".join(map(str, weight.zero_points.shape))}] "{name}.z"')
        bias = up_bias and name == "up"
        if bias:
            constants[f"{name}.bias"] = random.standard_normal(outputs).astype(np.float32)
            declared.append(f'float[{outputs}] "{name}.bias"')
        attributes = f"K={inputs}, N={outputs}, bits={weight.bits}, block_size={block}, accuracy_level=4"
        operands = f'x, "{name}.w", "{name}.s", {zeros}' + (f', "", "{name}.bias"' if bias else "")
        lines.append(f"{name}{'_plain' if rank else ''} = com.microsoft.MatMulNBits<{attributes}>({operands})")
        if rank:
            a, b = f'"{name}.adapter_a"', f'"{name}.adapter_b"'
            constants[f"{name}.adapter_a"] = random.standard_normal((inputs, rank)).astype(np.float32)
            constants[f"{name}.adapter_b"] = random.standard_normal((rank, outputs)).astype(np.float32)
            declared += [f"float[{inputs},{rank}] {a}", f"float[{rank},{outputs}] {b}"]
            lines += [f"{name}_low = MatMul(x, {a})", f"{name}_kept = Mul({name}_low, rows)"]
            lines += [f"{name}_change = MatMul({name}_kept, {b})", f"{name} = Add({name}_plain, {name}_change)"]
    lines += ["active = com.microsoft.QuickGelu<alpha=1.0>(gate)", "y = Mul(active, up)"]
    head = f"g (float[b,t,{inputs}] x, float[b,t,1] rows, {', '.join(declared)}) => (float[b,t,{outputs}] y)"
    model = with_weights(graph(f"{head} {{ {' '.join(lines)} }}"), constants)
    assert pack_low_rank(model).fired == (1 if rank else 0)
    assert fuse_quantized_matmul(model).fired == 2
    assert pack_codes(model).fired == (2 if bits in (5, 6) else 0)
    assert fuse_quantized_swiglu(model).fired == 1
    assert kinds(model) == ["QuantizedSwiGLULowRank" if rank else "QuantizedSwiGLU"]
    if not rank:
        model.graph.inputs.pop(1)
    return model, constants, found


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize(("outputs", "rank", "up_bias"), [(200, 8, False), (70, 0, True), (33, 4, True)])
def test_swiglu(outputs: int, rank: int, up_bias: bool, tokens: int, bits: int) -> None:
    inputs, block = 96, 32
    model, constants, quantized = swiglu(inputs, outputs, block, rank, up_bias, bits)
    random = np.random.default_rng(tokens)
    x = random.standard_normal((2, tokens, inputs)).astype(np.float32)
    rows = np.zeros((2, tokens, 1), np.float32)
    rows[1] = 1
    mine, theirs = run_twice(model, {"x": x, "rows": rows} if rank else {"x": x})
    flat, parts = x.reshape(-1, inputs), {}
    for name in ("gate", "up"):
        weight = dequantize(quantized[name], inputs).T.astype(np.float64)
        parts[name] = rounded(flat) @ weight + constants.get(f"{name}.bias", 0)
        if rank:
            a, b = (constants[f"{name}.adapter_{factor}"].astype(np.float64) for factor in "ab")
            parts[name] += (flat.astype(np.float64) @ a * rows.reshape(-1, 1)) @ b
    expected = parts["gate"] / (1 + np.exp(-parts["gate"])) * parts["up"]
    size = np.abs(expected).max()
    np.testing.assert_allclose(mine[0].reshape(-1, outputs), expected, atol=3e-6 * size, rtol=0)
    np.testing.assert_allclose(theirs[0].reshape(-1, outputs), expected, atol=0.03 * size, rtol=0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "width", "block"), [(5, 96, 32), (6, 200, 64), (6, 100, 128), (5, 64, 64)])
def test_rows_of_a_matrix(bits: int, width: int, block: int, symmetric: bool, half: bool) -> None:
    values = np.random.default_rng(width).standard_normal((70, width)).astype(np.float32)
    weight = in_bytes(round_to_nearest(values, bits, block, symmetric))
    scales = weight.scales.astype(np.float16).astype(np.float32) if half else weight.scales
    assert weight.zero_points is not None
    constants = {"w": weight.packed, "s": scales, "z": weight.zero_points}
    sizes = {name: ",".join(map(str, array.shape)) for name, array in constants.items()}
    lookup = f"com.microsoft.GatherBlockQuantized<bits=8, block_size={block}, gather_axis=0, quantize_axis=1>"
    text = f"""g (int64[b,t] ids, uint8[{sizes["w"]}] w, float[{sizes["s"]}] s, uint8[{sizes["z"]}] z)
        => (float[b,t,{block * weight.scales.shape[1]}] y) <int64[2] flat = {{-1, {block * weight.scales.shape[1]}}}>
        {{ rows = Reshape(w, flat) y = {lookup}(rows, ids, s, z) }}"""
    model = with_weights(graph(text), constants)
    if half:
        store_in_half(model.graph, model.graph.initializers["s"])
    assert pack_codes(model).fired == 1
    assert kinds(model) == ["QuantizedGather"]
    ids = np.random.default_rng(0).integers(0, 70, (2, 3))
    ids[0, 0], ids[1, 2] = 0, 69
    expected = dequantize(replace(weight, scales=scales), width)[ids]
    for found in run_twice(model, {"ids": ids}):
        np.testing.assert_allclose(found[0][..., :width], expected, rtol=1e-6)


ATTENTION: dict[str, dict[str, Any]] = {
    "packed, rotated": {"heads": 14, "kv_heads": 2, "size": 64, "packed": True, "rotary": "half"},
    "apart, rotated in pairs": {"heads": 4, "kv_heads": 4, "size": 32, "packed": False, "rotary": "interleaved"},
    "part of a head rotated": {"heads": 4, "kv_heads": 2, "size": 96, "packed": True, "rotary": "half", "rotated": 32},
    "not rotated, one key for all": {"heads": 9, "kv_heads": 1, "size": 16, "packed": False, "rotary": None},
    "large heads": {"heads": 4, "kv_heads": 1, "size": 256, "packed": False, "rotary": "half"},
    "a window": {"heads": 4, "kv_heads": 2, "size": 16, "packed": True, "rotary": "half", "window": 20},
    "many heads a key": {"heads": 40, "kv_heads": 1, "size": 16, "packed": True, "rotary": "half"},
    "a scale by the head": {"heads": 2, "kv_heads": 1, "size": 16, "packed": True, "rotary": None, "scale": 0.0},
}
POSITIONS = 1400


def attention(
    heads: int,
    kv_heads: int,
    size: int,
    packed: bool,
    rotary: str | None,
    rotated: int | None = None,
    window: int = -1,
    scale: float = 0.27,
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    width, kv_width, half = heads * size, kv_heads * size, (rotated or size) // 2
    angles = np.outer(np.arange(POSITIONS), 1 / 100 ** (np.arange(half) / half)).astype(np.float32)
    tables = {"cos": np.cos(angles), "sin": np.sin(angles)} if rotary else {}
    inputs = [f"float[b,t,{width + 2 * kv_width if packed else width}] query"]
    inputs += [] if packed else [f"float[b,t,{kv_width}] key, float[b,t,{kv_width}] value"]
    inputs += [f"float[b,{kv_heads},p,{size}] past_key, float[b,{kv_heads},p,{size}] past_value"]
    inputs += ["int32[b] seqlens_k, int32 total, int32[b] query_seqlens"]
    inputs += [f"float[{POSITIONS},{half}] {name}" for name in tables]
    operands = ["query", *(["", ""] if packed else ["key", "value"]), "past_key", "past_value", "seqlens_k", "total"]
    operands += ["cos", "sin"] if rotary else ["", ""]
    operands += [""] * 7 + ["query_seqlens"]
    attributes = f"num_heads={heads}, kv_num_heads={kv_heads}, scale={scale}"
    if rotary:
        attributes += f", do_rotary=1, rotary_interleaved={int(rotary == 'interleaved')}"
    if window > 0:
        attributes += f", local_window_size={window}"
    call = ", ".join(name or '""' for name in operands)
    cache = f"float[b,{kv_heads},q,{size}]"
    text = f"""g ({", ".join(inputs)}) => (float[b,t,{width}] y, {cache} k, {cache} v)
        {{ y, k, v = com.microsoft.GroupQueryAttention<{attributes}>({call}) }}"""
    model = with_weights(graph(text), tables)
    assert use_own_attention(model).fired == 1
    assert [(node.domain, node.op_type) for node in model.graph] == [("imsm", "GroupQueryAttention")]
    return model, tables


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize(
    ("known", "new", "tokens"),
    [
        ([0, 0], [7, 7], 7),
        ([0, 0], [100, 37], 100),  # padding behind the second text
        ([5, 90], [1, 1], 1),
        ([1200, 3], [1, 1], 1),  # the first cache in parts, most of which the second one has not
        ([511, 512], [1, 1], 1),
        ([70, 0], [30, 64], 64),
        ([40, 12], [3, 0], 3),  # nothing new in the second text
    ],
    ids=str,
)
@pytest.mark.parametrize("room", [0, 50])
def test_attention(kind: str, known: list[int], new: list[int], tokens: int, room: int) -> None:
    facts = ATTENTION[kind]
    model, _ = attention(**facts)
    random = np.random.default_rng(tokens + sum(known))
    size, kv_heads, heads = facts["size"], facts["kv_heads"], facts["heads"]
    total = [old + fresh for old, fresh in zip(known, new, strict=True)]
    length = max(known) + tokens + room if room else max(known)

    def values(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    width = heads * size
    feed: dict[str, Any] = {"query": values(2, tokens, width + (2 * kv_heads * size if facts["packed"] else 0))}
    if not facts["packed"]:
        feed |= {name: values(2, tokens, kv_heads * size) for name in ("key", "value")}
    feed |= {name: values(2, kv_heads, length, size) for name in ("past_key", "past_value")}
    feed |= {
        "seqlens_k": np.array(total, np.int32) - 1,
        "total": np.array(max(known) + tokens, np.int32),
        "query_seqlens": np.array(new, np.int32),
    }
    mine, theirs = run_twice(model, feed)
    for row, (fresh, count) in enumerate(zip(new, total, strict=True)):
        np.testing.assert_allclose(mine[0][row, :fresh], theirs[0][row, :fresh], atol=1e-5, rtol=1e-5)
        assert not mine[0][row, fresh:].any()
        for cache in (1, 2):
            np.testing.assert_allclose(mine[cache][row, :, :count], theirs[cache][row, :, :count], atol=1e-6, rtol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    model, _ = attention(**ATTENTION["not rotated, one key for all"])
    facts = ATTENTION["not rotated, one key for all"]
    random = np.random.default_rng(0)
    feed = {
        "query": 200 * random.standard_normal((1, 80, facts["heads"] * 16)).astype(np.float32),
        "key": 200 * random.standard_normal((1, 80, 16)).astype(np.float32),
        "value": random.standard_normal((1, 80, 16)).astype(np.float32),
        "past_key": np.zeros((1, 1, 0, 16), np.float32),
        "past_value": np.zeros((1, 1, 0, 16), np.float32),
        "seqlens_k": np.array([79], np.int32),
        "total": np.array(80, np.int32),
        "query_seqlens": np.array([80], np.int32),
    }
    mine, theirs = run_twice(model, feed)
    np.testing.assert_allclose(mine[0], theirs[0], atol=1e-4)


def test_lengths_that_do_not_fit_are_an_error() -> None:
    model, _ = attention(**ATTENTION["packed, rotated"])
    facts = ATTENTION["packed, rotated"]
    feed = {
        "query": np.zeros((1, 2, (14 + 4) * 64), np.float32),
        "past_key": np.zeros((1, facts["kv_heads"], 8, 64), np.float32),
        "past_value": np.zeros((1, facts["kv_heads"], 8, 64), np.float32),
        "seqlens_k": np.array([90], np.int32),
        "total": np.array(3, np.int32),
        "query_seqlens": np.array([2], np.int32),
    }
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(own_kernels.library()))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    with pytest.raises(Exception, match="seqlens_k is 90 for row 0; it must be 1 to 7"):
        session.run(None, feed)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_computes_the_same(threads: int) -> None:
    model, _, _ = product(512, 300, 32, 16, True, False)
    random = np.random.default_rng(1)
    for tokens in (1, 40):
        feed = {
            "x": random.standard_normal((2, tokens, 512)).astype(np.float32),
            "rows": np.array([[[0.0]] * tokens, [[1.0]] * tokens], np.float32),
        }
        np.testing.assert_array_equal(run_twice(model, feed, threads)[0][0], run_twice(model, feed, 2)[0][0])
