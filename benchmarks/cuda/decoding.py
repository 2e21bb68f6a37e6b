"""The one place where the stages call the runtime to choose tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from runtime import Session
from runtime.engine.state import DecodeState

Array = NDArray[Any]


def first_tokens(session: Session, state: DecodeState, prompts: Sequence[Sequence[int]]) -> Array:
    """Read prompts; returns the likeliest next token of each row, (B,) int64."""
    return session.prefill_likeliest(state, prompts).ids[:, 0]


def next_tokens(session: Session, state: DecodeState, tokens: Array) -> Array:
    """Feed a token per row; returns the likeliest next ones."""
    return session.decode_likeliest(state, tokens).ids[:, 0]
