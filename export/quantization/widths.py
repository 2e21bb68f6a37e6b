"""Which weights get more bits: as many as a budget allows, where rounding costs the most."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """Weights that share a width. size: how many numbers. cost: of rounding them to the fewest bits, in nats a token.
    counted: whether they are a part of what the mean is of."""

    size: int
    cost: float
    counted: bool = True


def left_of_cost(bits: int, fewest: int = 4) -> float:
    """The share of the cost of `fewest` bits that is left with more: it goes with the square of the rounding's step."""
    return float(((2**fewest - 1) / (2**bits - 1)) ** 2)


def neighbours(mean_bits: float, widths: Sequence[int]) -> tuple[int, ...]:
    """The widths that a mean is made of: those next to it, or the one that it is."""
    below = max(bits for bits in widths if bits <= mean_bits)
    above = min((bits for bits in widths if bits >= mean_bits), default=below)
    return (below,) if below == above else (below, above)


def choose_widths(groups: Mapping[str, Weights], mean_bits: float, widths: Sequence[int]) -> dict[str, int]:
    """Bits by group. The counted ones have the neighbours of the mean, and where a number's rounding costs most the
    wider one: measured costs differ by less than further widths do. Groups that are not counted get every step that
    saves more for each bit than the counted ones' steps do on average. widths: in ascending order."""
    low, *wider = neighbours(mean_bits, widths)
    counted = {name: group for name, group in groups.items() if group.counted}
    found = dict.fromkeys(counted, low)
    size = sum(group.size for group in counted.values())
    room = size * (mean_bits - low)
    for high in wider:
        for name, group in sorted(counted.items(), key=lambda item: item[1].cost / item[1].size, reverse=True):
            if group.size * (high - low) <= room:
                found[name] = high
                room -= group.size * (high - low)
    after = next((bits for bits in widths if bits > low), None)
    whole = Weights(size, sum(group.cost for group in counted.values()))
    for name, group in groups.items():
        if group.counted:
            continue
        found[name] = widths[-1] if after is None else widths[0]
        for narrow, wide in itertools.pairwise(widths):
            if after is not None and _saved(group, narrow, wide) > _saved(whole, low, after):
                found[name] = wide
    return found


def _saved(group: Weights, narrow: int, wide: int) -> float:
    """Nats a token for each bit that is spent."""
    return group.cost * (left_of_cost(narrow) - left_of_cost(wide)) / (group.size * (wide - narrow))
