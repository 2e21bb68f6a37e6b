"""Attention of every layer as GroupQueryAttention nodes, one per stream, each with its own cache.

transformers' attention interface lets a function stand in for attention in every architecture that uses it. Two are
registered here: a probe, which records what each layer asks for (and computes nothing), and the emitter, which the
trace runs.

GroupQueryAttention: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from .experts import ExpertsPlan, emitting_experts, plan_experts
from .families import through_interface
from .masks import MaskRule, causal_window
from .replaced import replaced
from .rotary import (
    RotaryCall,
    RotaryPlan,
    fixed_rotary,
    fixed_tables,
    recognise,
    refuse_changing_rotation,
    replaced_rotary,
    rotary_function,
    rotary_node,
    tables,
)
from .streams import split_streams

HEAD_SIZE_MULTIPLE = 8  # GroupQueryAttention's kernels refuse other head sizes; heads are padded with zeros up to it
FUSED_ROTARY_MULTIPLE = 16  # ... and with do_rotary other sizes than these
IGNORED_ARGUMENTS = {"position_ids", "use_cache", "cache_position", "output_attentions", "layer_idx"}
ATTENTION_LAYER_TYPES = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
STATEFUL = "its layers keep a state that is not a key/value cache"

KeyBias = Callable[[Tensor, Tensor], Tensor]
"""(positions (T,) of the keys, the last of them ()), both float32 -> (heads, T), added to the scores of every query.
What ALiBi is up to a constant per query, which softmax does not see; families/ passes it as `key_bias`."""


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention asks for, as the probe saw it. head_size: the queries' and keys'; value_size: the
    values' (fewer in multi-head latent attention)."""

    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    rotated: bool

    @property
    def cached_head_size(self) -> int:
        """What head_size and value_size are padded to: one size, which the kernels take."""
        return -(-max(self.head_size, self.value_size) // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE


@dataclass
class AttentionPlan:
    """How the attention of a model, and its experts if it has any, are written into the graph."""

    layers: list[LayerAttention]
    rotary: RotaryPlan
    experts: ExpertsPlan


@dataclass
class StepTensors:
    """What one traced step gives the attention of every layer and collects from it. past and present are indexed
    [stream][layer] and hold (key, value), each (B, kv_heads, length, cached_head_size). position_ids: (streams * B,
    S). seqlens_k, total_sequence_length: one per stream, virtual tokens counted in. cos, sin: the rotary tables, if the
    plan has them. attention_biases: (1, heads, S, total) per stream, computed by the first layer that has a key bias,
    for all of them."""

    plan: AttentionPlan
    streams: int
    position_ids: Tensor
    seqlens_k: list[Tensor]
    total_sequence_length: list[Tensor]
    cos: Tensor | None
    sin: Tensor | None
    past: list[list[tuple[Tensor, Tensor]]]
    present: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    attention_biases: list[Tensor] = field(default_factory=list)

    def lengths(self, stream: int) -> tuple[Tensor, Tensor]:
        """seqlens_k and total_sequence_length of a stream."""
        return self.seqlens_k[stream], self.total_sequence_length[stream]


_step: StepTensors | None = None
_probe: _Probe | None = None


@dataclass
class _Probe:
    context: int
    masks: list[tuple[Tensor, MaskRule]] = field(default_factory=list)
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
    kind = model.config.model_type
    if model._is_stateful and _other_layers(model) != []:
        raise UnsupportedError(f"architecture {kind!r} is not supported: {STATEFUL}")
    _probe = probe = _Probe(context)
    original = rotary_function(model)

    def record_rotary(*args: Any, **kwargs: Any) -> Any:
        assert original is not None
        result = original(*args, **kwargs)
        call = recognise(original, result, *args, **kwargs)
        probe.rotary_calls.append(call)
        probe.pending = call
        return result

    try:
        with _attention(model, "imsm_probe"), replaced_rotary(model, record_rotary), torch.no_grad():
            embeddings = model.get_input_embeddings()(torch.tensor([[0, 1, 2]]))
            last_hidden_state(model, inputs_embeds=embeddings, position_ids=torch.tensor([[5, 6, 7]]))
        if sorted(probe.layers) != list(range(layer_count)):
            raise UnsupportedError(_why_layers_are_missing(model, len(probe.layers), layer_count))
        rotary = _plan_rotary(model, probe, context)
    except UnsupportedError as error:
        raise UnsupportedError(f"architecture {kind!r} is not supported: {error}") from error
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(
            f"architecture {kind!r} is not supported: its backbone does not run with another attention "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        _probe = None
    return AttentionPlan([probe.layers[i] for i in range(layer_count)], rotary, plan_experts(model))


def _other_layers(model: PreTrainedModel) -> list[str] | None:
    """The types of layer other than attention that the config names; None: it names no types at all."""
    types = getattr(model.config, "layer_types", None)
    return sorted(set(types) - ATTENTION_LAYER_TYPES) if types else None


def _why_layers_are_missing(model: PreTrainedModel, found: int, layer_count: int) -> str:
    if others := _other_layers(model):
        return f"{STATEFUL} ({', '.join(others)})"
    return f"{found} of its {layer_count} layers use transformers' attention interface"


def _plan_rotary(model: PreTrainedModel, probe: _Probe, context: int) -> RotaryPlan:
    refuse_changing_rotation(model, context)
    fixed = fixed_tables(model, context)
    if not probe.rotary_calls:
        return RotaryPlan("none", fixed=fixed)
    styles = {call.style for call in probe.rotary_calls}
    widths = {call.width for call in probe.rotary_calls}
    if len(styles) > 1 or None in styles or len(widths) > 1:
        return RotaryPlan("traced", fixed=fixed)
    interleaved = styles == {"interleaved"}
    cos_sin = tables(model, context, interleaved)
    if cos_sin is None:
        return RotaryPlan("traced", fixed=fixed)
    fused = (
        probe.rotated_queries_reach_attention
        and widths == {layer.head_size for layer in probe.layers.values()}
        and all(layer.head_size % FUSED_ROTARY_MULTIPLE == 0 for layer in probe.layers.values())
        and all(layer.head_size == layer.cached_head_size for layer in probe.layers.values())
    )
    return RotaryPlan("fused" if fused else "node", interleaved, *cos_sin, fixed)


@contextmanager
def emitting(model: PreTrainedModel, step: StepTensors) -> Iterator[None]:
    """Inside the block the backbone's attention emits nodes for `step` and fills `step.present`."""
    global _step
    step.present = [[] for _ in range(step.streams)]
    _step = step
    try:
        with (
            _attention(model, "imsm_emit"),
            emitting_experts(model, step.plan.experts),
            replaced_rotary(model, _EMITTED_ROTARY.get(step.plan.rotary.mode)),
            fixed_rotary(step.plan.rotary),
        ):
            yield
    finally:
        _step = None


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    with replaced(model.config, "_attn_implementation", name), through_interface(model):
        yield


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
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    key_bias: KeyBias | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The probe: notes the layer's shapes and settings; returns zeros of the right shape."""
    assert _probe is not None
    unknown = [name for name, value in arguments.items() if value is not None and name not in IGNORED_ARGUMENTS]
    if unknown:
        raise UnsupportedError(
            f"{type(module).__name__} passes {', '.join(unknown)} to attention, which GroupQueryAttention lacks"
        )
    if key.shape[2] != query.shape[2]:
        raise UnsupportedError(f"{type(module).__name__} attends to other tokens than its own")
    index = _layer_index(module, arguments)
    if index in _probe.layers:
        raise UnsupportedError(f"its attention layer {index} runs more than once in a step")
    pending, _probe.pending = _probe.pending, None
    if pending is not None and pending.query is not query:
        _probe.rotated_queries_reach_attention = False
    _probe.layers[index] = LayerAttention(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_size=query.shape[-1],
        value_size=value.shape[-1],
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        sliding_window=_window(module, attention_mask, sliding_window, is_causal),
        softcap=softcap,
        rotated=pending is not None,
    )
    batch, heads, sequence, _ = query.shape
    return torch.zeros(batch, sequence, heads, value.shape[-1]), None


def _layer_index(module: nn.Module, arguments: dict[str, Any]) -> int:
    index = arguments.get("layer_idx")
    return int(module.layer_idx if index is None else index)  # type: ignore[arg-type]


def _window(
    module: nn.Module, attention_mask: Tensor | None, sliding_window: int | None, is_causal: bool | None
) -> int | None:
    """The layer's window. The mask decides, where there is one, as it does in PyTorch's own attention."""
    assert _probe is not None
    if attention_mask is None:
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise UnsupportedError(f"{type(module).__name__} looks at later tokens")
        return sliding_window
    for mask, rule in _probe.masks:
        if mask is attention_mask:
            return causal_window(rule, _probe.context)
    raise UnsupportedError(f"{type(module).__name__} makes its attention mask by itself")


def _emit(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """The emitter. query: (streams * B, heads, S, D), the streams' rows stacked. Returns (streams * B, S, heads,
    value_size)."""
    assert _step is not None
    index = _layer_index(module, arguments)
    layer = _step.plan.layers[index]
    key_bias, sink = arguments.get("key_bias"), arguments.get("s_aux")
    if key_bias is not None and not _step.attention_biases:
        _step.attention_biases = _attention_biases(key_bias, _step, query.shape[2])
    outputs = []
    split = [split_streams(_heads_last(x, layer.cached_head_size), _step.streams) for x in (query, key, value)]
    for stream, (q, k, v) in enumerate(zip(*split, strict=True)):
        bias = None if key_bias is None else _step.attention_biases[stream]
        output, present = _group_query_attention(layer, _step, stream, index, q, k, v, bias, sink)
        _step.present[stream].append(present)
        outputs.append(output)
    stacked = torch.cat(outputs, dim=0) if _step.streams > 1 else outputs[0]
    rows, _, sequence, _ = query.shape
    return stacked.view(rows, sequence, layer.heads, layer.cached_head_size)[..., : layer.value_size], None


def _attention_biases(key_bias: KeyBias, step: StepTensors, sequence: int) -> list[Tensor]:
    """One per stream, the same one where the streams are equally long."""
    found: list[Tensor] = []
    for stream, total in enumerate(step.total_sequence_length):
        equal = [other for other in range(stream) if step.total_sequence_length[other] is total]
        found.append(found[equal[0]] if equal else _attention_bias(key_bias, step, stream, sequence))
    return found


def _attention_bias(key_bias: KeyBias, step: StepTensors, stream: int, sequence: int) -> Tensor:
    """(1, heads, S, total): the kernel wants `total_sequence_length` columns, not as many as a longer cache has."""
    total = step.total_sequence_length[stream]
    zero, one = torch.zeros_like(total), torch.ones_like(total)
    # The size of the result is the value of `total`, which no shape in the trace has; only broadcasting follows.
    length = step.past[stream][0][0].shape[2] + sequence
    positions = torch.onnx.ops.symbolic("Range", [zero, total, one], dtype=total.dtype, shape=(length,))
    bias = key_bias(positions.float(), (total - 1).float())
    return bias[None, :, None, :] + torch.zeros(sequence)[None, None, :, None]


def _group_query_attention(
    layer: LayerAttention,
    step: StepTensors,
    stream: int,
    index: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_bias: Tensor | None,
    sink: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """query: (B, S, heads * D); key, value: (B, S, kv_heads * D). Returns the output like query, and present."""
    past_key, past_value = step.past[stream][index]
    inputs: list[Tensor | None] = [query, key, value, past_key, past_value, *step.lengths(stream)]
    attributes: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
    fused = layer.rotated and step.plan.rotary.mode == "fused"
    if fused:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(step.plan.rotary.interleaved)}
    if layer.sliding_window is not None:
        attributes["local_window_size"] = layer.sliding_window
    if layer.softcap is not None:
        attributes["softcap"] = layer.softcap
    inputs += [step.cos, step.sin] if fused else [None, None]
    inputs += [None, attention_bias, sink]  # None: position_ids; the kernel counts them from seqlens_k
    while inputs[-1] is None:
        inputs.pop()
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


def _record_mask(batch_size: int, q_length: int, kv_length: int, mask_function: MaskRule, **settings: Any) -> Tensor:
    """The probe's mask: a causal one, that the layer which gets it is known to follow `mask_function`."""
    assert _probe is not None
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool).tril()
    _probe.masks.append((mask, mask_function))
    return mask


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """GroupQueryAttention is causal by itself and masks by `seqlens_k`."""


AttentionInterface.register("imsm_probe", _record)
AttentionInterface.register("imsm_emit", _emit)
ALL_MASK_ATTENTION_FUNCTIONS.register("imsm_probe", _record_mask)
ALL_MASK_ATTENTION_FUNCTIONS.register("imsm_emit", _no_mask)
