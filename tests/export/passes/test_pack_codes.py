"""When codes in bytes become four bits and what is left of them, and when not.

What the operators compute is tested in tests/parity/test_kernels.py."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from export.passes.pack_codes import READ_OTHERWISE, SMALL_BLOCKS, pack_codes
from export.passes.quantized_matmul import fuse_quantized_matmul
from export.passes.quantized_swiglu import OTHER_FORM, fuse_quantized_swiglu
from export.passes.rewrite import Outcome
from export.passes.weights import nbytes
from export.quantization.weight_format import in_bytes, round_to_nearest
from tests.graphs import graph, kinds, run, with_weights

WIDTH = 128
X = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)
IDS = np.array([[0, 63, 7], [3, 3, 12]])
VALUES = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def constants(bits: int, block: int = 32, symmetric: bool = True, name: str = "") -> dict[str, Any]:
    weight = in_bytes(round_to_nearest(VALUES if not name else VALUES[::-1], bits, block, symmetric))
    return {f"w{name}": weight.packed, f"s{name}": weight.scales, f"z{name}": weight.zero_points}


def product(name: str = "", block: int = 32) -> str:
    attributes = f"K={WIDTH}, N={WIDTH}, bits=8, block_size={block}, accuracy_level=4"
    return f"com.microsoft.MatMulNBits<{attributes}>(x, w{name}, s{name}, z{name})"


def lookup(block: int = 32) -> str:
    attributes = f"bits=8, block_size={block}, gather_axis=0, quantize_axis=1"
    return f"rows = Reshape(w, flat) e = com.microsoft.GatherBlockQuantized<{attributes}>(rows, ids, s, z)"


def model_of(lines: str, outputs: str, arrays: dict[str, Any]) -> ir.Model:
    types = {"uint8": "uint8", "float32": "float"}
    declared = [f"{types[str(a.dtype)]}[{','.join(map(str, a.shape))}] {name}" for name, a in arrays.items()]
    results = ", ".join(f"float[b,t,{WIDTH}] {name}" for name in outputs.split())
    text = f"""g (float[b,t,{WIDTH}] x, int64[b,t] ids, {", ".join(declared)}) => ({results})
        <int64[2] flat = {{-1, {WIDTH}}}> {{ {lines} }}"""
    return with_weights(graph(text), arrays)


def packed(model: ir.Model) -> Outcome:
    fuse_quantized_matmul(model)
    return pack_codes(model)


def outputs_of(model: ir.Model) -> list[np.ndarray]:
    found: list[np.ndarray] = run(model, x=X, ids=IDS)
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [5, 6])
def test_a_tied_weight_is_stored_once_in_its_own_width(bits: int, symmetric: bool) -> None:
    model = model_of(f"y = {product()} {lookup()}", "y e", constants(bits, symmetric=symmetric))
    before = outputs_of(model)
    assert packed(model) == Outcome(2)
    assert kinds(model) == ["QuantizedMatMul", "QuantizedGather"]
    found = {str(value.name): nbytes(value) for value in model.graph.initializers.values()}
    assert set(found) == {f"w.int{bits}", f"w.int{bits}.more", "s"} | (set() if symmetric else {"z"})
    assert sum(size for name, size in found.items() if name.startswith("w")) == WIDTH * WIDTH * bits // 8
    assert [node.overload for node in model.graph] == [f"bits{bits}" + ("" if symmetric else "_zero_points")] * 2
    onnx.checker.check_model(ir.to_proto(model))
    y, e = outputs_of(model)
    np.testing.assert_allclose(y, before[0], atol=1e-4)
    np.testing.assert_array_equal(e, before[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [5, 6])
def test_onnxruntime_makes_the_low_bits_of_products_once(bits: int, symmetric: bool, tmp_path: Path) -> None:
    model = model_of(f"y = {product()}", "y", constants(bits, symmetric=symmetric))
    assert packed(model) == Outcome(1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(options.optimized_model_filepath)
    assert [node.op_type for node in loaded.graph.node] == ["MatMulNBits", "MatMulNBits", "Add"]


def test_codes_of_eight_bits_stay() -> None:
    model = model_of(f"y = {product()} {lookup()}", "y e", constants(8, symmetric=False))
    assert packed(model) == Outcome()
    assert kinds(model) == ["QuantizedMatMul", "Reshape", "GatherBlockQuantized"]
    assert set(model.functions) == {("imsm", "QuantizedMatMul", "")}


def test_blocks_without_an_operator_stay() -> None:
    model = model_of(lookup(16), "e", constants(6, 16))
    assert packed(model) == Outcome(0, Counter({SMALL_BLOCKS.reason: 1}))
    assert kinds(model) == ["Reshape", "GatherBlockQuantized"]


def test_codes_that_something_else_reads_stay() -> None:
    lines = f"y = {product()} o = Cast<to = 1>(w) m = ReduceMax<keepdims = 0>(o) z2 = Add(m, x)"
    model = model_of(lines, "y z2", constants(6))
    before = outputs_of(model)
    assert packed(model) == Outcome(0, Counter({READ_OTHERWISE.reason: 1}))
    for new, old in zip(outputs_of(model), before, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-4)


@pytest.mark.parametrize(("other", "fused"), [(5, True), (6, False)])
def test_swiglu_needs_one_width(other: int, fused: bool) -> None:
    lines = f"""gate = {product()} up = {product("2")}
        active = com.microsoft.QuickGelu<alpha=1.0>(gate) y = Mul(active, up)"""
    model = model_of(lines, "y", constants(5) | constants(other, name="2"))
    before = outputs_of(model)
    assert packed(model) == Outcome(2)
    expected = Outcome(1) if fused else Outcome(0, Counter({OTHER_FORM.reason: 1}))
    assert fuse_quantized_swiglu(model) == expected
    assert kinds(model)[0] == ("QuantizedSwiGLU" if fused else "QuantizedMatMul")
    np.testing.assert_allclose(outputs_of(model)[0], before[0], atol=2e-3)
