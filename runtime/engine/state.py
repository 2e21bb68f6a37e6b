"""What a set of texts has been so far, between the steps of a session: rows that can be copied, joined, dropped and cut
back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError
from .cache import KVCache
from .marks import Mark, Marks

Array = NDArray[Any]


class StepOutput(NamedTuple):
    """logits: (B, vocab) float32 for each row's next token. gate_mean: (B,) float32, 1 is only the base memory; None
    in a base-only artifact."""

    logits: Array
    gate_mean: Array | None


class LikeliestOutput(NamedTuple):
    """ids: (B, k) int64, the k likeliest next tokens of each row, the likeliest first. logits: (B, k) float32, theirs.
    log_normalizer: (B,), the logarithm of the sum of exp(logits) over the vocabulary: `logits` minus it are
    log-probabilities in nats; None unless asked for. gate_mean: as in `StepOutput`."""

    ids: Array
    logits: Array
    log_normalizer: Array | None
    gate_mean: Array | None


@dataclass(eq=False)
class DecodeState:
    """What B texts have been so far: caches of every group of rows, lengths, and the gate's query.

    lengths: (B,) tokens in the caches. query_sum (B, 2, d) and query_count (B,) make the query means of (base,
    adapter); reply_sum and reply_count hold the tokens generated since, which belong to the query as soon as the
    conversation continues. pending: per row a token that was chosen but not fed yet. memory_bias: (B,), added to the
    gate before its sigmoid. marks: per row, what the sums were at lengths that it can be cut back to. artifact: the
    hashes of the one that the state belongs to. gate_reads_query: whether its gate looks at the sums at all. layout:
    changes whenever the caches are replaced, so that bindings to them can tell.
    """

    caches: dict[str, KVCache]
    lengths: NDArray[np.int64]
    query_sum: NDArray[np.float32]
    query_count: NDArray[np.float32]
    reply_sum: NDArray[np.float32]
    reply_count: NDArray[np.float32]
    memory_bias: NDArray[np.float32]
    pending: list[int | None]
    marks: list[Marks]
    artifact: str
    gate_reads_query: bool = True
    layout: object = field(default_factory=object, repr=False)

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return len(self.lengths)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches.values())

    def take(self, rows: Sequence[int]) -> DecodeState:
        """A separate state with copies of these rows, in this order; a row may come twice. Raises PromptError for a row
        that does not exist."""
        chosen = self._checked(rows)
        length = int(self.lengths[chosen].max(initial=0))
        return DecodeState(
            caches={group: cache.take(chosen, length) for group, cache in self.caches.items()},
            lengths=self.lengths[chosen],
            query_sum=self.query_sum[chosen],
            query_count=self.query_count[chosen],
            reply_sum=self.reply_sum[chosen],
            reply_count=self.reply_count[chosen],
            memory_bias=self.memory_bias[chosen],
            pending=[self.pending[row] for row in chosen],
            marks=[self.marks[row].copy() for row in chosen],
            artifact=self.artifact,
            gate_reads_query=self.gate_reads_query,
        )

    def join(self, other: DecodeState) -> None:
        """Append copies of the other state's rows to this one's. Raises PromptError for a state of another artifact;
        both are then unchanged."""
        if self.artifact != other.artifact:
            raise PromptError("states of different artifacts cannot be joined")
        length = int(max(self.lengths.max(initial=0), other.lengths.max(initial=0)))
        caches = {group: cache.join(other.caches[group], length) for group, cache in self.caches.items()}
        arrays = [np.concatenate(pair) for pair in zip(self._arrays(), other._arrays(), strict=True)]
        self._become(
            caches,
            arrays,
            [*self.pending, *other.pending],
            [*self.marks, *(marks.copy() for marks in other.marks)],
        )

    def drop(self, rows: Sequence[int]) -> None:
        """Remove these rows; the others move up, and the caches become as small as the longest of them allows. Raises
        PromptError for a row that does not exist."""
        gone = set(self._checked(rows))
        kept = self.take([row for row in range(self.batch) if row not in gone])
        self._become(kept.caches, kept._arrays(), kept.pending, kept.marks)

    def trim(self, lengths: Sequence[int]) -> None:
        """Cut every row back to its first `lengths[row]` tokens: what follows equals a run that stopped there.

        The gate's query is a sum over the prompt, which is known where a prefill's chunk ended and at the last
        `marks.RECENT` tokens that were decoded: `cut_lengths` says where. Where the gate does not read the query, any
        length works. Raises PromptError for a length that is longer than the row or not known; the state is then
        unchanged.
        """
        wanted = _integers(lengths, "length")
        if len(wanted) != self.batch:
            raise PromptError(f"{len(wanted)} lengths for {self.batch} rows")
        found: list[Mark | None] = [self._mark(row, length) for row, length in enumerate(wanted)]
        with self.unchanged_on_error():
            for row, (length, mark) in enumerate(zip(wanted, found, strict=True)):
                if length == self.lengths[row]:
                    continue
                self.lengths[row] = length
                self.pending[row] = None
                self.marks[row].cut(length)
                if mark is not None:
                    self.query_sum[row], self.query_count[row] = mark.query_sum, mark.query_count
                    self.reply_sum[row], self.reply_count[row] = mark.reply_sum, mark.reply_count

    def cut_lengths(self, row: int) -> list[int]:
        """The lengths that `trim` takes for a row, ascending."""
        length = int(self.lengths[row])
        return list(range(length + 1)) if not self.gate_reads_query else sorted({0, *self.marks[row].lengths, length})

    @contextmanager
    def unchanged_on_error(self) -> Iterator[None]:
        """Inside the block an exception puts lengths, sums, pending tokens and marks back; what was written into the
        caches lies behind the lengths, where nothing reads it."""
        arrays = [array.copy() for array in self._arrays()]
        pending, marks = list(self.pending), [marks.copy() for marks in self.marks]
        try:
            yield
        except BaseException:
            for array, before in zip(self._arrays(), arrays, strict=True):
                array[...] = before
            self.pending, self.marks = pending, marks
            raise

    def _arrays(self) -> list[Array]:
        """In the order of the fields."""
        return [
            self.lengths,
            self.query_sum,
            self.query_count,
            self.reply_sum,
            self.reply_count,
            self.memory_bias,
        ]

    def _become(
        self, caches: dict[str, KVCache], arrays: list[Array], pending: list[int | None], marks: list[Marks]
    ) -> None:
        self.caches, self.pending, self.marks = caches, pending, marks
        self.lengths, self.query_sum, self.query_count, self.reply_sum, self.reply_count, self.memory_bias = arrays
        self.layout = object()

    def _checked(self, rows: Sequence[int]) -> list[int]:
        chosen = _integers(rows, "row")
        for row in chosen:
            if not 0 <= row < self.batch:
                raise PromptError(f"row {row} is not in a state of {self.batch} rows")
        return chosen

    def _mark(self, row: int, length: int) -> Mark | None:
        """What the sums were when the row had `length` tokens; None where nothing reads them."""
        now = int(self.lengths[row])
        if not 0 <= length <= now:
            raise PromptError(f"row {row} has {now} tokens and cannot be cut back to {length}")
        if length == now:
            return None
        if length == 0:
            return Mark(0, np.float32(0), np.float32(0), np.float32(0), np.float32(0))
        mark = self.marks[row].at(length)
        if mark is None and self.gate_reads_query:
            below = max(known for known in self.cut_lengths(row) if known < length)
            raise PromptError(
                f"row {row} cannot be cut back to {length} tokens: the gate's query there is not known; the nearest "
                f"length below is {below}"
            )
        return mark


def _integers(values: Sequence[int], what: str) -> list[int]:
    """Whole numbers, NumPy's too. Raises PromptError for others: a mask of booleans names no rows."""
    found = []
    for value in values:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise PromptError(f"{what} {value!r} is not a whole number")
        found.append(int(value))
    return found
