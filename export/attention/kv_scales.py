"""Key/value caches in int8: one scale a channel, found on texts.

GroupQueryAttention quantizes what it writes to the cache and reads it back with these scales, symmetric and per channel
of each head: cached = round(x / scale), scale = largest |x| / 127.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from imsm_core.adapters.attach import known_warnings_ignored
from imsm_core.adapters.biases import original_biases
from imsm_core.siamese import SiameseModel

from ..errors import UnsupportedError
from .plan import AttentionPlan

HEADROOM = 1.1  # over the largest value that the texts showed
SMALLEST = 1e-6
LARGEST_INT8 = 127


@dataclass(frozen=True)
class KVScales:
    """keys, values: per layer (1, kv_heads, 1, cached_head_size) float32, for both streams."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def attributes(self) -> dict[str, Any]:
        """GroupQueryAttention's attributes for them."""
        return {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """(k_scale, v_scale) of a layer."""
        return self.keys[layer], self.values[layer]


@torch.no_grad()
def find_scales(model: SiameseModel, plan: AttentionPlan, texts: Sequence[Sequence[int]]) -> KVScales:
    """Scales that fit the keys and values of both streams on `texts` (token ids).

    Raises UnsupportedError if the model caches something other than one key and one value a layer.
    """
    found = [[torch.zeros(layer.kv_heads, layer.cached_head_size) for _ in range(2)] for layer in plan.layers]
    for text in texts:
        for cache in _caches(model, torch.tensor([list(text)])):
            if len(cache) != len(found):
                raise UnsupportedError(f"the model caches {len(cache)} layers, not {len(found)}: no int8 cache")
            for largest, pair, layer in zip(found, cache, plan.layers, strict=True):
                for part, tensor in enumerate(pair):
                    if tensor.shape[1] != layer.kv_heads or tensor.shape[3] > layer.cached_head_size:
                        raise UnsupportedError("the model caches other heads than it attends with: no int8 cache")
                    channel = tensor[0].abs().amax(1)  # (kv_heads, D)
                    padded = functional.pad(channel, (0, layer.cached_head_size - channel.shape[-1]))
                    largest[part] = torch.maximum(largest[part], padded.float())
    scales = [[_scale(part) for part in layer] for layer in found]
    return KVScales([layer[0] for layer in scales], [layer[1] for layer in scales])


def _scale(largest: Tensor) -> Tensor:
    return (largest * (HEADROOM / LARGEST_INT8)).clamp_min(SMALLEST)[None, :, None, :].contiguous()


def _caches(model: SiameseModel, input_ids: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """What transformers caches over a text: of the base stream and of the adapter stream, by layer. By default caches
    keep no more than a window of the text; these keep all of it."""
    peft_model, caches = model.peft_model, []
    with known_warnings_ignored(), peft_model.disable_adapter(), original_biases(peft_model):
        caches.append(model.causal_lm(input_ids=input_ids, past_key_values=DynamicCache()).past_key_values)
    caches.append(peft_model(input_ids=input_ids, past_key_values=DynamicCache()).past_key_values)
    return [[(layer.keys, layer.values) for layer in cache.layers] for cache in caches]
