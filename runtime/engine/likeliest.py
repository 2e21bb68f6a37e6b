"""The likeliest tokens, by NumPy, without sorting a vocabulary. Imports without onnxruntime: samplers use it too."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BLOCK = 64
"""Values whose largest is found first: most of a vocabulary is then left alone."""


def likeliest(logits: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row of `logits` (rows, vocab), the largest first and the lowest id on a tie: ids (rows, k)
    int64 and values."""
    if k == 1:
        ids = logits.argmax(-1)[:, None]
        return ids, np.take_along_axis(logits, ids, -1)
    ids = np.stack([_largest_of(row, k) for row in logits])
    return ids, np.take_along_axis(logits, ids, -1)


def among_largest(values: Array, k: int) -> Array:
    """Indices, ascending, of all values (N,) that are at least as large as some value that has k - 1 others as large:
    k or somewhat more. All of them if there are no more, or if one is "not a number"."""
    blocks = len(values) // BLOCK
    if k >= len(values):
        return np.arange(len(values))
    if k >= blocks:
        heads = np.partition(values, -k)[-k:]  # "not a number" is at its end
        least = heads[0]
    else:
        heads = values[: blocks * BLOCK].reshape(BLOCK, blocks).max(0)  # along the memory
        least = np.partition(heads, -k)[-k]  # k blocks have a value that large
    if np.isnan(heads).any() or np.isnan(values[blocks * BLOCK :]).any():
        return np.arange(len(values))
    return np.flatnonzero(values >= least)


def _largest_of(row: Array, k: int) -> Array:
    ids = among_largest(row, k)
    values = row[ids]
    values = np.where(np.isnan(values), np.inf, values)  # it comes first, so that whoever checks the values sees it
    return ids[np.argsort(-values, kind="stable")][:k]
