"""Which tokens a layer may look at, found by evaluating the rule that the model's mask is made from.

transformers describes a mask as a rule over positions and hands it to a registered function. A rule says more than a
mask over a short text does: a window of thousands of tokens shows in it too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UnsupportedError

MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query position, key position) -> whether the query may look at the key, with broadcasting."""


def causal_window(rule: MaskRule, context: int) -> int | None:
    """How many tokens, itself included, a query looks back at in texts of up to `context` tokens; None: all of them.

    Raises UnsupportedError if the rule is not "the last N tokens": GroupQueryAttention has no other.
    """
    last = context - 1
    window = int(_allowed(rule, [last], context).sum())
    queries = sorted({0, 1, window - 1, window, window + 1, context // 2, last - 1, last} & set(range(context)))
    keys, rows = torch.arange(context), torch.tensor(queries)[:, None]
    if not torch.equal(_allowed(rule, queries, context), (keys <= rows) & (keys > rows - window)):
        raise UnsupportedError("its attention mask is neither causal nor a causal sliding window")
    return None if window == context else window


def _allowed(rule: MaskRule, queries: list[int], context: int) -> Tensor:
    """(queries, context) bool."""
    zero = torch.tensor(0)
    allowed = rule(zero, zero, torch.tensor(queries)[:, None], torch.arange(context)[None])
    return allowed.expand(len(queries), context)
