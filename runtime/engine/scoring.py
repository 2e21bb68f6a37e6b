"""How likely a continuation is, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .loaded_graph import LoadedGraph
from .picks import LogProbabilities, TokenScores, check_sound
from .state import DecodeState


def score_continuation(
    graph: LoadedGraph,
    state: DecodeState,
    first: TokenScores,
    continuation: Sequence[int],
    chunk: int,
    memory: int = 0,
) -> TokenScores:
    """The scores of each token of `continuation` after a state of one row whose prompt gave the `first` one's. The
    continuation is not part of the query. chunk: tokens read at once. memory: see `picks.EACH`. Raises ArtifactError
    for logits that are no numbers."""
    found = [first]
    for start in range(0, len(continuation) - 1, chunk):
        part = list(continuation[start : min(start + chunk, len(continuation) - 1)])
        mask = np.zeros((1, len(part)), np.float32)
        outputs = graph.run_tokens(state, np.array([part]), mask, row=None, every=True, memories=(memory,))
        picks = LogProbabilities(continuation[start + 1 : start + 1 + len(part)])
        columns, sound = picks.pick(outputs.logits)
        check_sound(sound, state.lengths[0] + 1 + np.arange(len(part)))
        found.append(TokenScores(*columns))
        state.lengths[0] += len(part)
    return TokenScores(*map(np.concatenate, zip(*found, strict=True)))
