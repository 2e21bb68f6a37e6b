"""What a set of texts has been so far, between the steps of a session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cache import KVCache

if TYPE_CHECKING:
    from .step import DecodeBinding

Array = NDArray[Any]


class StepOutput(NamedTuple):
    """logits: (B, vocab) float32 for each row's next token. gate_mean: (B,) float32, 1 is only the base memory; None
    in a base-only artifact."""

    logits: Array
    gate_mean: Array | None


@dataclass
class DecodeState:
    """What B texts have been so far: caches of every group of rows, lengths, and the gate's query.

    lengths: (B,) tokens in the caches. query_sum (B, 2, d) and query_count (B,) make the query means of (base,
    adapter); reply_sum and reply_count hold the tokens generated since, which belong to the query as soon as the
    conversation goes on. pending: per row a token that was chosen but not fed yet. memory_bias: (B,), added to the
    gate before its sigmoid.
    """

    caches: dict[str, KVCache]
    lengths: NDArray[np.int64]
    query_sum: NDArray[np.float32]
    query_count: NDArray[np.float32]
    reply_sum: NDArray[np.float32]
    reply_count: NDArray[np.float32]
    memory_bias: NDArray[np.float32]
    pending: list[int | None]
    decode_binding: DecodeBinding | None = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return len(self.lengths)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches.values())
