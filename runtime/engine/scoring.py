"""How likely a continuation is, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .loaded_graph import LoadedGraph
from .place import Logits
from .state import DecodeState

Array = NDArray[Any]


def log_probabilities(logits: Logits, ids: Sequence[int]) -> Array:
    """(rows,) float64, nats: of one token of each row."""
    chosen = np.asarray(ids, np.int64)
    found: Array = logits.of_tokens(chosen).astype(np.float64) - logits.log_normalizer()
    return found


def score_continuation(
    graph: LoadedGraph, state: DecodeState, first: Array, continuation: Sequence[int], chunk: int
) -> Array:
    """Log-probabilities (nats) of each token of `continuation`, (len(continuation),) float64, after a state of one row
    whose prompt gave the `first` one's (1,). The continuation is not part of the query. chunk: tokens read at once."""
    found = [first]
    for start in range(0, len(continuation) - 1, chunk):
        part = list(continuation[start : min(start + chunk, len(continuation) - 1)])
        outputs = graph.run_tokens(state, np.array([part]), np.zeros((1, len(part)), np.float32), row=None, every=True)
        found.append(log_probabilities(outputs.logits, continuation[start + 1 : start + 1 + len(part)]))
        state.lengths[0] += len(part)
    return np.concatenate(found)
