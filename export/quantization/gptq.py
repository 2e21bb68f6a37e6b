"""Calibrated weight-only quantization: GPTQ on what the backbone's layers read.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) quantizes a weight one input at a time and lets the inputs that are left
make up for the error, weighted by H = sum x x^T over calibration inputs x. A frozen weight of a siamese model is read
by both streams, so that the rows of both enter H, with the adapter attached in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from imsm_core.adapters.attach import adapted_layers
from imsm_core.siamese import SiameseModel

from ..adapters.rows import linear_weight
from ..errors import ExportError
from .weight_format import (
    Array,
    QuantizedWeight,
    check_format,
    dequantize,
    pack,
    round_to_nearest,
    unpacked_zero_points,
)

HESSIAN_BYTES = 2**30  # of the layers that are calibrated in one pass over the texts
_DAMPING = 0.01  # of the mean of H's diagonal: the paper's


@torch.no_grad()
def calibrated_weights(
    model: SiameseModel,
    texts: Sequence[Sequence[int]],
    bits: int,
    block_size: int,
    symmetric: bool,
    report: Callable[[str], None] = print,
) -> dict[str, QuantizedWeight]:
    """GPTQ of every frozen linear layer of the backbone (the lm_head is not one), by the layer's name inside the causal
    LM, as `layer_name` makes it of the name of a weight in the graph.

    model: on the CPU, float32, eval mode; its weights are the same before and after. texts: token ids; some thousands
    of tokens in all. Layers are taken in the model's order, as many at a time as HESSIAN_BYTES allows, and each group
    sees inputs that the quantized groups before it gave. A layer that no text reaches, or for which rounding to nearest
    is better on these inputs, is rounded to nearest. Raises ExportError if there are no texts, and as `check_format`.
    """
    check_format(bits, block_size)
    if not any(len(text) for text in texts):
        raise ExportError("calibration needs at least one text")
    layers = backbone_layers(model)
    found: dict[str, QuantizedWeight] = {}
    rounded = 0
    with _weights_restored(layers.values()):
        for group in _groups(layers):
            hessians = _hessians(model, group, texts)
            for name, layer in group.items():
                weight = _values(layer)
                quantized, better = _quantize(weight, hessians.pop(name), bits, block_size, symmetric)
                rounded += not better
                found[name] = quantized
                _set_values(layer, dequantize(quantized, weight.shape[1]))
            report(f"calibrate {len(found)} of {len(layers)} layers")
    if rounded:
        report(f"calibrate {rounded} layers are rounded to nearest, which is better for them")
    return found


def layer_name(weight: str) -> str:
    """The layer's name inside the causal LM of a weight's name in the traced module, where it stands behind the model's
    own name and inside an adapter's two-stream form: model.model.layers.0.mlp.up_proj.base_layer.weight."""
    return weight.removeprefix("model.").removesuffix(".weight").replace(".base_layer", "")


def backbone_layers(model: SiameseModel) -> dict[str, nn.Module]:
    """Every frozen linear layer of the backbone by its name inside the causal LM, an adapter's wrapping left out."""
    causal_lm = model.causal_lm
    adapted = {layer.name: layer for layer in adapted_layers(model.peft_model)}
    layers: dict[str, nn.Module] = {}
    inside = ""
    for name, module in causal_lm.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = f"{name}." if name in adapted else ""
        layer = adapted[name].frozen if name in adapted else module
        if linear_weight(layer) is not None and module is not causal_lm.get_output_embeddings():
            layers[name] = layer
    return layers


def _groups(layers: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    group: dict[str, nn.Module] = {}
    total = 0
    for name, layer in layers.items():
        size = 4 * _values(layer).shape[1] ** 2
        if group and total + size > HESSIAN_BYTES:
            yield group
            group, total = {}, 0
        group[name] = layer
        total += size
    yield group


def _hessians(
    model: SiameseModel, layers: dict[str, nn.Module], texts: Sequence[Sequence[int]]
) -> dict[str, Array | None]:
    """By name (K, K) float32: sum of x x^T over everything that each layer reads in both streams; None if it reads
    nothing. With an adapter that multiplies by a changed weight without the layer, as BOFT does, only the base stream's
    rows count."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).float()
            product = rows.T @ rows
            sums[name] = sums[name].add_(product) if name in sums else product

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        for text in texts:
            if len(text):
                model.stream_states(torch.tensor([list(text)]))
    finally:
        for handle in hooks:
            handle.remove()
    return {name: sums[name].numpy() if name in sums else None for name in layers}


def _quantize(
    weight: Array, hessian: Array | None, bits: int, block_size: int, symmetric: bool
) -> tuple[QuantizedWeight, bool]:
    """The better one of GPTQ and rounding to nearest on the inputs that gave `hessian`, and whether that is GPTQ."""
    nearest = round_to_nearest(weight, bits, block_size, symmetric)
    if hessian is None or not hessian.any():
        return nearest, False
    calibrated = gptq(weight, hessian, bits, block_size, symmetric)
    errors = [output_error(weight - dequantize(found, weight.shape[1]), hessian) for found in (calibrated, nearest)]
    return (calibrated, True) if errors[0] < errors[1] else (nearest, False)


def gptq(weight: Array, hessian: Array, bits: int, block_size: int, symmetric: bool) -> QuantizedWeight:
    """weight: (N, K) float32; hessian: (K, K), of any scale, not all zeros. Algorithm 1 of the paper with its blocks as
    the blocks of the format; a block's scale is that of rounding to nearest, of the values that it has by then."""
    columns = torch.from_numpy(weight.T.copy())  # (K, N): row k is what all outputs have for input k
    factor = _inverse_factor(hessian)
    inputs, channels = columns.shape
    blocks = -(-inputs // block_size)
    top = 2**bits - 1
    codes = torch.full((blocks * block_size, channels), float(1 << bits - 1))
    scales, points = torch.empty(blocks, channels), torch.empty(blocks, channels)
    for block, start in enumerate(range(0, inputs, block_size)):
        end = min(start + block_size, inputs)
        part = columns[start:end]
        nearest = round_to_nearest(part.T.numpy(), bits, block_size, symmetric)
        scale = torch.from_numpy(nearest.scales[:, 0])
        scale = torch.where(scale == 0, 1.0, scale)
        point = torch.from_numpy(unpacked_zero_points(nearest)[:, 0])
        errors = torch.empty_like(part)
        for row in range(end - start):
            k = start + row
            codes[k] = (part[row] / scale + point).round().clamp(0, top)
            errors[row] = (part[row] - (codes[k] - point) * scale) / factor[k, k]
            part[row:].addr_(factor[k, k:end], errors[row], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        scales[block], points[block] = scale, point
    shaped = codes.T.reshape(channels, blocks, block_size).numpy()
    return pack(shaped, scales.T.numpy(), None if symmetric else points.T.numpy(), bits)


def _inverse_factor(hessian: Array) -> Tensor:
    """(K, K) float32 upper triangular U with U^T U = the inverse of the damped H."""
    moments = torch.from_numpy(hessian).double()
    diagonal = moments.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean  # an input that is always 0 in these texts: rounded to nearest
    diagonal += _DAMPING * mean
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def output_error(difference: Array, hessian: Array) -> float:
    """sum |difference @ x|^2 over the inputs x that gave `hessian`; difference: (N, K)."""
    return float(((difference @ hessian) * difference).sum(dtype=np.float64))


def _values(layer: nn.Module) -> Array:
    weight = linear_weight(layer)
    assert weight is not None
    values: Array = weight.numpy()
    return values


def _set_values(layer: nn.Module, values: Array) -> None:
    weight = layer.get_parameter("weight")
    weight.copy_(torch.from_numpy(values.T if isinstance(layer, Conv1D) else values))


@contextmanager
def _weights_restored(layers: Iterable[nn.Module]) -> Iterator[None]:
    weights = [layer.get_parameter("weight") for layer in layers]
    originals = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
