"""How likely a continuation is, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .loaded_graph import LoadedGraph
from .picks import LogProbabilities, check_sound
from .state import DecodeState

Array = NDArray[Any]


def score_continuation(
    graph: LoadedGraph, state: DecodeState, first: Array, continuation: Sequence[int], chunk: int
) -> Array:
    """Log-probabilities (nats) of each token of `continuation`, (len(continuation),) float64, after a state of one row
    whose prompt gave the `first` one's (1,). The continuation is not part of the query. chunk: tokens read at once.
    Raises ArtifactError for logits that are no numbers."""
    found = [first]
    for start in range(0, len(continuation) - 1, chunk):
        part = list(continuation[start : min(start + chunk, len(continuation) - 1)])
        outputs = graph.run_tokens(state, np.array([part]), np.zeros((1, len(part)), np.float32), row=None, every=True)
        (column,), sound = LogProbabilities(continuation[start + 1 : start + 1 + len(part)]).pick(outputs.logits)
        check_sound(sound, state.lengths[0] + 1 + np.arange(len(part)))
        found.append(column)
        state.lengths[0] += len(part)
    return np.concatenate(found)
