"""Inputs of a node of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def trimmed(inputs: Sequence[T | None]) -> list[T | None]:
    """The inputs without those left out at the end."""
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    return given
