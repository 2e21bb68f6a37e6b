"""GPTQ: rounding a weight with what its inputs are.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) quantizes a weight one input at a time and lets the inputs that are left
make up for the error, weighted by H = sum x x^T over calibration inputs x. Inputs are taken in the order of their size
(`act-order`), into blocks whose scales were found before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .scales import find_scales, round_codes
from .weight_format import Array, QuantizedWeight, check_format, pack

DAMPING = 0.05
"""Of the mean of H's diagonal. The paper has 0.01; on SmolLM2 with 4,096 tokens in 4 bits the KL is 0.125 with that and
0.114 with this."""
_AT_ONCE = 64  # inputs whose errors reach the rest together, as in the paper's lazy batches
_SMALL = 2**26  # elements that are worked on together: three float32 arrays of them fit anywhere


def gptq(
    weight: Array, hessian: Array, widths: Sequence[int], block_size: int, symmetric: bool
) -> dict[int, QuantizedWeight]:
    """The weight in each of these widths. weight: (N, K) float32; hessian: (K, K), of any scale, not all zeros. Scales
    are those of `find_scales`. Raises ExportError and SettingsError as `check_format`."""
    for bits in widths:
        check_format(bits, block_size)
    order, factor = _inverse_factor(hessian)
    moments = torch.from_numpy(np.ascontiguousarray(hessian.diagonal()))
    rows = max(1, _SMALL // (weight.shape[1] * len(widths)))
    parts = [
        _part(torch.from_numpy(weight[start : start + rows]), moments, order, factor, widths, block_size, symmetric)
        for start in range(0, len(weight), rows)
    ]
    found = {}
    for bits, of_all_rows in zip(widths, zip(*parts, strict=True), strict=True):
        codes, scales, points = (np.concatenate(arrays) for arrays in zip(*of_all_rows, strict=True))
        found[bits] = pack(codes, scales, None if symmetric else points, bits)
    return found


def _part(
    weight: Tensor,
    moments: Tensor,
    order: Tensor,
    factor: Tensor,
    widths: Sequence[int],
    block_size: int,
    symmetric: bool,
) -> list[tuple[Array, Array, Array]]:
    """Codes, scales and zero points of some rows for each width, all of them rounded side by side."""
    channels, inputs = weight.shape
    found = [find_scales(weight, moments, bits, block_size, symmetric) for bits in widths]
    left = weight.T[order].repeat(1, len(widths))  # (K, widths * N): row k is what all outputs have for an input
    tops = torch.tensor(widths).exp2().sub(1).repeat_interleave(channels)
    scales, points = (torch.cat([pair[which].T for pair in found], 1) for which in (0, 1))  # (blocks, widths * N)
    block_of = order // block_size
    codes = torch.empty(inputs, len(widths) * channels)
    for start in range(0, inputs, _AT_ONCE):
        end = min(start + _AT_ONCE, inputs)
        part = left[start:end]
        errors = torch.empty_like(part)
        for row in range(end - start):
            k = start + row
            scale, point = scales[block_of[k]], points[block_of[k]]
            code = torch.minimum((part[row] / scale + point).round_().clamp_(min=0), tops)
            codes[order[k]] = code
            errors[row] = (part[row] - (code - point) * scale) / factor[k, k]
            part[row + 1 :].addr_(factor[k, k + 1 : end], errors[row], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return [
        (_blocks(part, point, bits, block_size), scale.numpy(), point.numpy())
        for part, bits, (scale, point) in zip(codes.split(channels, 1), widths, found, strict=True)
    ]


def searched(weight: Array, moments: Array, bits: int, block_size: int, symmetric: bool) -> QuantizedWeight:
    """The weight (N, K) rounded to nearest with the scales of `find_scales`; moments: (K,)."""
    check_format(bits, block_size)
    values = torch.from_numpy(weight)
    scales, points = find_scales(values, torch.from_numpy(moments), bits, block_size, symmetric)
    block_of = torch.arange(values.shape[1]) // block_size
    codes = round_codes(values, scales[:, block_of], points[:, block_of], bits)
    return pack(_blocks(codes.T, points, bits, block_size), scales.numpy(), None if symmetric else points.numpy(), bits)


def _blocks(codes: Tensor, points: Tensor, bits: int, block_size: int) -> Array:
    """codes: (K, N) -> (N, blocks, block_size) uint8, padded with 2 ** (bits - 1)."""
    inputs, channels = codes.shape
    padded = torch.full((channels, points.shape[1] * block_size), 1 << bits - 1, dtype=torch.uint8)
    padded[:, :inputs] = codes.T
    shaped: Array = padded.view(channels, -1, block_size).numpy()
    return shaped


def _inverse_factor(hessian: Array) -> tuple[Tensor, Tensor]:
    """The order of inputs (K,), and (K, K) float32 upper triangular U with U^T U = the inverse of the damped H in that
    order."""
    moments = torch.from_numpy(hessian).double()
    diagonal = moments.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean  # an input that is always 0 in these texts: rounded to nearest
    diagonal += DAMPING * mean
    order = diagonal.argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments[order][:, order]))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return order, factor.float()
