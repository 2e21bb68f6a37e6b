"""Block-wise weights of 4, 5, 6 and 8 bits: what is packed is what onnxruntime's MatMulNBits multiplies with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.quantization.weight_format import (
    WIDTHS,
    QuantizedWeight,
    dequantize,
    in_bytes,
    pack,
    round_to_nearest,
    rounded_blocks,
    split,
    unpacked_codes,
    unpacked_zero_points,
)
from imsm_core.errors import SettingsError

Array = NDArray[Any]
CHANNELS = 24


def matmul_nbits(inputs: Array, weight: QuantizedWeight) -> Array:
    """inputs: (rows, K) -> (rows, N), by a graph of one MatMulNBits node that computes in float32. Codes of 5 and 6
    bits are bytes there."""
    weight = weight if weight.more is None else in_bytes(weight)
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
@pytest.mark.parametrize("bits", WIDTHS)
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
@pytest.mark.parametrize("bits", WIDTHS)
def test_no_value_is_off_by_more_than_a_step(bits: int, symmetric: bool) -> None:
    weight = random_weight(172)
    found = round_to_nearest(weight, bits, 32, symmetric)
    steps = np.abs(found.scales).repeat(32, axis=1)[:, :172]
    assert (np.abs(dequantize(found, 172) - weight) <= steps + 1e-6).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_arrays_have_the_operators_shapes_and_are_contiguous(bits: int, symmetric: bool) -> None:
    found = round_to_nearest(random_weight(100), bits, 32, symmetric)
    assert found.packed.shape == (CHANNELS, 4, 32 if bits == 8 else 16)
    assert (found.more is None) == (bits in (4, 8))
    if found.more is not None:
        assert found.more.shape == (CHANNELS, 1, 16 * (bits - 4))
    assert found.scales.shape == (CHANNELS, 4)
    assert found.scales.dtype == np.float32
    assert found.block_size == 32
    if symmetric:
        assert found.zero_points is None
    else:
        assert found.zero_points is not None
        assert found.zero_points.shape == (CHANNELS, 2 if bits == 4 else 4)
    for array in (found.packed, found.scales, dequantize(found, 100), in_bytes(found).packed, found.more):
        if array is None:
            continue
        assert array.flags.c_contiguous


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_symmetric_weight_is_a_fixed_point_of_rounding(bits: int, block_size: int) -> None:
    once = round_to_nearest(random_weight(300), bits, block_size, True)
    twice = round_to_nearest(dequantize(once, 300), bits, block_size, True)
    np.testing.assert_array_equal(dequantize(twice, 300), dequantize(once, 300))
    np.testing.assert_array_equal(twice.scales, once.scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_rule_for_any_width_is_onnxruntimes(bits: int, symmetric: bool) -> None:
    weight = random_weight(320)
    weight[3:9] = np.round(weight[3:9] * 4) / 4  # halves between two codes
    weight[9, ::2], weight[9, 1::2] = 1, -1
    expected = round_to_nearest(weight, bits, 32, symmetric)
    codes, scales, points = rounded_blocks(weight.reshape(CHANNELS, -1, 32), bits, symmetric)
    np.testing.assert_array_equal(codes, unpacked_codes(expected))
    np.testing.assert_array_equal(scales, expected.scales)
    np.testing.assert_array_equal(points, unpacked_zero_points(expected))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [5, 6])
def test_a_block_too_small_to_scale_is_zero(bits: int, symmetric: bool) -> None:
    weight = random_weight(64)
    weight[3, :32] = np.linspace(-1e-40, 1e-40, 32)
    found = dequantize(round_to_nearest(weight, bits, 32, symmetric), 64)
    assert not found[3, :32].any()
    assert found[3, 32:].any()


@pytest.mark.parametrize("bits", [5, 6])
def test_where_the_low_bits_of_a_code_are(bits: int) -> None:
    extra = bits - 4
    for place in (0, 1, 14, 17, 31, 32, 45, 127, 128, 159):
        for bit in range(extra):
            codes = np.zeros((1, 5, 32), np.uint8)
            codes.flat[place] = 1 << bit
            packed, more = split(codes, bits)
            assert not packed.any()
            assert more is not None
            assert more.shape == (1, 2, 16 * extra)
            group, inside = divmod(place, 128)
            number, odd = divmod(inside, 2)
            field, byte = divmod(number, 8 * extra)
            assert more[0, group, 8 * extra * odd + byte] == 1 << bit + extra * field
            assert np.count_nonzero(more) == 1


@pytest.mark.parametrize("with_zero_points", [True, False])
@pytest.mark.parametrize(("blocks", "block_size"), [(3, 16), (3, 32), (2, 64), (1, 128)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_hold_the_same_codes(bits: int, blocks: int, block_size: int, with_zero_points: bool) -> None:
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 2**bits, (CHANNELS, blocks, block_size), np.uint8)
    points = generator.integers(0, 2**bits, (CHANNELS, blocks), np.uint8) if with_zero_points else None
    weight = pack(codes, np.ones((CHANNELS, blocks), np.float32), points, bits)
    assert weight.block_size == block_size
    np.testing.assert_array_equal(unpacked_codes(weight), codes)
    found = in_bytes(weight)
    np.testing.assert_array_equal(found.packed, codes)
    np.testing.assert_array_equal(
        found.zero_points, np.full_like(codes[..., 0], 1 << bits - 1) if points is None else points
    )
    assert (found.bits, found.block_size, found.more) == (8, block_size, None)


@pytest.mark.parametrize("with_zero_points", [True, False])
@pytest.mark.parametrize("blocks", [2, 3])
@pytest.mark.parametrize("bits", WIDTHS)
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
