"""What a set of texts has been so far, between the steps of a session: rows that can be copied, joined, dropped and cut
back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from ..checks import instance, integers
from ..errors import PromptError, shown
from .journal import ARRAYS, Journal
from .marks import Mark, Marks

Array = NDArray[Any]


class StepOutput(NamedTuple):
    """logits: (B, vocab) float32 for each row's next token. gate_mean: (B,) float32, 1 is only the base memory; None
    in a base-only artifact. memory_logits: (B, 2, vocab) float32, those of the base memory alone and of the adapter's;
    None unless asked for."""

    logits: Array
    gate_mean: Array | None
    memory_logits: Array | None = None


class StepsOutput(NamedTuple):
    """Of S tokens that were fed at once: logits (S, vocab) float32 after each of them, for the next one. gate_mean (S,)
    and memory_logits (S, 2, vocab) float32: as in `StepOutput`."""

    logits: Array
    gate_mean: Array | None
    memory_logits: Array | None = None


class LikeliestOutput(NamedTuple):
    """ids: (B, k) int64, the k likeliest next tokens of each row, the likeliest first. logits: (B, k) float32, theirs.
    log_normalizer: (B,), the logarithm of the sum of exp(logits) over the vocabulary: `logits` minus it are
    log-probabilities in nats; None unless asked for. gate_mean: as in `StepOutput`."""

    ids: Array
    logits: Array
    log_normalizer: Array | None
    gate_mean: Array | None


@dataclass(eq=False, kw_only=True)
class DecodeState(Journal):
    """What B texts have been so far: caches of every group of rows, lengths, and the gate's query.

    lengths: (B,) tokens in the caches. query_sum (B, 2, d) and query_count (B,) make the query means of (base,
    adapter); reply_sum and reply_count hold the tokens generated since, which belong to the query as soon as the
    conversation continues. pending: per row a token that was chosen but not fed yet. memory_bias: (B,), added to the
    gate before its sigmoid. marks: per row, what the sums were at lengths that it can be cut back to. artifact: the
    hashes of the one that the state belongs to. gate_reads_query: whether its gate looks at the sums at all. layout:
    changes whenever the caches are replaced, so that bindings to them can tell. note: of a change that is under way,
    see `Journal`.

    Whatever is raised by a step or a change of rows, the state is as it was before. It belongs to one caller at a time:
    what another thread begins in the middle of a step raises PromptError.
    """

    artifact: str
    gate_reads_query: bool = True

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return len(self.lengths)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches.values())

    def take(self, rows: Sequence[int], lengths: Sequence[int] | None = None) -> DecodeState:
        """A separate state with copies of these rows, in this order; a row may come twice. lengths: cut back to these,
        one for each of `rows`, as `trim` would; what is cut is not copied. Raises PromptError for a row that does not
        exist and as `trim`."""
        self.settle()
        chosen = self._checked(rows)
        wanted = self.lengths[chosen].tolist() if lengths is None else integers(lengths, "length")
        if len(wanted) != len(chosen):
            raise PromptError(f"{len(wanted)} lengths for {len(chosen)} rows")
        found = [self._mark(row, length) for row, length in zip(chosen, wanted, strict=True)]
        made = self._copied(chosen, max(wanted, default=0))
        for row, (length, mark) in enumerate(zip(wanted, found, strict=True)):
            if length != made.lengths[row]:
                made._cut(row, length, mark)
        return made

    def _copied(self, chosen: Sequence[int], length: int) -> DecodeState:
        """Copies of rows, of whose caches the first `length` tokens are copied."""
        arrays: dict[str, Any] = {name: getattr(self, name)[chosen] for name in ARRAYS}
        return DecodeState(
            caches={group: cache.take(chosen, length) for group, cache in self.caches.items()},
            **arrays,
            pending=[self.pending[row] for row in chosen],
            marks=[self.marks[row].copy() for row in chosen],
            artifact=self.artifact,
            gate_reads_query=self.gate_reads_query,
        )

    def join(self, other: DecodeState) -> None:
        """Append copies of the other state's rows to this one's. Raises PromptError for a state of another artifact;
        both are then unchanged."""
        instance("other", other, DecodeState)
        if self.artifact != other.artifact:
            raise PromptError("states of different artifacts cannot be joined")
        self.settle()
        other.settle()
        length = int(max(self.lengths.max(initial=0), other.lengths.max(initial=0)))
        arrays: dict[str, Any] = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in ARRAYS}
        made = DecodeState(
            caches={group: cache.join(other.caches[group], length) for group, cache in self.caches.items()},
            **arrays,
            pending=[*self.pending, *other.pending],
            marks=[marks.copy() for marks in (*self.marks, *other.marks)],
            artifact=self.artifact,
        )
        self._turn_into(made)

    def replace(self, row: int, other: DecodeState) -> None:
        """Put a copy of the other state's one row in the place of this one's `row`, whose text is lost: cheaper than to
        drop and to join, since the other rows stay where they are. Raises PromptError for a row that does not exist,
        for a state of another artifact or of several rows, and for an empty one. After an exception in the middle
        of it the row is empty, and the others are as they were."""
        instance("other", other, DecodeState)
        if self.artifact != other.artifact:
            raise PromptError("a row cannot be replaced by one of another artifact's state")
        self.settle()
        other.settle()
        (row,) = self._checked([row])
        if other.batch != 1 or not other.lengths[0]:
            raise PromptError(f"a row is replaced by one with tokens; this state has rows of {other.lengths.tolist()}")
        length = int(other.lengths[0])
        self._empty(row)
        try:
            self.begin()
            for group, cache in self.caches.items():
                if cache.is_short_of(length):
                    self.layout = object()  # before it moves: the next may not get its memory
                    cache.reserve(length)
                if cache.replace(row, other.caches[group], length):
                    self.layout = object()
            for name in ARRAYS:
                getattr(self, name)[row] = getattr(other, name)[0]
            self.pending[row], self.marks[row] = other.pending[0], other.marks[0].copy()
            self.note = None
        except BaseException:
            self.undo()
            raise

    def drop(self, rows: Sequence[int]) -> None:
        """Remove these rows; the others move up, and the caches become as small as the longest of them allows. Raises
        PromptError for a row that does not exist."""
        self.settle()
        gone = set(self._checked(rows))
        kept = self.take([row for row in range(self.batch) if row not in gone])
        self._turn_into(kept)

    def trim(self, lengths: Sequence[int]) -> None:
        """Cut every row back to its first `lengths[row]` tokens: what follows equals a run that stopped there.

        The gate's query is a sum over the prompt, which is known where a prefill's chunk ended, before a prompt's last
        token, where a reply ended, and at the last `marks.RECENT` tokens that were decoded: `cut_lengths` says where.
        Where the gate does not read the query, any length works. Raises PromptError for a length that is longer than
        the row or not known; the state is then unchanged.
        """
        self.settle()
        wanted = integers(lengths, "length")
        if len(wanted) != self.batch:
            raise PromptError(f"{len(wanted)} lengths for {self.batch} rows")
        found: list[Mark | None] = [self._mark(row, length) for row, length in enumerate(wanted)]
        try:
            self.begin()
            for row, (length, mark) in enumerate(zip(wanted, found, strict=True)):
                if length != self.lengths[row]:
                    self._cut(row, length, mark)
            self.note = None
        except BaseException:
            self.undo()
            raise

    def ask(self) -> None:
        """Let every row's reply join the query, as the first act of reading a prompt."""
        for row in np.flatnonzero(self.reply_count) if self.gate_reads_query else ():
            arrays = (self.query_sum, self.query_count, self.reply_sum, self.reply_count)
            self.marks[row].add_read(Mark(int(self.lengths[row]), *(array[row].copy() for array in arrays)))
        self.query_sum += self.reply_sum
        self.query_count += self.reply_count
        self.reply_sum[:] = 0
        self.reply_count[:] = 0

    def cut_lengths(self, row: int) -> list[int]:
        """The lengths that `trim` takes for a row, ascending. Raises PromptError for a row that does not exist."""
        self.settle()
        (row,) = self._checked([row])
        length = int(self.lengths[row])
        return list(range(length + 1)) if not self.gate_reads_query else sorted({0, *self.marks[row].lengths, length})

    def __copy__(self) -> DecodeState:
        """A separate state; so `copy.copy` and `copy.deepcopy` are `take` of all rows."""
        return self.take(range(self.batch))

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeState:
        return self.take(range(self.batch))

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a state cannot be pickled: its caches are onnxruntime's; keep the text's tokens and read them")

    def _turn_into(self, made: DecodeState) -> None:
        try:
            self.begin()
            self._become(made)
            self.note = None
        except BaseException:
            self.undo()
            raise

    def _empty(self, row: int) -> None:
        try:
            self.begin()
            for name in ARRAYS:
                if name != "memory_bias":
                    getattr(self, name)[row] = 0
            self.pending[row], self.marks[row] = None, Marks()
            self.note = None
        except BaseException:
            self.undo()
            raise

    def _cut(self, row: int, length: int, mark: Mark | None) -> None:
        self.lengths[row] = length
        self.pending[row] = None
        self.marks[row].cut(length)
        if mark is not None:
            self.query_sum[row], self.query_count[row] = mark.query_sum, mark.query_count
            self.reply_sum[row], self.reply_count[row] = mark.reply_sum, mark.reply_count

    def _checked(self, rows: Sequence[int]) -> list[int]:
        chosen = integers(rows, "row")
        for row in chosen:
            if not 0 <= row < self.batch:
                raise PromptError(f"row {shown(row)} is not in a state of {self.batch} rows")
        return chosen

    def _mark(self, row: int, length: int) -> Mark | None:
        """What the sums were when the row had `length` tokens; None where nothing reads them."""
        now = int(self.lengths[row])
        if not 0 <= length <= now:
            raise PromptError(f"row {row} has {now} tokens and cannot be cut back to {shown(length)}")
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
