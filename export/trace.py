"""Tracing a two-stream step into an ONNX graph in memory. Knows nothing about files."""

from __future__ import annotations

import io
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from types import FrameType

import onnx_ir as ir
import torch
from torch import Tensor

from imsm_core.backbone import hidden_size
from imsm_core.errors import first_line

from .attention.nodes import LayerCaches
from .errors import TraceError, UnsupportedError
from .simplify import simplify
from .streams import StreamLayout
from .two_stream import StepInputs, TwoStreamStep

OPSET = 20
STREAMS = ("base", "adapter")

# Sizes that the sample inputs have, all different, so that no dimension is taken for another one.
_BATCH, _SEQUENCE, _PAST, _WANTED = 2, 5, 7, 3


@dataclass(frozen=True)
class TracedGraph:
    """The graph as traced, before any pass, and the names of its streams."""

    model: ir.Model
    streams: tuple[str, ...]


def trace(step: TwoStreamStep) -> TracedGraph:
    """Trace `step` with symbolic batch, sequence, past and wanted positions; names every input and output."""
    streams = STREAMS[: step.layout.streams]
    sample = _sample_inputs(step)
    try:
        with torch.no_grad(), _kept_interrupt(), _quiet():
            program = torch.onnx.export(
                step,
                tuple(sample),
                dynamo=True,
                dynamic_shapes=(_dynamic_shapes(sample),),
                input_names=[*StepInputs._fields[:-1], *_cache_names("past_key_values", step)],
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            simplify(program.model)
    except torch.onnx.OnnxExporterError as error:
        raise UnsupportedError(
            f"architecture {step.model.config.model_type!r} is not supported: {_why(error.__cause__ or error)}"
        ) from error
    model = program.model
    names = _output_names(step)
    if len(names) != len(model.graph.outputs):
        raise TraceError(f"the trace has {len(model.graph.outputs)} outputs, not {len(names)}")
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name
    return TracedGraph(model, streams)


def _why(cause: BaseException) -> str:
    name = type(cause).__name__
    if "DataDependent" in name:  # PyTorch has a separate class for each place where it finds out
        return "which of its operations run depends on values, which a graph cannot express"
    return f"PyTorch cannot trace it ({name}: {first_line(cause)})"


def cache_name(direction: str, group: str, layer: int, part: str) -> str:
    """direction: past_key_values or present; group: a group of rows, see `StreamLayout`; part: key or value."""
    return f"{direction}.{group}.{layer}.{part}"


def _cache_names(direction: str, step: TwoStreamStep) -> list[str]:
    return [
        cache_name(direction, group, layer, part)
        for layer in range(len(step.plan.layers))
        for group in step.layout.groups(layer)
        for part in ("key", "value")
    ]


def _output_names(step: TwoStreamStep) -> list[str]:
    gated = ["hidden_adapter", "hidden_fused", "gate", "gate_mean", "present_query_sum", "present_query_count"]
    present = _cache_names("present", step)
    return ["hidden_base", *(gated if step.gate is not None else []), "logits", *present]


def _sample_inputs(step: TwoStreamStep) -> StepInputs:
    width = hidden_size(step.model)
    return StepInputs(
        input_ids=torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64),
        position_ids=torch.arange(_PAST, _PAST + _SEQUENCE).repeat(_BATCH, 1),
        seqlens_k=torch.full((_BATCH,), _PAST + _SEQUENCE - 1, dtype=torch.int32),
        total_sequence_length=torch.tensor(_PAST + _SEQUENCE, dtype=torch.int32),
        query_seqlens=torch.full((_BATCH,), _SEQUENCE, dtype=torch.int32),
        logit_positions=torch.zeros(_BATCH, _WANTED, dtype=torch.int64),
        query_mask=torch.ones(_BATCH, _SEQUENCE),
        past_query_sum=torch.zeros(_BATCH, 2, width),
        past_query_count=torch.zeros(_BATCH),
        memory_bias=torch.zeros(_BATCH, _WANTED),
        memory=torch.zeros(_BATCH, _WANTED, dtype=torch.int64),
        past=_sample_caches(step),
    )


def _sample_caches(step: TwoStreamStep) -> list[LayerCaches]:
    dtype = torch.int8 if step.kv_scales is not None else step.dtype

    def empty(group: str, kv_heads: int, size: int) -> Tensor:
        return torch.zeros(_BATCH * StreamLayout.rows(group), kv_heads, _PAST, size, dtype=dtype)

    return [
        [
            (empty(group, layer.kv_heads, layer.cached_head_size), empty(group, layer.kv_heads, layer.cached_head_size))
            for group in step.layout.groups(index)
        ]
        for index, layer in enumerate(step.plan.layers)
    ]


def _dynamic_shapes(sample: StepInputs) -> tuple[object, ...]:
    auto = torch.export.Dim.AUTO
    row, tokens, cache = {0: auto}, {0: auto, 1: auto}, {0: auto, 2: auto}
    shapes: dict[str, object] = {
        "input_ids": tokens,
        "position_ids": tokens,
        "seqlens_k": row,
        "total_sequence_length": None,
        "query_seqlens": row,
        "logit_positions": tokens,
        "query_mask": tokens,
        "past_query_sum": row,
        "past_query_count": row,
        "memory_bias": tokens,
        "memory": tokens,
        "past": [[(cache, cache) for _ in groups] for groups in sample.past],
    }
    return tuple(shapes[name] for name in StepInputs._fields)


@contextmanager
def _kept_interrupt() -> Iterator[None]:
    """Tracing runs callbacks in which Python drops any exception, even Ctrl-C's; it is then raised at the end."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        raise KeyboardInterrupt


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress, its optional dependencies and, where it fails, the whole graph so far; a user
    can do nothing about any of them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
