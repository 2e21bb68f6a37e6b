"""Rows of the two streams, stacked along the first axis: base rows first."""

from __future__ import annotations

import torch
from torch import Tensor


def split_streams(x: Tensor, streams: int) -> list[Tensor]:
    """(streams * B, ...) -> one (B, ...) per stream, as one ONNX Split node (torch's own split exports as sequences
    when B is symbolic)."""
    if streams == 1:
        return [x]
    shape = (x.shape[0] // streams, *x.shape[1:])
    return list(
        torch.onnx.ops.symbolic_multi_out(
            "Split", [x], {"axis": 0, "num_outputs": streams}, dtypes=[x.dtype] * streams, shapes=[shape] * streams
        )
    )
