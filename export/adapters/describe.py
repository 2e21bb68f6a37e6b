"""What an adapter became in the graph: which forms, and how much it adds to the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from imsm_core.errors import setting

from ..errors import UnsupportedError
from .rows import DenseDelta, TwoStreamBias


def describe_adapter(
    peft_type: str, layers: Mapping[str, nn.Module], virtual: Mapping[str, NDArray[np.float32]]
) -> dict[str, Any]:
    """The manifest's `adapter` section: the layers, how many have which form, and bytes (float32) of everything that
    the adapter adds and of the changes stored as whole matrices."""
    sizes: dict[int, int] = {}
    for layer in layers.values():
        for parameter in _own_parameters(layer):
            sizes[id(parameter)] = 4 * parameter.numel()
    modules = [module for layer in layers.values() for module in layer.modules()]
    dense = sum(4 * module.adapter_delta.numel() for module in modules if isinstance(module, DenseDelta))
    return {
        "peft_type": peft_type,
        "layers": sorted(layers),
        "forms": dict(sorted(Counter(map(_form, layers.values())).items())),
        "bytes": sum(sizes.values()) + sum(array.nbytes for array in virtual.values()),
        "dense_delta_bytes": dense,
    }


def check_delta_size(adapter: dict[str, Any], limit_mb: float | None) -> None:
    """Raise UnsupportedError if whole matrices take more than `limit_mb` (10^6 bytes)."""
    found = adapter["dense_delta_bytes"] / 1e6
    if limit_mb is not None and found > limit_mb:
        raise UnsupportedError(
            f"{adapter['peft_type']} changes whole matrices: {found:.2f} MB of them would be added, more than the "
            f"{limit_mb:g} that {setting('max_delta_mb')} allows"
        )


def _form(layer: nn.Module) -> str:
    """low rank, diagonal, ... ; frozen where the adapter turned out to change nothing."""
    if isinstance(layer, TwoStreamBias) and hasattr(layer.base_layer, "form"):
        return f"{_form(layer.base_layer)} with bias"
    return str(getattr(layer, "form", "frozen"))


def _own_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of a two-stream form that the frozen model does not have."""
    named = list(layer.named_parameters())
    own = [any(part.startswith("adapter_") for part in name.split(".")) for name, _ in named]
    frozen = {id(parameter) for (_, parameter), mine in zip(named, own, strict=True) if not mine}
    return [parameter for _, parameter in named if id(parameter) not in frozen]
