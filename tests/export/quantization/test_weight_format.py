"""Block-wise int4 and int8 weights: what is packed is what onnxruntime's MatMulNBits multiplies with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.quantization.weight_format import QuantizedWeight, dequantize, pack, round_to_nearest
from imsm_core.errors import SettingsError

Array = NDArray[Any]
CHANNELS = 24


def matmul_nbits(inputs: Array, weight: QuantizedWeight) -> Array:
    """inputs: (rows, K) -> (rows, N), by a graph of one MatMulNBits node that computes in float32."""
    arrays = {"B": weight.packed, "scales": weight.scales}
    if weight.zero_points is not None:
        arrays["zero_points"] = weight.zero_points
    channels, width = len(weight.packed), inputs.shape[1]
    node = helper.make_node(
        "MatMulNBits",
        ["A", *arrays],
        ["Y"],
        domain="com.microsoft",
        K=width,
        N=channels,
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=1,
    )
    graph = helper.make_graph(
        [node],
        "one node",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None, channels])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    output: Array = session.run(None, {"A": inputs})[0]
    return output


def random_weight(width: int, seed: int = 0) -> Array:
    """(CHANNELS, width), with a channel of zeros, one of a single sign, and one far larger than the rest."""
    weight = np.random.default_rng(seed).normal(size=(CHANNELS, width)).astype(np.float32)
    weight[0] = 0
    weight[1] = np.abs(weight[1])
    weight[2] *= 1000
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block_size"), [(64, 32), (172, 32), (100, 64), (128, 128), (300, 128), (40, 16)])
def test_onnxruntime_multiplies_with_the_dequantized_values(
    width: int, block_size: int, bits: int, symmetric: bool
) -> None:
    weight = round_to_nearest(random_weight(width), bits, block_size, symmetric)
    inputs = np.random.default_rng(1).normal(size=(3, width)).astype(np.float32)
    expected = inputs.astype(np.float64) @ dequantize(weight, width).T.astype(np.float64)
    np.testing.assert_allclose(matmul_nbits(inputs, weight), expected, rtol=1e-4, atol=2e-3)
    np.testing.assert_allclose(matmul_nbits(inputs, weight)[:, 3:], expected[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_off_by_more_than_a_step(bits: int, symmetric: bool) -> None:
    weight = random_weight(172)
    found = round_to_nearest(weight, bits, 32, symmetric)
    steps = np.abs(found.scales).repeat(32, axis=1)[:, :172]
    assert (np.abs(dequantize(found, 172) - weight) <= steps + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_arrays_have_the_operators_shapes_and_are_contiguous(bits: int, symmetric: bool) -> None:
    found = round_to_nearest(random_weight(100), bits, 32, symmetric)
    assert found.packed.shape == (CHANNELS, 4, 4 * bits)
    assert found.scales.shape == (CHANNELS, 4)
    assert found.scales.dtype == np.float32
    assert found.block_size == 32
    if symmetric:
        assert found.zero_points is None
    else:
        assert found.zero_points is not None
        assert found.zero_points.shape == (CHANNELS, 4 * bits // 8)
    for array in (found.packed, found.scales, dequantize(found, 100)):
        assert array.flags.c_contiguous


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_symmetric_weight_is_a_fixed_point_of_rounding(bits: int, block_size: int) -> None:
    once = round_to_nearest(random_weight(300), bits, block_size, True)
    twice = round_to_nearest(dequantize(once, 300), bits, block_size, True)
    np.testing.assert_array_equal(dequantize(twice, 300), dequantize(once, 300))
    np.testing.assert_array_equal(twice.scales, once.scales)


@pytest.mark.parametrize("with_zero_points", [True, False])
@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_given_codes_scales_and_zero_points(bits: int, blocks: int, with_zero_points: bool) -> None:
    generator = np.random.default_rng(2)
    codes = generator.integers(0, 2**bits, (CHANNELS, blocks, 32))
    scales = generator.normal(size=(CHANNELS, blocks)).astype(np.float32)
    points = generator.integers(0, 2**bits, (CHANNELS, blocks)) if with_zero_points else None
    weight = pack(codes, scales, points, bits)
    offsets = np.full_like(codes[..., 0], 2 ** (bits - 1)) if points is None else points
    expected = ((codes - offsets[..., None]) * scales[..., None]).reshape(CHANNELS, -1)
    np.testing.assert_allclose(dequantize(weight, blocks * 32), expected, rtol=1e-6)
    inputs = generator.normal(size=(2, blocks * 32)).astype(np.float32)
    np.testing.assert_allclose(matmul_nbits(inputs, weight), inputs @ expected.T, rtol=1e-4, atol=bits * 1e-3)


@pytest.mark.parametrize(("bits", "block_size", "message"), [(3, 32, "3 bits"), (4, 48, "48"), (4, 8, "8")])
def test_what_the_operator_does_not_have_is_refused(bits: int, block_size: int, message: str) -> None:
    with pytest.raises((ExportError, SettingsError), match=message):
        round_to_nearest(random_weight(64), bits, block_size, True)


def test_values_that_are_not_finite_are_refused() -> None:
    weight = random_weight(64)
    weight[3, 5] = np.nan
    with pytest.raises(ExportError, match="not finite"):
        round_to_nearest(weight, 4, 32, True)
