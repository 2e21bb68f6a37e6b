"""A weight in blocks of 4, 5, 6 or 8 bits, and rounding to it.

Each output channel's K inputs are cut into blocks of `block_size`, the last one padded. A block has one scale and one
zero point: value = (code - zero point) * scale. 4 and 8 bits are laid out as in onnxruntime's
com.microsoft.MatMulNBits; of 5 and 6 bits the high four are laid out as 4 bits, and the low ones are another array.
Knows nothing about graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits  # as its own quantizer does

from imsm_core.choices import check_block_size

from ..errors import ExportError

Array = NDArray[Any]
WIDTHS = (4, 5, 6, 8)
"""Bits that a weight can have."""
TOGETHER = 128
"""Weights whose low bits are stored together, where there are 5 or 6."""
_OWN_ROUNDING: dict[int, Callable[..., Any]] = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}


@dataclass(frozen=True)
class QuantizedWeight:
    """N output channels, and ceil(K / block_size) blocks of inputs.

    packed: (N, blocks, block_size * bits / 8) uint8; of 4 bits two codes a byte, the earlier one in the low half. Of 5
    and 6 bits (N, blocks, block_size / 2), the high four bits of each code in the same way.
    scales: (N, blocks) float32; they may be negative. zero_points: (N, ceil(blocks / 2)) uint8 of 4 bits, packed in
    the same way, otherwise (N, blocks); None is 2 ** (bits - 1) everywhere.
    more: of 5 and 6 bits the low bits, as `split` makes them; else None.
    """

    packed: Array
    scales: Array
    zero_points: Array | None
    bits: int
    more: Array | None = None

    @property
    def block_size(self) -> int:
        """Inputs that share a scale."""
        return int(self.packed.shape[2]) * (1 if self.bits == 8 else 2)

    @property
    def nbytes(self) -> int:
        """Bytes of all of its arrays but the scales."""
        arrays = (self.packed, self.zero_points, self.more)
        return sum(array.nbytes for array in arrays if array is not None)


def round_to_nearest(weight: Array, bits: int, block_size: int, symmetric: bool) -> QuantizedWeight:
    """weight: (N, K) float32, as PyTorch's Linear stores it. By onnxruntime's own rounding, and by its rule for 5 and 6
    bits: each block's value of the largest magnitude (symmetric), or both of its ends and zero (asymmetric), are met.

    A symmetric result is a fixed point: rounding its values again gives the same codes and scales. Raises ExportError
    and SettingsError as `check_format`, and ExportError for values that are not finite.
    """
    check_format(bits, block_size)
    if not np.isfinite(weight).all():
        raise ExportError("a weight with values that are not finite cannot be quantized")
    channels, inputs = weight.shape
    blocks = -(-inputs // block_size)
    if bits not in _OWN_ROUNDING:
        padded = np.zeros((channels, blocks * block_size), np.float32)
        padded[:, :inputs] = weight
        codes, scales, points = rounded_blocks(padded.reshape(channels, blocks, block_size), bits, symmetric)
        return pack(codes, scales, None if symmetric else points, bits)
    packed = np.zeros((channels, blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros((channels, blocks), np.float32)
    zero_points = np.zeros((channels, -(-blocks * bits // 8)), np.uint8)
    columns = np.zeros((blocks * block_size, channels), np.float32)  # onnxruntime reads (K, N)
    columns[:inputs] = weight.T
    _OWN_ROUNDING[bits](packed, columns, scales, zero_points, block_size, channels, inputs, symmetric)
    return QuantizedWeight(packed, scales, None if symmetric else zero_points, bits)


def rounded_blocks(blocks: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """onnxruntime's rule of rounding (BlockwiseQuantizer, onnxruntime/core/mlas/lib/q4_dq.cpp) for any width.

    blocks: (N, blocks, block_size) float32; returns codes of the same shape, scales and zero points (N, blocks), all
    float32. A block of zeros has the scale 0.
    """
    lowest, highest = blocks.min(-1), blocks.max(-1)
    if symmetric:
        scales = np.where(np.abs(highest) > np.abs(lowest), highest, lowest) / np.float32(-(1 << bits - 1))
    else:
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
        scales = (highest - lowest) / np.float32(2**bits - 1)
    with np.errstate(divide="ignore", over="ignore"):
        factors = 1 / scales
    usable = np.isfinite(factors)  # not where all are zero, or as small as numbers get
    scales, factors = np.where(usable, scales, 0), np.where(usable, factors, 0)
    if symmetric:
        points = np.full_like(scales, 1 << bits - 1)
    else:
        points = _rounded(np.divide(-lowest, scales, out=np.zeros_like(scales), where=usable), bits)
    codes = _rounded(blocks * factors[..., None] + points[..., None], bits)
    return codes, scales, points


def _rounded(values: Array, bits: int) -> Array:
    """The nearest codes, halves away from zero as C's roundf."""
    rounded: Array = np.clip(np.trunc(values + np.copysign(np.float32(0.5), values)), 0, 2**bits - 1)
    return rounded


def pack(codes: Array, scales: Array, zero_points: Array | None, bits: int) -> QuantizedWeight:
    """codes: (N, blocks, block_size) integers of 0 .. 2 ** bits - 1; scales: (N, blocks); zero_points: like the scales,
    integers; None if they are all 2 ** (bits - 1). Keeps the scales as they are given."""
    channels, blocks, _ = codes.shape
    packed, more = split(codes.astype(np.uint8), bits)
    if zero_points is not None:
        zero_points = zero_points.astype(np.uint8)
        if bits == 4:
            zero_points = _nibbles(np.pad(zero_points, ((0, 0), (0, blocks % 2))))
    return QuantizedWeight(packed, scales.astype(np.float32).reshape(channels, blocks), zero_points, bits, more)


def dequantize(weight: QuantizedWeight, inputs: int) -> Array:
    """(N, K) float32, for K = `inputs`: the values that MatMulNBits multiplies with."""
    codes = unpacked_codes(weight).astype(np.float32)
    values = (codes - unpacked_zero_points(weight)[..., None]) * weight.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(values), -1)[:, :inputs])


def unpacked_codes(weight: QuantizedWeight) -> Array:
    """(N, blocks, block_size) uint8."""
    if weight.bits == 8:
        return weight.packed
    codes = _halves(weight.packed)
    if weight.more is None:
        return codes
    extra, (channels, groups, _) = weight.bits - 4, weight.more.shape
    fields = weight.more.reshape(channels, groups, 2, 1, -1) >> _places(extra) & (1 << extra) - 1
    flat = fields.reshape(channels, groups, 2, -1).swapaxes(2, 3).reshape(channels, -1)[:, : codes[0].size]
    return codes << extra | flat.reshape(codes.shape)


def unpacked_zero_points(weight: QuantizedWeight) -> Array:
    """(N, blocks) float32 whole numbers."""
    if weight.zero_points is None:
        return np.full(weight.scales.shape, 1 << weight.bits - 1, np.float32)
    points = _halves(weight.zero_points) if weight.bits == 4 else weight.zero_points
    return points[:, : weight.scales.shape[1]].astype(np.float32)


def in_bytes(weight: QuantizedWeight) -> QuantizedWeight:
    """The same values in 8 bits: each code and zero point is a byte, and none is larger than before."""
    if weight.bits == 8 and weight.zero_points is not None:
        return weight
    points = np.ascontiguousarray(unpacked_zero_points(weight).astype(np.uint8))
    return QuantizedWeight(np.ascontiguousarray(unpacked_codes(weight)), weight.scales, points, 8)


def split(codes: Array, bits: int) -> tuple[Array, Array | None]:
    """`packed` and `more` of codes (N, blocks, block_size) uint8.

    more: (N, ceil(blocks * block_size / 128), 16 * extra) uint8, with the low extra = bits - 4 bits of each code. For
    each 128 weights 8 * extra bytes are of the 64 even ones, and as many of the odd ones. A byte holds 8 / extra
    fields, the first one in the lowest bits: field f of byte b is of number 8 * extra * f + b of those.
    """
    if bits == 8:
        return np.ascontiguousarray(codes), None
    extra = bits - 4
    packed = _nibbles(codes >> extra)
    if not extra:
        return packed, None
    flat = codes.reshape(len(codes), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % TOGETHER)))
    apart = flat.reshape(len(codes), -1, TOGETHER // 2, 2).swapaxes(2, 3) & (1 << extra) - 1  # evens, then odds
    fields = apart.reshape(*apart.shape[:3], 8 // extra, -1) << _places(extra)
    more = np.bitwise_or.reduce(fields, axis=3)
    return packed, np.ascontiguousarray(more.reshape(*more.shape[:2], -1))


def _places(extra: int) -> Array:
    """Where a byte's fields begin, as a column."""
    return np.arange(0, 8, extra, dtype=np.uint8)[:, None]


def check_format(bits: int, block_size: int) -> None:
    """Raise ExportError for a width that no weight has, SettingsError for a block size that MatMulNBits does not
    take."""
    if bits not in WIDTHS:
        raise ExportError(f"weights of {bits} bits cannot be packed; choose one of {', '.join(map(str, WIDTHS))}")
    check_block_size(block_size)


def _nibbles(codes: Array) -> Array:
    """Two codes of four bits a byte, the earlier one in the low half."""
    return np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)


def _halves(packed: Array) -> Array:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
