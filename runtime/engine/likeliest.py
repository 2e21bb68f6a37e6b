"""The likeliest tokens, by NumPy. Imports without onnxruntime: samplers use it too."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def likeliest(logits: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row of `logits` (rows, vocab), the largest first and the lowest id on a tie: ids (rows, k)
    int64 and values."""
    if k == 1:
        ids = logits.argmax(-1)[:, None]
        return ids, np.take_along_axis(logits, ids, -1)
    ids = np.argpartition(logits, -k, -1)[:, -k:] if k < logits.shape[-1] else np.arange(k)[None].repeat(len(logits), 0)
    ids = np.sort(ids, -1)
    values = np.take_along_axis(logits, ids, -1)
    order = np.argsort(-values, -1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(values, order, -1)
