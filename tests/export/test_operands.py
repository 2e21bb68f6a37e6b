"""Inputs that a node leaves out."""

from __future__ import annotations

from export.operands import trimmed


def test_only_inputs_left_out_at_the_end_are_dropped() -> None:
    assert trimmed([1, None, 0, None, None]) == [1, None, 0]
    assert trimmed([None]) == []
