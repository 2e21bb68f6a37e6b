"""Which weights get more bits: as many as a budget allows, where they save the most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .weight_format import WIDTHS


@dataclass(frozen=True)
class Weights:
    """Weights that share a width. size: how many numbers. cost: by bits, in nats a token. counted: whether they are a
    part of what the mean is of."""

    size: int
    cost: Mapping[int, float]
    counted: bool = True


def choose_widths(groups: Mapping[str, Weights], mean_bits: float, widths: Sequence[int] = WIDTHS) -> dict[str, int]:
    """Bits by group, with the least total cost that a greedy choice finds: step by step the one that saves most for
    each bit, until the mean over the counted groups' weights would exceed `mean_bits`. Groups that are not counted get
    every step that saves more than the best one that was not taken."""
    found = dict.fromkeys(groups, widths[0])
    room = sum(group.size * (mean_bits - widths[0]) for group in groups.values() if group.counted)

    def steps(counted: bool) -> list[_Step]:
        return [
            _Step(name, (wider - found[name]) * group.size, wider, group.cost[found[name]] - group.cost[wider])
            for name, group in groups.items()
            for wider in widths
            if wider > found[name] and group.counted is counted
        ]

    while affordable := [step for step in steps(True) if step.spent <= room]:
        best = max(affordable, key=lambda step: step.rate)
        found[best.name] = best.bits
        room -= best.spent
    rate = max((step.rate for step in steps(True)), default=0.0)
    while worthwhile := [step for step in steps(False) if step.rate > rate]:
        best = max(worthwhile, key=lambda step: step.rate)
        found[best.name] = best.bits
    return found


@dataclass(frozen=True)
class _Step:
    """spent: bits in all. saved: nats a token."""

    name: str
    spent: int
    bits: int
    saved: float

    @property
    def rate(self) -> float:
        return self.saved / self.spent
