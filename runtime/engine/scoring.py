"""How likely a continuation is, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .loaded_graph import LoadedGraph
from .state import DecodeState

Array = NDArray[Any]


def score_continuation(
    graph: LoadedGraph, state: DecodeState, first_logits: Array, continuation: Sequence[int], chunk: int
) -> Array:
    """Log-probabilities (nats) of each token of `continuation`, (len(continuation),) float64, after a state of one row
    whose prompt gave `first_logits` (1, vocab). The continuation is not part of the query. chunk: tokens read at once.
    """
    logits = [first_logits]
    for start in range(0, len(continuation) - 1, chunk):
        part = list(continuation[start : min(start + chunk, len(continuation) - 1)])
        outputs = graph.run_tokens(state, np.array([part]), np.zeros((1, len(part)), np.float32), row=None, every=True)
        logits.append(outputs["logits"][0])
        state.lengths[0] += len(part)
    table = np.concatenate(logits).astype(np.float64)
    table -= table.max(-1, keepdims=True)
    table -= np.log(np.exp(table).sum(-1, keepdims=True))
    found: Array = table[np.arange(len(continuation)), np.asarray(continuation, np.int64)]
    return found
