"""Scales and zero points that round a weight with the least error, weighted by what its inputs are.

The error of an output is about sum_k m_k (w_k - q_k)^2 for the second moments m_k of the inputs, which llama.cpp's
"importance matrix" weighs its blocks with too. The largest value of a block, which rounding to nearest always meets, is
clipped where that makes the others finer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

_CLIPPED = {4: (0.72, 1.12, 11), 5: (0.84, 1.08, 7), 6: (0.91, 1.03, 5), 8: (1.0, 1.0, 1)}
"""By bits: the smallest and the largest share of a block's range that is tried, and how many of them. 1 is among them,
as in rounding to nearest."""
_REFINED = 2
_IN_HALF = 2.0**-13, 2.0**15
"""Between which a matrix' largest scale must be for its scales to be float16's, whose normal numbers begin at 2^-14."""
_AT_ONCE = 2**18  # weights whose arrays stay in a processor's cache


def find_scales(weight: Tensor, moments: Tensor, bits: int, block_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points, both (N, blocks) float32: scales are float16's values, unless it does not hold the
    matrix' scales, and 1 for a block of zeros; zero points are whole numbers, 2 ** (bits - 1) if `symmetric`.

    weight: (N, K) float32. moments: (K,) of any scale, the second moments of the inputs; those that are 0 count as
    the mean. What is found first is fitted to its codes by least squares.
    """
    padding = (0, -weight.shape[1] % block_size)
    moments = torch.where(moments > 0, moments, moments.mean().clamp(min=torch.finfo(torch.float32).tiny))
    shares = functional.pad(moments, padding).unflatten(0, (-1, block_size))
    rows = max(1, _AT_ONCE // weight.shape[1])
    half = _IN_HALF[0] < float(weight.abs().max()) / (1 << bits - 1) < _IN_HALF[1]
    parts = [
        _of_some_rows(functional.pad(part, padding).unflatten(1, (-1, block_size)), shares, bits, symmetric, half)
        for part in weight.split(rows)
    ]
    return torch.cat([scales for scales, _ in parts]), torch.cat([points for _, points in parts])


def _of_some_rows(blocks: Tensor, shares: Tensor, bits: int, symmetric: bool, half: bool) -> tuple[Tensor, Tensor]:
    best: tuple[Tensor, ...] | None = None
    for scale, point in _candidates(blocks, bits, symmetric):
        best = _better(best, _tried(blocks, shares, scale, point, bits, half))
    assert best is not None
    for _ in range(_REFINED):
        _, _, point, codes = best
        centred = codes - point
        size = (shares * centred.square()).sum(-1, keepdim=True)
        fitted = (shares * blocks * centred).sum(-1, keepdim=True) / size
        best = _better(best, _tried(blocks, shares, torch.where(size > 0, fitted, 1.0), point, bits, half))
    return best[1].squeeze(-1), best[2].squeeze(-1)


def round_codes(values: Tensor, scale: Tensor, point: Tensor, bits: int) -> Tensor:
    """The nearest codes, whole numbers from 0 to 2 ** bits - 1 in float32; all arguments are broadcast."""
    return (values / scale + point).round_().clamp_(0, 2**bits - 1)


def _candidates(blocks: Tensor, bits: int, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points (N, blocks, 1)."""
    first, last, count = _CLIPPED[bits]
    shares = [round(share, 3) for share in torch.linspace(first, last, count).tolist()]
    half = 1 << bits - 1
    low, high = (blocks.amin(-1, keepdim=True).clamp_(max=0), blocks.amax(-1, keepdim=True).clamp_(min=0))
    if symmetric:
        largest = torch.where(high > -low, high, low)
        middle = torch.full_like(largest, half)
        # The lowest code is one further from the middle than the highest: the largest value may be on either side.
        for sign in (-1, 1) if bits == 4 else (-1,):
            for share in shares:
                yield largest * (sign * share / half), middle
        return
    for share in shares:
        scale = (high - low) * (share / (2 * half - 1))
        yield scale, (-low * share / torch.where(scale == 0, 1.0, scale)).round_().clamp_(0, 2 * half - 1)


def _tried(blocks: Tensor, shares: Tensor, scale: Tensor, point: Tensor, bits: int, half: bool) -> tuple[Tensor, ...]:
    """Error, scale, zero point and codes."""
    scale = scale.half().float() if half else scale
    scale = torch.where((scale == 0) | ~scale.isfinite(), 1.0, scale)
    codes = round_codes(blocks, scale, point, bits)
    error = (shares * (blocks - (codes - point) * scale).square()).sum(-1, keepdim=True)
    return error, scale, point, codes


def _better(best: tuple[Tensor, ...] | None, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if best is None:
        return found
    wins = found[0] < best[0]
    return tuple(torch.where(wins, new, old) for new, old in zip(found, best, strict=True))
