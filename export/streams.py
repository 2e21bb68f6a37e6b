"""Rows of the two streams, stacked along the first axis: base rows first; and which layers have which rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true


@dataclass(frozen=True)
class StreamLayout:
    """streams: 1 (the base stream alone) or 2. trunk: how many of the first layers the adapter does not change; they
    are computed once, for both streams. portable: one attention node per stream, as onnxruntime below 1.32 and
    execution providers other than the CPU's take it, instead of one for the rows of both.

    A group is a set of rows with its own cache: "base", "adapter", "both" (base rows first) or "shared" (the
    trunk's, which belong to both streams).
    """

    streams: int
    trunk: int = 0
    portable: bool = False

    def groups(self, layer: int) -> tuple[str, ...]:
        """The groups that a layer's rows are split into, in the order of the rows."""
        if self.streams == 1:
            return ("base",)
        if layer < self.trunk:
            return ("shared",)
        return ("base", "adapter") if self.portable else ("both",)

    @staticmethod
    def rows(group: str) -> int:
        """How many rows a group has for each text."""
        return 2 if group == "both" else 1

    def stack(self, tensor: Tensor) -> Tensor:
        """(B, ...) -> one copy per stream, (streams * B, ...)."""
        return torch.cat([tensor] * self.streams) if self.streams > 1 else tensor

    def stack_to(self, tensor: Tensor, rows: int) -> Tensor:
        """`tensor` stacked if it has one row where the streams have `rows` (streams * B) together, else as it is."""
        one_row_a_text = tensor.dim() > 0 and statically_known_true(tensor.shape[0] * self.streams == rows)
        return self.stack(tensor) if one_row_a_text else tensor

    def stack_all(self, value: Any, rows: int) -> Any:
        """`stack_to` of every tensor in a nest of tuples, lists and dicts."""
        if isinstance(value, Tensor):
            return self.stack_to(value, rows)
        if isinstance(value, tuple | list):
            return type(value)(self.stack_all(item, rows) for item in value)
        if isinstance(value, dict):
            return {name: self.stack_all(item, rows) for name, item in value.items()}
        return value


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
