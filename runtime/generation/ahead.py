"""Steps of one text that are computed ahead: a guess at what comes next is fed in one pass, and kept as far as the
choice agrees.

Tokens are chosen one after the other, each from the logits that a step would have given, so that they are the same with
guesses and without.
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..engine.marks import Mark
from ..engine.session import Session
from ..engine.state import DecodeState, StepOutput
from ..engine.steps import put_forward, take_back
from .speculation import Speculation


class _Ahead(NamedTuple):
    """A drafted token that was fed: what the state becomes with it, and what follows."""

    token: int
    mark: Mark | None
    output: StepOutput


class Passes:
    """The steps of a state of one row, some of which were computed ahead. Between two of them the state holds the
    tokens that were asked for and no draft."""

    def __init__(self, session: Session, state: DecodeState, speculation: Speculation, by_memory: bool) -> None:
        self.session, self.state, self.speculation, self.by_memory = session, state, speculation, by_memory
        self._ahead: deque[_Ahead] = deque()
        self._layout: object = None

    def after(self, token: int, ids: NDArray[np.int64]) -> StepOutput:
        """What `decode_step` of a token would return. ids: (N,), the text so far, whose last one it is."""
        if self._ahead and self._layout is self.state.layout:
            self.speculation.judged(self._ahead[0].token == token)
            if self._ahead[0].token == token:
                put_forward(self.state, self._ahead[0].mark)
                return self._ahead.popleft().output
        self._ahead.clear()
        room = self.session.manifest.context_length - int(self.state.lengths[0]) - 1
        draft = self.speculation.draft(ids, room)
        start = time.perf_counter()
        output = self._pass(token, draft) if draft else self.session.decode_step(self.state, [token], self.by_memory)
        self.speculation.timed(1 + len(draft), time.perf_counter() - start)
        return output

    def _pass(self, token: int, draft: list[int]) -> StepOutput:
        before = self.state.noted()
        try:
            found = self.session.continue_step(self.state, [token, *draft], self.by_memory)
            marks = take_back(self.state, len(draft))
        except BaseException:
            self.state.restore(before)
            raise
        outputs = [
            StepOutput(found.logits[here], _part(found.gate_mean, here), _part(found.memory_logits, here))
            for here in (slice(place, place + 1) for place in range(1 + len(draft)))
        ]
        self._ahead.extend(map(_Ahead, draft, marks, outputs[1:]))
        self._layout = self.state.layout
        return outputs[0]


def _part(column: NDArray[np.float32] | None, here: slice) -> NDArray[np.float32] | None:
    return None if column is None else column[here]
