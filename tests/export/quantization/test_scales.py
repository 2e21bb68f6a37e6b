"""Scales of least error: never above rounding to nearest, exact where a weight lies on a grid, values of float16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from export.quantization.scales import find_scales, round_codes
from export.quantization.weight_format import dequantize, round_to_nearest

WIDTHS = (4, 5, 6, 8)


def rounded(weight: Tensor, moments: Tensor, bits: int, block: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and zero points."""
    scales, points = find_scales(weight, moments, bits, block, symmetric)
    of = torch.arange(weight.shape[1]) // block
    codes = round_codes(weight, scales[:, of], points[:, of], bits)
    return (codes - points[:, of]) * scales[:, of], scales, points


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("width", "block"), [(96, 32), (70, 32), (100, 64)])
def test_the_weighted_error_is_never_above_that_of_rounding_to_nearest(
    width: int, block: int, bits: int, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, width, generator=generator)
    weight[::7, ::5] *= 6
    moments = torch.rand(width, generator=generator) ** 4 + 1e-3
    found, scales, points = rounded(weight, moments, bits, block, symmetric)
    blocks = -(-width // block)
    assert scales.shape == points.shape == (50, blocks)
    assert scales.dtype == points.dtype == torch.float32
    assert torch.equal(scales, scales.half().float())
    assert (points == points.round()).all()
    assert points.min() >= 0
    assert points.max() < 2**bits
    if symmetric:
        assert (points == 2 ** (bits - 1)).all()
    plain = round_to_nearest(weight.numpy(), bits, block, symmetric)
    in_half = replace(plain, scales=plain.scales.astype(np.float16).astype(np.float32))
    nearest = torch.from_numpy(dequantize(in_half, width))
    padding = (0, blocks * block - width)

    def errors(values: Tensor) -> Tensor:
        weighted = torch.nn.functional.pad(moments * (weight - values).square(), padding)
        sums: Tensor = weighted.unflatten(1, (-1, block)).sum(-1)
        return sums

    assert (errors(found) <= (1 + 1e-4) * errors(nearest)).all()
    if bits < 8:
        assert errors(found).sum() < 0.97 * errors(nearest).sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_weight_on_a_grid_is_exact(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (20, 64), generator=generator).float()
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    point = 2.0 ** (bits - 1) if symmetric else 3.0
    scales = torch.tensor([0.25, 0.0078125])[torch.arange(64) // 32]
    weight = (codes - point) * scales
    found, *_ = rounded(weight, torch.ones(64), bits, 32, symmetric)
    torch.testing.assert_close(found, weight, rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_zeros_and_of_values_too_small_for_float16_get_a_scale_of_1(symmetric: bool) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[0, :32], weight[1, 32:] = 0, 1e-12
    for bits in WIDTHS:
        found, scales, _ = rounded(weight, torch.ones(64), bits, 32, symmetric)
        assert scales[0, 0] == scales[1, 1] == 1
        assert not found[0, :32].any()
        assert not found[1, 32:].any()
        assert found.isfinite().all()


def test_inputs_that_are_always_zero_count_as_the_mean() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    alike = find_scales(weight, torch.ones(40), 4, 32, True)
    for moments in (torch.zeros(40), torch.cat([torch.full((32,), 2.0), torch.zeros(8)])):
        for found, expected in zip(find_scales(weight, moments, 4, 32, True), alike, strict=True):
            assert torch.equal(found, expected)


def test_many_rows_are_taken_in_parts_of_equal_results(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(0))
    whole = find_scales(weight, torch.ones(64), 5, 32, False)
    monkeypatch.setattr("export.quantization.scales._AT_ONCE", 64 * 4)
    for found, expected in zip(find_scales(weight, torch.ones(64), 5, 32, False), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_scales_that_float16_does_not_hold_stay_float32(size: float) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    plain, _ = find_scales(weight, torch.ones(64), 4, 32, True)
    found, _ = find_scales(weight * size, torch.ones(64), 4, 32, True)
    torch.testing.assert_close(found / size, plain, rtol=5e-3, atol=0)
