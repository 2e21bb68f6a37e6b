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


class Picks(Protocol[Output_co]):
    """One thing that can be wanted."""

    def pick(self, logits: Logits) -> Picked:
        """What is wanted of some rows' logits."""
        ...

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> Output_co:
        """What the caller gets: of all rows, in their order."""
        ...


class Whole:
    """All logits."""

    def pick(self, logits: Logits) -> Picked:
        """See `Picks`."""
        table = logits.whole()
        return Picked((table,), np.isfinite(table.max(-1)))

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> StepOutput:
        """See `Picks`."""
        return StepOutput(columns[0], gates)


class Likeliest:
    """The k likeliest tokens, and with `probabilities` the normalizer."""

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


class LogProbabilities:
    """Of one token of each row, (rows,) float64 in nats. ids: (rows,)."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def pick(self, logits: Logits) -> Picked:
        """See `Picks`."""
        normalizer = logits.log_normalizer().astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            found = logits.of_tokens(np.asarray(self.ids, np.int64)).astype(np.float64) - normalizer
        return Picked((found,), np.isfinite(normalizer))

    def output(self, columns: tuple[Array, ...], gates: Array | None) -> Array:
        """See `Picks`."""
        return columns[0]


def check_sound(sound: Array, lengths: Array) -> None:
    """Raise ArtifactError where a row has no logits to choose by. lengths: (rows,), the tokens that they follow."""
    if not sound.all():
        row = int(np.flatnonzero(~sound)[0])
        raise ArtifactError(
            f"the graph gives logits that are not finite (after {int(lengths[row])} tokens of a text): its weights are "
            "damaged, which `verify` tells, or its precision overflows, and an export in bf16 or fp32 has more range"
        )
