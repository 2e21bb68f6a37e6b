"""Whether float16 holds what a model computes and its weights; refused before the trace where it does not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from imsm_core.errors import setting

from .activation_range import ActivationRange
from .errors import UnsupportedError
from .settings import ExportSettings

LARGEST = float(torch.finfo(torch.float16).max)
HEADROOM = 1.25
"""How much larger than what was found another text's activations may be: the largest come with the first token of a
text, and over 4,096 first tokens of SmolLM2-135M the largest was 1.23 times the median."""
NEAR = 0.25
"""Of LARGEST: activations beyond it are warned of."""
LOST = 0.01
"""Of a weight's norm: what float16's smallest numbers may take of it without a warning."""


def check_activations(found: ActivationRange, settings: ExportSettings) -> None:
    """Raise UnsupportedError if another text's activations may be more than float16 holds, or are no numbers."""
    place, value = found.largest
    if not value * HEADROOM <= LARGEST:
        raise UnsupportedError(
            f"float16 ends at {LARGEST:,.0f} and the largest activation is {value:,.0f} ({place}), with less than a "
            f"factor of {HEADROOM} for other texts: {_instead(settings)}"
        )


def warn_of_activations(found: ActivationRange) -> list[str]:
    """A line if the largest activation comes near to what float16 holds."""
    place, value = found.largest
    if value <= NEAR * LARGEST:
        return []
    return [
        f"the largest activation ({value:,.0f}, {place}) is {value / LARGEST:.0%} of what float16 holds; bf16 has room"
    ]


def check_weights(weights: Iterable[tuple[str, Tensor]], settings: ExportSettings) -> list[str]:
    """A line for the weight that loses most of itself to float16's smallest numbers, if any loses much. Raises
    UnsupportedError if one has a value that float16 does not hold."""
    lost: dict[str, float] = {}
    for name, weight in weights:
        rounded = weight.half()
        if not bool(torch.isfinite(rounded).all()):
            largest = float(torch.linalg.vector_norm(weight, torch.inf))
            raise UnsupportedError(
                f"float16 ends at {LARGEST:,.0f} and the weight {name} holds {largest:,.0f}: {_instead(settings)}"
            )
        size = float(torch.linalg.vector_norm(weight))
        share = float(torch.linalg.vector_norm(weight - rounded.float())) / size if size else 0.0
        if share > LOST:
            lost[name] = share
    if not lost:
        return []
    worst = max(lost, key=lambda name: lost[name])
    return [
        f"{len(lost)} weights are so small that float16 changes them by more than {LOST:.0%}, most of all {worst} "
        f"({lost[worst]:.0%}); bf16 keeps them"
    ]


def _instead(settings: ExportSettings) -> str:
    other = "int8" if settings.bits is None else "fp32"
    return f"it would overflow; take {setting('precision' if settings.bits is None else 'activations')} bf16 or {other}"
