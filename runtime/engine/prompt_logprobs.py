"""How likely the tokens of a prompt themselves are, with the query that its answer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .loaded_graph import LoadedGraph, TokenOutputs
from .picks import Likeliest, check_sound
from .prefill import Piece, read, read_piece
from .state import DecodeState, StepOutput

Array = NDArray[Any]


class PromptLogprobs(NamedTuple):
    """Of a prompt of S tokens. logprobs: (S - 1,) float64, in nats, of each token but the first, given those before it.
    ids: (S - 1, k) int64, the k likeliest tokens in its place, the likeliest first; id_logprobs: (S - 1, k) float64,
    theirs. gate_mean: (S - 1,) float32, of the position that predicts it; None in a base-only artifact. output: what
    follows the prompt, as `prefill` returns it. state: one row, which has read the prompt."""

    logprobs: Array
    ids: Array
    id_logprobs: Array
    gate_mean: Array | None
    output: StepOutput
    state: DecodeState


def read_with_logprobs(
    graph: LoadedGraph, state: DecodeState, prompt: Sequence[int], chunk: int, k: int
) -> PromptLogprobs:
    """Read a prompt into a new state of one row, at most `chunk` tokens at once.

    The query is the prompt's mean, which no chunk but the last one knows. Where the gate reads it, longer prompts are
    read for it first, and once more with it, which writes the same into the caches. Raises ArtifactError for logits
    that are no numbers.
    """
    asked = len(prompt) > chunk and state.gate_reads_query
    if asked:
        read(graph, state, [prompt], chunk, Likeliest(1, probabilities=False))
        state.lengths[:] = 0
    columns: list[list[Array]] = []
    gates: list[Array | None] = []
    for start in range(0, len(prompt), chunk):
        part = prompt[start : start + chunk]
        outputs = _again(graph, state, part) if asked else _first(graph, state, part, start + chunk >= len(prompt))
        following = [*prompt[start + 1 : start + chunk + 1], 0][: len(part)]  # nothing follows the last one
        columns.append(_columns(outputs, following, k, start))
        gates.append(None if outputs.gate_mean is None else outputs.gate_mean[0])
    last = outputs.logits.whole()[-1:].copy()
    logprobs, ids, values = (np.concatenate(parts)[:-1] for parts in zip(*columns, strict=True))
    gate = None if gates[0] is None else np.concatenate([part for part in gates if part is not None])
    output = StepOutput(last, None if gate is None else gate[-1:])
    return PromptLogprobs(logprobs, ids, values, None if gate is None else gate[:-1], output, state)


def _first(graph: LoadedGraph, state: DecodeState, part: Sequence[int], ends: bool) -> TokenOutputs:
    return read_piece(graph, state, Piece(None, [part], [ends]), every=True)


def _again(graph: LoadedGraph, state: DecodeState, part: Sequence[int]) -> TokenOutputs:
    """Tokens that the query has already."""
    outputs = graph.run_tokens(state, np.array([part]), np.zeros((1, len(part)), np.float32), row=None, every=True)
    state.lengths[0] += len(part)
    return outputs


def _columns(outputs: TokenOutputs, following: Sequence[int], k: int, start: int) -> list[Array]:
    """Of every position: the log-probability of the token that follows, the k likeliest ones, and theirs."""
    logits = outputs.logits
    normalizer = logits.log_normalizer().astype(np.float64)
    check_sound(np.isfinite(normalizer), start + 1 + np.arange(len(following)))
    found = logits.of_tokens(np.asarray(following, np.int64)).astype(np.float64) - normalizer
    if k == 0:
        return [found, np.zeros((len(found), 0), np.int64), np.zeros((len(found), 0))]
    ids, values, _ = logits.likeliest(k)
    return [found, ids, values.astype(np.float64) - normalizer[:, None]]
