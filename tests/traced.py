"""Traces, kept for the session: PyTorch's exporter takes nine tenths of a tiny model's export, and tests export the
same model with many settings that only the passes after the trace look at.

A trace is found again by what it was made of: the pickle of the module that is traced, with its weights, its configs
and every other attribute. A module that cannot be pickled is traced each time.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import GenerationConfig

from export.trace import STREAMS, TracedGraph
from export.two_stream import TwoStreamStep

Trace = Callable[[TwoStreamStep], TracedGraph]


def kept(trace: Trace, folder: Path) -> Trace:
    """`trace`, which keeps what it makes in `folder`. Several processes may share it."""

    def look_up(step: TwoStreamStep) -> TracedGraph:
        key = _key(step)
        if key is None:
            return trace(step)
        path = folder / f"{key}.onnx"
        if path.is_file():
            return TracedGraph(ir.load(path), STREAMS[: step.layout.streams])
        traced = trace(step)
        draft = path.with_suffix(f".{os.getpid()}")
        ir.save(traced.model, draft, format="protobuf")
        draft.replace(path)
        return traced

    return look_up


def _key(step: TwoStreamStep) -> str | None:
    written = io.BytesIO()
    try:
        _Alike(written).dump(step)
    except (pickle.PicklingError, AttributeError, TypeError):  # a closure, or a handle
        return None
    return hashlib.sha256(written.getvalue()).hexdigest()


class _Alike(pickle.Pickler):
    """The same for modules that differ in where their files and values are, in the order of a set, or in what only
    transformers' own generate() reads."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.places: dict[int, int] = {}

    def persistent_id(self, value: object) -> str | None:
        if isinstance(value, torch.Tensor):
            place = self.places.setdefault(value.data_ptr(), len(self.places))  # the same one, if weights are tied
            content = hashlib.sha256(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            return f"{place} {type(value)} {value.dtype} {value.shape} {value.requires_grad} {content}"
        if isinstance(value, str) and value.startswith("/"):
            return "a path"
        if isinstance(value, GenerationConfig):  # holds a hash of its own, of this process
            return "what generate() does"
        if isinstance(value, set | frozenset):
            return f"a set of {sorted(map(repr, value))}"
        return None
