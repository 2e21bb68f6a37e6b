"""Several chosen tokens of a reply in one run: what a speculation guessed, for example."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .loaded_graph import LoadedGraph
from .marks import Mark
from .picks import EachMemory, Whole, check_sound
from .state import DecodeState, StepsOutput


def feed(graph: LoadedGraph, state: DecodeState, tokens: Sequence[int], picks: Whole | EachMemory) -> StepsOutput:
    """Feed `tokens` to a state of one row, and count them in as decode steps would. Raises ArtifactError for logits
    that are no numbers."""
    count, mask, each = len(tokens), np.zeros((1, len(tokens)), np.float32), len(picks.memories)
    outputs = graph.run_tokens(state, np.array([tokens]), mask, row=None, every=True, memories=picks.memories)
    lengths = state.lengths[0] + 1 + np.arange(count)
    columns, sound = picks.pick(outputs.logits)
    check_sound(sound, lengths)
    found = picks.output(columns, None if outputs.gate_mean is None else outputs.gate_mean[0, ::each].copy())
    hidden = outputs.hidden()
    state.lengths[0] += count
    if hidden is None:
        return StepsOutput(*found)
    sums = np.cumsum(
        np.concatenate([state.reply_sum, hidden[0, ::each]]), axis=0
    )  # one after the other, as steps add them
    counts = state.reply_count[0] + np.arange(count + 1, dtype=np.float32)
    state.reply_sum[0], state.reply_count[0] = sums[-1], counts[-1]
    if state.gate_reads_query:
        for length, *reply in zip(lengths.tolist(), sums[1:], counts[1:], strict=True):
            state.marks[0].add_decoded(length, *reply)
    return StepsOutput(*found)


def take_back(state: DecodeState, count: int) -> list[Mark | None]:
    """Take back the last `count` tokens that were fed to a state of one row. Returns what `put_forward` needs of each
    of them, in their order: their mark, None where the gate does not read the query."""
    length = int(state.lengths[0])
    marks = [state.marks[0].at(known) for known in range(length - count + 1, length + 1)]
    state.trim([length - count])
    return marks


def put_forward(state: DecodeState, mark: Mark | None) -> None:
    """Let a state of one row hold the next token that was taken back, as long as nothing else happened to it."""
    try:
        state.begin()
        state.lengths[0] += 1
        state.pending[0] = None
        if mark is not None:
            state.reply_sum[0], state.reply_count[0] = mark.reply_sum, mark.reply_count
            state.marks[0].decoded.append(mark)
        state.note = None
    except BaseException:
        state.undo()
        raise
