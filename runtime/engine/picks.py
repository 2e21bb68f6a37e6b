"""What a step wants of its logits, and that they are numbers to choose by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import ArtifactError
from .place import Logits
from .state import LikeliestOutput, StepOutput

Array = NDArray[Any]
Output_co = TypeVar("Output_co", covariant=True)


class Picked(NamedTuple):
    """columns: arrays, each with one entry a row. sound: (rows,) bool, whether a row's logits are numbers: none of them
    "not a number" or +infinity, and not all of them -infinity, which masks a token."""

    columns: tuple[Array, ...]
    sound: Array


BLEND = (0,)
EACH = (0, 1, 2)
"""What a step gives logits of, as the graph's input `memory` has it: the blend, the base memory, the adapter's."""


class Picks(Protocol[Output_co]):
    """One thing that can be wanted. memories: whose logits it takes, of each row's token in turn."""

    @property
    def memories(self) -> tuple[int, ...]: ...

    def pick(self, logits: Logits) -> Picked:
        """What is wanted of some rows' logits, (rows * len(memories), vocab)."""
        ...

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> Output_co:
        """What the caller gets: of all rows, in their order."""
        ...


class Whole:
    """All logits."""

    memories = BLEND

    def pick(self, logits: Logits) -> Picked:
        """See `Picks`."""
        table = logits.whole()
        return Picked((table,), np.isfinite(table.max(-1)))

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> StepOutput:
        """See `Picks`."""
        return StepOutput(columns[0], gates)


class EachMemory:
    """All logits, of the blend and of each memory alone."""

    memories = EACH

    def pick(self, logits: Logits) -> Picked:
        """See `Picks`."""
        table = logits.whole()
        table = table.reshape(-1, len(EACH), table.shape[-1])
        return Picked((table[:, 0], table[:, 1:]), np.isfinite(table.max(-1)).all(-1))

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> StepOutput:
        """See `Picks`."""
        return StepOutput(columns[0], gates, columns[1])


class Likeliest:
    """The k likeliest tokens, and with `probabilities` the normalizer."""

    memories = BLEND

    def __init__(self, k: int, probabilities: bool) -> None:
        self.k = k
        self.probabilities = probabilities

    def pick(self, logits: Logits) -> Picked:
        """See `Picks`."""
        ids, values, sound = logits.likeliest(self.k)
        return Picked((ids, values, *([logits.log_normalizer()] if self.probabilities else [])), sound)

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> LikeliestOutput:
        """See `Picks`."""
        ids, logits, *normalizer = columns
        return LikeliestOutput(ids, logits, normalizer[0] if normalizer else None, gates)


class TokenScores(NamedTuple):
    """logprobs: (N,) float64 in nats, of each token after those before it. greedy: (N,) bool, whether it is the
    likeliest one there."""

    logprobs: Array
    greedy: Array


class LogProbabilities:
    """Of one token of each row. ids: (rows,)."""

    memories = BLEND

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def pick(self, logits: Logits) -> Picked:
        """See `Picks`."""
        normalizer = logits.log_normalizer().astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            found = logits.of_tokens(np.asarray(self.ids, np.int64)).astype(np.float64) - normalizer
        return Picked((found, logits.likeliest(1)[0][:, 0] == self.ids), np.isfinite(normalizer))

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> TokenScores:
        """See `Picks`."""
        return TokenScores(*columns)


def check_sound(sound: Array, lengths: Array) -> None:
    """Raise ArtifactError where a row has no logits to choose by. lengths: (rows,), the tokens that they follow."""
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        raise ArtifactError(
            f"the graph gives logits that are not finite (after {int(lengths[row])} tokens of a text): its weights are "
            "damaged, which `verify` tells, or its precision overflows, and an export in bf16 or fp32 has more range"
        )
