"""Which weights get more bits: as many as a budget allows, where rounding costs the most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ENDS = 6
"""Bits of the embeddings and the lm_head, at least: on SmolLM2 their rounding costs three times as much a weight as
that of the layers."""


@dataclass(frozen=True)
class Weights:
    """Weights that share a width. size: how many numbers. cost: of rounding them, in units that all groups share."""

    size: int
    cost: float


def neighbours(mean_bits: float, widths: Sequence[int]) -> tuple[int, ...]:
    """The widths that a mean is made of: those next to it, or the one that it is."""
    below = max(bits for bits in widths if bits <= mean_bits)
    above = min((bits for bits in widths if bits >= mean_bits), default=below)
    return (below,) if below == above else (below, above)


def width_of_ends(mean_bits: float, widths: Sequence[int]) -> int:
    """Bits of the embeddings and the lm_head beside layers with this mean."""
    wanted = max(ENDS, neighbours(mean_bits, widths)[-1])
    return min((bits for bits in widths if bits >= wanted), default=widths[-1])


def choose_widths(groups: Mapping[str, Weights], mean_bits: float, widths: Sequence[int]) -> dict[str, int]:
    """Bits by group: the neighbours of the mean, and the wider one where rounding a number costs most. Further widths
    would pay only if costs differed by more than was measured. The mean is not exceeded."""
    low, *wider = neighbours(mean_bits, widths)
    found = dict.fromkeys(groups, low)
    room = sum(group.size for group in groups.values()) * (mean_bits - low)
    for high in wider:
        for name, group in sorted(groups.items(), key=lambda item: item[1].cost / item[1].size, reverse=True):
            if group.size * (high - low) <= room:
                found[name] = high
                room -= group.size * (high - low)
    return found
