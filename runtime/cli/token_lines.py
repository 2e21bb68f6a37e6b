"""Generated tokens as lines: what was chosen, how likely it was, and what each memory alone would have said."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..printable import printable

if TYPE_CHECKING:
    from ..generation.logprobs import Candidate
    from ..generation.results import Token

WIDTH = 14
"""Characters of a token's column."""


def heading(token: Token) -> str:
    """The line above those of tokens like this one."""
    columns = [f"{'token':{WIDTH}}"]
    if token.gate_mean is not None:
        columns.append(" gate")
    if token.logprob is not None:
        columns.append("chance")
    if token.top_logprobs:
        columns.append("likeliest")
    if token.trace is not None:
        width = (WIDTH + 7) * len(token.trace.blend) - 2
        columns += [f"{name:{width}}" for name in ("blend", "base", "adapter")]
    return "  ".join(columns).rstrip()


def token_line(token: Token, text: Callable[[int], str]) -> str:
    """One token. text: of a token id."""
    columns = [_cell(text(token.id))]
    if token.gate_mean is not None:
        columns.append(f"{token.gate_mean:5.2f}")
    if token.logprob is not None:
        columns.append(f"{math.exp(token.logprob):6.1%}")
    if token.top_logprobs:
        columns.append(_list(token.top_logprobs, text))
    if token.trace is not None:
        columns += [_list(memory, text) for memory in token.trace]
    return "  ".join(columns).rstrip()


def _list(found: Sequence[Candidate], text: Callable[[int], str]) -> str:
    return "  ".join(f"{_cell(text(each.id))} {each.probability:4.0%}" for each in found)


def _cell(text: str) -> str:
    shown = printable(text).replace(" ", "\u2423") or "\u2205"
    return f"{shown if len(shown) <= WIDTH else shown[: WIDTH - 1] + chr(0x2026):{WIDTH}}"
