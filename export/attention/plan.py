"""What the attention of every layer asks for, found by one eager forward pass.

transformers' attention interface lets a function stand in for attention in every architecture that uses it. The probe
registered here records what each layer asks for and computes nothing; `attention_nodes` writes it into the graph.
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

from imsm_core.backbone import last_hidden_state
from imsm_core.errors import first_line

from ..errors import UnsupportedError
from ..experts import ExpertsPlan, plan_experts
from ..replaced import replaced
from .families import through_interface
from .masks import MaskRule, causal_window
from .rotary import (
    RotaryCall,
    RotaryPlan,
    fixed_tables,
    recognize,
    refuse_changing_rotation,
    replaced_rotary,
    rotary_function,
    tables,
)

HEAD_SIZE_MULTIPLE = 8  # GroupQueryAttention's kernels refuse other head sizes; heads are padded with zeros up to it
MOST_PADDING = 512  # positions past the context that a row of a ragged step may be padded to: every graph takes them
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
        call = recognize(original, result, *args, **kwargs)
        probe.rotary_calls.append(call)
        probe.pending = call
        return result

    try:
        with attention_by(model, "imsm_probe"), replaced_rotary(model, record_rotary), torch.no_grad():
            embeddings = model.get_input_embeddings()(torch.tensor([[0, 1, 2]]))
            last_hidden_state(model, inputs_embeds=embeddings, position_ids=torch.tensor([[5, 6, 7]]))
        if sorted(probe.layers) != list(range(layer_count)):
            raise UnsupportedError(_why_layers_are_missing(model, len(probe.layers), layer_count))
        rotary = _plan_rotary(model, probe, context)
    except UnsupportedError as error:
        message = error.args[0]  # in which settings are still placeholders
        raise UnsupportedError(f"architecture {kind!r} is not supported: {message}") from error
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
    if fused:  # a ragged chunk's padding has positions too, past the context at worst
        cos_sin = (
            functional.pad(cos_sin[0], (0, 0, 0, MOST_PADDING)),
            functional.pad(cos_sin[1], (0, 0, 0, MOST_PADDING)),
        )
    return RotaryPlan("fused" if fused else "node", interleaved, *cos_sin, fixed)


@contextmanager
def attention_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside the block attention is the function that the interface knows by `name`."""
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
    index = layer_index(module, arguments)
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


def layer_index(module: nn.Module, arguments: dict[str, Any]) -> int:
    """Which layer's attention is running."""
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


def _record_mask(batch_size: int, q_length: int, kv_length: int, mask_function: MaskRule, **settings: Any) -> Tensor:
    """The probe's mask: a causal one; noted, since the layer that gets it follows `mask_function`."""
    assert _probe is not None
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool).tril()
    _probe.masks.append((mask, mask_function))
    return mask


AttentionInterface.register("imsm_probe", _record)
ALL_MASK_ATTENTION_FUNCTIONS.register("imsm_probe", _record_mask)
