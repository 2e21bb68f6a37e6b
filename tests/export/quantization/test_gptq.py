"""GPTQ: the error of a layer's output on unseen inputs falls, in every width by itself as in all of them together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.quantization.gptq import gptq, searched
from export.quantization.weight_format import QuantizedWeight, dequantize, round_to_nearest
from imsm_core.errors import SettingsError
from tests.export.quantization.test_weight_format import matmul_nbits

Array = NDArray[Any]
WIDTHS = (4, 5, 6, 8)


def correlated_inputs(rows: int, width: int, seed: int) -> Array:
    """(rows, width) float32, as activations are: of a few directions and some noise; the seed changes the rows."""
    directions = np.random.default_rng(100).normal(size=(width // 4, width))
    generator = np.random.default_rng(seed)
    inputs: Array = generator.normal(size=(rows, width // 4)) @ directions + 0.3 * generator.normal(size=(rows, width))
    return inputs.astype(np.float32)


def random_weight(rows: int, width: int) -> Array:
    return np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)


def error(weight: Array, found: QuantizedWeight, inputs: Array) -> float:
    return float(np.square(inputs @ (weight - dequantize(found, weight.shape[1])).T).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "block_size"), [(96, 32), (172, 64), (300, 128)])
def test_the_error_on_unseen_inputs_falls_from_nearest_to_searched_to_gptq(
    width: int, block_size: int, symmetric: bool
) -> None:
    weight = random_weight(24, width)
    inputs, unseen = correlated_inputs(800, width, 1), correlated_inputs(200, width, 2)
    hessian = inputs.T @ inputs
    found = gptq(weight, hessian, WIDTHS, block_size, symmetric)
    assert list(found) == list(WIDTHS)
    for bits in WIDTHS:
        assert found[bits].bits == bits
        nearest = error(weight, round_to_nearest(weight, bits, block_size, symmetric), unseen)
        scaled = error(weight, searched(weight, hessian.diagonal().copy(), bits, block_size, symmetric), unseen)
        assert error(weight, found[bits], unseen) < 0.8 * min(scaled, nearest)
        assert scaled < 1.02 * nearest
    for bits in (4, 8):
        expected = unseen @ dequantize(found[bits], width).T
        np.testing.assert_allclose(matmul_nbits(unseen, found[bits]), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_error_reaches_the_inputs_of_its_own_batch(symmetric: bool) -> None:
    weight, inputs, unseen = random_weight(24, 64), correlated_inputs(800, 64, 1), correlated_inputs(200, 64, 2)
    hessian = inputs.T @ inputs
    for bits, found in gptq(weight, hessian, WIDTHS, 32, symmetric).items():
        scaled = searched(weight, hessian.diagonal().copy(), bits, 32, symmetric)
        assert error(weight, found, unseen) < 0.5 * error(weight, scaled, unseen)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [96, 100])
def test_widths_together_are_each_width_alone(width: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = random_weight(40, width), correlated_inputs(400, width, 1)
    together = gptq(weight, inputs.T @ inputs, WIDTHS, 32, symmetric)
    monkeypatch.setattr("export.quantization.gptq._SMALL", 7 * width)  # and a few rows at a time
    for bits in WIDTHS:
        alone = gptq(weight, inputs.T @ inputs, [bits], 32, symmetric)[bits]
        found, expected = (dequantize(each, width) for each in (together[bits], alone))
        # Products of other sizes may sum in another order, and a value at a border falls to its other side.
        assert (found == expected).all(1).mean() > 0.9
        assert np.abs(found - expected).max() <= 1.01 * together[bits].scales.max()


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_are_not_correlated_are_rounded_to_the_nearest_by_searched_scales(symmetric: bool) -> None:
    weight = random_weight(24, 100)
    weight[3, :32] = 0  # a block without a scale
    found = gptq(weight, np.eye(100, dtype=np.float32), (4, 6), 32, symmetric)
    for bits, each in found.items():
        expected = searched(weight, np.ones(100, np.float32), bits, 32, symmetric)
        np.testing.assert_array_equal(dequantize(each, 100), dequantize(expected, 100))


def test_an_input_that_the_texts_never_have_keeps_its_weight() -> None:
    weight, inputs = random_weight(24, 64), correlated_inputs(400, 64, 1)
    inputs[:, 5] = 0
    found = dequantize(gptq(weight, inputs.T @ inputs, [8], 32, True)[8], 64)
    np.testing.assert_allclose(found[:, 5], weight[:, 5], atol=0.05)


def test_the_hessian_stays_as_it_is_and_its_scale_does_not_matter() -> None:
    weight, inputs = random_weight(8, 64), correlated_inputs(100, 64, 1)
    inputs[:, 9] = 0
    hessian = inputs.T @ inputs
    before = hessian.copy()
    found = gptq(weight, hessian, [4], 32, True)[4]
    np.testing.assert_array_equal(hessian, before)
    scaled = gptq(weight, hessian * np.float32(2.0**-20), [4], 32, True)[4]
    np.testing.assert_array_equal(found.packed, scaled.packed)


def test_formats_that_are_none_are_refused() -> None:
    with pytest.raises(SettingsError, match="block_size is 31"):
        gptq(random_weight(4, 64), np.eye(64, dtype=np.float32), (4, 8), 31, True)
