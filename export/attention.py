"""Attention of every layer as GroupQueryAttention nodes, one per stream, each with its own cache.

transformers' attention interface lets a function stand in for attention in every architecture that uses it. Two are
registered here: a probe, which records what each layer asks for (and computes nothing), and the emitter, which the
trace runs.

GroupQueryAttention: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from imsm_core.backbone import first_line, last_hidden_state

from .errors import UnsupportedError
from .rotary import (
    FUNCTION,
    RotaryCall,
    RotaryPlan,
    modelling_module,
    probe_call,
    replaced_rotary,
    rotary_node,
    tables,
)
from .streams import split_streams

HEAD_SIZE_MULTIPLE = 8  # GroupQueryAttention's kernels refuse other head sizes; heads are padded with zeros up to it
FUSED_ROTARY_MULTIPLE = 16  # ... and with do_rotary other sizes than these
IGNORED_ARGUMENTS = {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal", "layer_idx"}


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention asks for, as the probe saw it."""

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    rotated: bool

    @property
    def cached_head_size(self) -> int:
        """head_size rounded up to what the kernels take."""
        return -(-self.head_size // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE


@dataclass
class AttentionPlan:
    """How the attention of a model is written into the graph."""

    layers: list[LayerAttention]
    rotary: RotaryPlan


@dataclass
class StepTensors:
    """What one traced step gives the attention of every layer and collects from it. past and present are indexed
    [stream][layer] and hold (key, value), each (B, kv_heads, length, cached_head_size). position_ids: (streams * B,
    S). seqlens_k, total_sequence_length: one per stream, virtual tokens counted in. cos, sin: the rotary tables, if the
    plan has them."""

    plan: AttentionPlan
    streams: int
    position_ids: Tensor
    seqlens_k: list[Tensor]
    total_sequence_length: list[Tensor]
    cos: Tensor | None
    sin: Tensor | None
    past: list[list[tuple[Tensor, Tensor]]]
    present: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)

    def lengths(self, stream: int) -> tuple[Tensor, Tensor]:
        """seqlens_k and total_sequence_length of a stream."""
        return self.seqlens_k[stream], self.total_sequence_length[stream]


_step: StepTensors | None = None
_probe: _Probe | None = None


@dataclass
class _Probe:
    layers: dict[int, LayerAttention] = field(default_factory=dict)
    rotary_calls: list[RotaryCall] = field(default_factory=list)
    rotated_queries_reach_attention: bool = True
    pending: RotaryCall | None = None


def plan_attention(model: PreTrainedModel, layer_count: int, context: int) -> AttentionPlan:
    """Run the backbone once on three tokens and see what its attention asks for.

    Raises UnsupportedError, naming the architecture, when a layer does not go through transformers' attention
    interface or asks for something that GroupQueryAttention cannot do.
    """
    global _probe
    _probe = probe = _Probe()
    original = getattr(modelling_module(model), FUNCTION, None)

    def record_rotary(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert original is not None
        call = probe_call(original, query, key, *args, **kwargs)
        probe.rotary_calls.append(call)
        probe.pending = call
        return call.query, key

    try:
        with _attention(model, "imsm_probe"), replaced_rotary(model, record_rotary), torch.no_grad():
            embeddings = model.get_input_embeddings()(torch.tensor([[0, 1, 2]]))
            last_hidden_state(model, inputs_embeds=embeddings, position_ids=torch.tensor([[5, 6, 7]]))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"architecture {model.config.model_type!r} is not supported: its backbone does not run with another "
            f"attention ({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        _probe = None
    if sorted(probe.layers) != list(range(layer_count)):
        raise UnsupportedError(
            f"architecture {model.config.model_type!r} is not supported: {len(probe.layers)} of its {layer_count} "
            "layers use transformers' attention interface"
        )
    return AttentionPlan([probe.layers[i] for i in range(layer_count)], _plan_rotary(model, probe, context))


def _plan_rotary(model: PreTrainedModel, probe: _Probe, context: int) -> RotaryPlan:
    if not probe.rotary_calls:
        return RotaryPlan("none")
    styles = {call.style for call in probe.rotary_calls}
    widths = {call.width for call in probe.rotary_calls}
    if len(styles) > 1 or None in styles or len(widths) > 1:
        return RotaryPlan("traced")
    interleaved = styles == {"interleaved"}
    cos_sin = tables(model, context, interleaved)
    if cos_sin is None:
        return RotaryPlan("traced")
    fused = (
        probe.rotated_queries_reach_attention
        and widths == {layer.head_size for layer in probe.layers.values()}
        and all(layer.head_size % FUSED_ROTARY_MULTIPLE == 0 for layer in probe.layers.values())
    )
    return RotaryPlan("fused" if fused else "node", interleaved, *cos_sin)


@contextmanager
def emitting(model: PreTrainedModel, step: StepTensors) -> Iterator[None]:
    """Inside the block the backbone's attention emits nodes for `step` and fills `step.present`."""
    global _step
    step.present = [[] for _ in range(step.streams)]
    _step = step
    try:
        with _attention(model, "imsm_emit"), replaced_rotary(model, _EMITTED_ROTARY.get(step.plan.rotary.mode)):
            yield
    finally:
        _step = None


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The probe: notes the layer's shapes and settings; returns zeros of the right shape."""
    assert _probe is not None
    unknown = [name for name, value in arguments.items() if value is not None and name not in IGNORED_ARGUMENTS]
    kind = type(module).__name__
    if unknown:
        raise UnsupportedError(f"{kind} passes {', '.join(unknown)} to attention, which GroupQueryAttention lacks")
    if key.shape[-1] != value.shape[-1] or query.shape[-1] != key.shape[-1]:
        raise UnsupportedError(
            f"{kind} has query, key and value heads of sizes {query.shape[-1]}, {key.shape[-1]} and "
            f"{value.shape[-1]}; GroupQueryAttention needs one size"
        )
    pending, _probe.pending = _probe.pending, None
    if pending is not None and pending.query is not query:
        _probe.rotated_queries_reach_attention = False
    _probe.layers[int(module.layer_idx)] = LayerAttention(  # type: ignore[arg-type]
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_size=query.shape[-1],
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        sliding_window=sliding_window,
        softcap=softcap,
        rotated=pending is not None,
    )
    batch, heads, sequence, size = query.shape
    return torch.zeros(batch, sequence, heads, size), None


def _emit(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """The emitter. query: (streams * B, heads, S, D), the streams' rows stacked. Returns (streams * B, S, heads, D)."""
    assert _step is not None
    index = int(module.layer_idx)  # type: ignore[arg-type]
    layer = _step.plan.layers[index]
    outputs = []
    split = [split_streams(_heads_last(x, layer.cached_head_size), _step.streams) for x in (query, key, value)]
    for stream, (q, k, v) in enumerate(zip(*split, strict=True)):
        output, present = _group_query_attention(layer, _step, stream, index, q, k, v)
        _step.present[stream].append(present)
        outputs.append(output)
    stacked = torch.cat(outputs, dim=0) if _step.streams > 1 else outputs[0]
    rows, _, sequence, _ = query.shape
    return stacked.view(rows, sequence, layer.heads, layer.cached_head_size)[..., : layer.head_size], None


def _group_query_attention(
    layer: LayerAttention, step: StepTensors, stream: int, index: int, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """query: (B, S, heads * D); key, value: (B, S, kv_heads * D). Returns the output like query, and present."""
    past_key, past_value = step.past[stream][index]
    inputs: list[Tensor | None] = [query, key, value, past_key, past_value, *step.lengths(stream)]
    attributes: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
    if layer.rotated and step.plan.rotary.mode == "fused":
        inputs += [step.cos, step.sin]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(step.plan.rotary.interleaved)}
    if layer.sliding_window is not None:
        attributes["local_window_size"] = layer.sliding_window
    if layer.softcap is not None:
        attributes["softcap"] = layer.softcap
    batch, _, past, size = past_key.shape
    cache = (batch, layer.kv_heads, past + query.shape[1], size)
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=[query.dtype] * 3,
        shapes=[query.shape, cache, cache],
        version=1,
    )
    return output, (present_key, present_value)


def _heads_last(x: Tensor, size: int) -> Tensor:
    """(rows, heads, S, D) -> (rows, S, heads * size), each head padded with zeros from D to size."""
    rows, heads, sequence, head_size = x.shape
    x = x.transpose(1, 2)
    if size != head_size:
        x = functional.pad(x, (0, size - head_size))
    return x.reshape(rows, sequence, heads * size)


def _pass_through(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """GroupQueryAttention rotates by itself."""
    return query, key


def _rotary_nodes(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    assert _step is not None
    assert _step.cos is not None
    assert _step.sin is not None
    tables = (_step.position_ids, _step.cos, _step.sin, _step.plan.rotary.interleaved)
    return rotary_node(query, *tables), rotary_node(key, *tables)


_EMITTED_ROTARY: dict[str, Any] = {"fused": _pass_through, "node": _rotary_nodes}


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """GroupQueryAttention is causal by itself and masks by `seqlens_k`."""


AttentionInterface.register("imsm_probe", _record)
AttentionInterface.register("imsm_emit", _emit)
ALL_MASK_ATTENTION_FUNCTIONS.register("imsm_probe", _no_mask)
ALL_MASK_ATTENTION_FUNCTIONS.register("imsm_emit", _no_mask)
