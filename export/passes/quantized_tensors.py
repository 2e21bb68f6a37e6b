"""The tensors of quantized matrices: each weight once, whatever reads it, and by its parts where it was packed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..quantization.gptq import layer_name
from ..quantization.weight_format import QuantizedWeight, round_to_nearest
from . import weights
from .graph import new_constant
from .half_adapter import in_half
from .quantization import Quantization, Quantized


class QuantizedTensors:
    """Makes them, and notes in `done` what every weight became. made: all of them."""

    def __init__(self, settings: Quantization, done: Quantized) -> None:
        self.settings = settings
        self.done = done
        self._found: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value, ir.Value | None]] = {}

    @property
    def made(self) -> set[ir.Value]:
        return {value for tensors in self._found.values() for value in tensors if value is not None}

    def of(self, graph: ir.Graph, weight: ir.Value, in_by_out: bool) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """B, scales and zero points of a weight, stored as (in, out) or as (out, in)."""
        key = weight, in_by_out
        if key not in self._found:
            found = self._quantized(weight, in_by_out)
            dtype = weight.dtype or ir.DataType.FLOAT
            packed = new_constant(graph, f"{weight.name}.int{self.settings.bits}", found.packed)
            scales = new_constant(graph, f"{weight.name}.scales", found.scales.astype(dtype.numpy()))
            points = found.zero_points
            zeros = None if points is None else new_constant(graph, f"{weight.name}.zero_points", points)
            self._found[key] = packed, scales, zeros
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
            self.done.calibrated += part is not None
            if part is None:
                rows = channels[start : start + size]
                part = round_to_nearest(rows, settings.bits, settings.block_size, settings.symmetric)
            if settings.half_scales:
                part = replace(part, scales=_in_half(part.scales))
            if weight.dtype not in (None, ir.DataType.FLOAT):  # the scales as the file has them
                part = replace(part, scales=part.scales.astype(weight.dtype.numpy()).astype(np.float32))
            self.done.weights[name] = part
            found.append(part)
            start += size
        return _concatenated(found)


def _in_half(scales: weights.Array) -> weights.Array:
    half = in_half(scales)
    return half if np.allclose(half, scales, rtol=1e-3, atol=0) else scales


def _concatenated(found: list[QuantizedWeight]) -> QuantizedWeight:
    points = [weight.zero_points for weight in found if weight.zero_points is not None]
    return QuantizedWeight(
        np.concatenate([weight.packed for weight in found]),
        np.concatenate([weight.scales for weight in found]),
        np.concatenate(points) if points else None,
        found[0].bits,
    )
