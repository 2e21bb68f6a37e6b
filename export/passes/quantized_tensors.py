"""The tensors of quantized matrices: each weight once, whatever reads it, and by its parts where it was packed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..quantization.layers import layer_name
from ..quantization.weight_format import QuantizedWeight, in_bytes, round_to_nearest
from . import weights
from .graph import new_constant
from .half_adapter import in_half
from .quantization import Quantization, Quantized


@dataclass(frozen=True)
class Tensors:
    """B, scales and zero points of a node, and the bits of the codes in B."""

    packed: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    bits: int


class QuantizedTensors:
    """Makes them, and notes in `done` what every weight became. made: all of them."""

    def __init__(self, settings: Quantization, done: Quantized) -> None:
        self.settings = settings
        self.done = done
        self._found: dict[tuple[ir.Value, bool], Tensors] = {}

    @property
    def made(self) -> set[ir.Value]:
        values = (value for found in self._found.values() for value in (found.packed, found.scales, found.zero_points))
        return {value for value in values if value is not None}

    def of(self, graph: ir.Graph, weight: ir.Value, in_by_out: bool) -> Tensors:
        """Those of a weight, stored as (in, out) or as (out, in). Of 5 and 6 bits the codes are bytes with zero points:
        the operators of onnxruntime have no such widths."""
        key = weight, in_by_out
        if key not in self._found:
            found = self._quantized(weight, in_by_out)
            stored = found if found.more is None else in_bytes(found)
            dtype = weight.dtype or ir.DataType.FLOAT
            packed = new_constant(graph, f"{weight.name}.int{stored.bits}", stored.packed)
            scales = new_constant(graph, f"{weight.name}.scales", stored.scales.astype(dtype.numpy()))
            points = stored.zero_points
            zeros = None if points is None else new_constant(graph, f"{weight.name}.zero_points", points)
            self._found[key] = Tensors(packed, scales, zeros, stored.bits)
            self.done.bytes_before += weights.nbytes(weight)
            self.done.replaced.append(str(weight.name))
        return self._found[key]

    def _quantized(self, weight: ir.Value, in_by_out: bool) -> QuantizedWeight:
        names, settings = weights.parts(weight), self.settings
        values = weights.matrix(weight).astype(np.float32)
        channels = np.ascontiguousarray(values.T if in_by_out else values)  # (out, in)
        found, start = [], 0
        for name, size in zip(names, weights.part_sizes(weight, len(channels)), strict=True):
            part = settings.calibrated.get(layer_name(name))
            self.done.calibrated += part is not None and settings.rounding == "best"
            if part is None:
                rows = channels[start : start + size]
                part = round_to_nearest(rows, settings.bits, settings.block_size, settings.symmetric)
            if settings.half_scales:
                part = replace(part, scales=_in_half(part.scales))
            if weight.dtype not in (None, ir.DataType.FLOAT):  # the scales as the file has them
                part = replace(part, scales=part.scales.astype(weight.dtype.numpy()).astype(np.float32))
            self.done.weights[name] = part
            self.done.widths[part.bits] += size * channels.shape[1]
            found.append(part)
            start += size
        return _concatenated(found)


def _in_half(scales: weights.Array) -> weights.Array:
    half = in_half(scales)
    return half if np.allclose(half, scales, rtol=1e-3, atol=0) else scales


def _concatenated(found: list[QuantizedWeight]) -> QuantizedWeight:
    """Weights beside each other; of different widths, or if only some have zero points, all of them in bytes."""
    if len({(weight.bits, weight.zero_points is None) for weight in found}) > 1:
        found = [in_bytes(weight) for weight in found]
    points = [weight.zero_points for weight in found if weight.zero_points is not None]
    more = [weight.more for weight in found if weight.more is not None]
    return QuantizedWeight(
        np.concatenate([weight.packed for weight in found]),
        np.concatenate([weight.scales for weight in found]),
        np.concatenate(points) if points else None,
        found[0].bits,
        np.concatenate(more) if more else None,
    )
