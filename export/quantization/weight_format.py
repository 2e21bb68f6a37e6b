"""A weight in blocks of int4 or int8, in the layout of onnxruntime's com.microsoft.MatMulNBits, and rounding to it.

Each output channel's K inputs are cut into blocks of `block_size`, the last one padded. A block has one scale and one
zero point: value = (code - zero point) * scale. Knows nothing about graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits  # as its own quantizer does

from imsm_core.choices import check_block_size

from ..errors import ExportError

Array = NDArray[Any]
_ROUNDING = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}


@dataclass(frozen=True)
class QuantizedWeight:
    """N output channels, and ceil(K / block_size) blocks of inputs.

    packed: (N, blocks, block_size * bits / 8) uint8; of int4 two codes a byte, the earlier one in the low half.
    scales: (N, blocks) float32; they may be negative. zero_points: (N, ceil(blocks * bits / 8)) uint8, packed in
    the same way; None is 2 ** (bits - 1) everywhere.
    """

    packed: Array
    scales: Array
    zero_points: Array | None
    bits: int

    @property
    def block_size(self) -> int:
        """Inputs that share a scale."""
        return int(self.packed.shape[2]) * 8 // self.bits


def round_to_nearest(weight: Array, bits: int, block_size: int, symmetric: bool) -> QuantizedWeight:
    """weight: (N, K) float32, as PyTorch's Linear stores it. By onnxruntime's own rounding: each block's value of the
    largest magnitude (symmetric), or both of its ends and zero (asymmetric), are met.

    A symmetric result is a fixed point: rounding its values again gives the same codes and scales. Raises ExportError
    and SettingsError as `check_format`, and ExportError for values that are not finite.
    """
    check_format(bits, block_size)
    if not np.isfinite(weight).all():
        raise ExportError("a weight with values that are not finite cannot be quantized")
    channels, inputs = weight.shape
    blocks = -(-inputs // block_size)
    packed = np.zeros((channels, blocks, block_size * bits // 8), np.uint8)
    scales = np.zeros((channels, blocks), np.float32)
    zero_points = np.zeros((channels, -(-blocks * bits // 8)), np.uint8)
    columns = np.zeros((blocks * block_size, channels), np.float32)  # onnxruntime reads (K, N)
    columns[:inputs] = weight.T
    _ROUNDING[bits](packed, columns, scales, zero_points, block_size, channels, inputs, symmetric)
    return QuantizedWeight(packed, scales, None if symmetric else zero_points, bits)


def pack(codes: Array, scales: Array, zero_points: Array | None, bits: int) -> QuantizedWeight:
    """codes: (N, blocks, block_size) integers of 0 .. 2 ** bits - 1; scales: (N, blocks); zero_points: like the scales,
    integers; None if they are all 2 ** (bits - 1). Keeps the scales as they are given."""
    channels, blocks, _ = codes.shape
    packed_points = None
    if zero_points is not None:
        odd = blocks % (8 // bits)
        packed_points = _pack(np.pad(zero_points, ((0, 0), (0, odd))), bits)
    return QuantizedWeight(_pack(codes, bits), scales.astype(np.float32).reshape(channels, blocks), packed_points, bits)


def dequantize(weight: QuantizedWeight, inputs: int) -> Array:
    """(N, K) float32, for K = `inputs`: the values that MatMulNBits multiplies with."""
    codes = _unpack(weight.packed, weight.bits).astype(np.float32)
    values = (codes - unpacked_zero_points(weight)[..., None]) * weight.scales[..., None]
    return np.ascontiguousarray(values.reshape(len(values), -1)[:, :inputs])


def unpacked_zero_points(weight: QuantizedWeight) -> Array:
    """(N, blocks) float32 whole numbers."""
    if weight.zero_points is None:
        return np.full(weight.scales.shape, 1 << weight.bits - 1, np.float32)
    return _unpack(weight.zero_points, weight.bits)[:, : weight.scales.shape[1]].astype(np.float32)


def check_format(bits: int, block_size: int) -> None:
    """Raise ExportError for a width that MatMulNBits does not take, SettingsError for such a block size."""
    if bits not in _ROUNDING:
        raise ExportError(f"weights of {bits} bits cannot be packed; choose {' or '.join(map(str, _ROUNDING))}")
    check_block_size(block_size)


def _pack(codes: Array, bits: int) -> Array:
    narrow: Array = codes.astype(np.uint8)
    return np.ascontiguousarray(narrow if bits == 8 else narrow[..., ::2] | narrow[..., 1::2] << 4)


def _unpack(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
