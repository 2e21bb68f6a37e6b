"""Prompt methods (prompt tuning, P-tuning, prefix tuning) in the graph: virtual tokens before the text, in the adapter
stream alone.

Attention is causal and the virtual tokens come first, so that their keys and values are the same for every text. They
are computed once, here, and the file holds them; the runtime starts the adapter stream's cache with them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from imsm_core.adapters.virtual_tokens import prompt_cache, virtual_tokens
from imsm_core.siamese import SiameseModel

from .attention.plan import AttentionPlan
from .errors import UnsupportedError

FILE = "virtual_tokens.npz"
VirtualCache = dict[str, NDArray[np.float32]]
"""layer.part -> (kv_heads, V, head_size), part being key or value, as the adapter stream's cache begins."""


@torch.no_grad()
def virtual_cache(model: SiameseModel, plan: AttentionPlan) -> VirtualCache:
    """The keys and values of the virtual tokens, heads padded as the graph wants them; empty without virtual tokens.

    Raises UnsupportedError if the model caches something other than one key and one value a layer.
    """
    cache, count = prompt_cache(model.peft_model), virtual_tokens(model.peft_model)
    if cache and len(cache) != len(plan.layers):
        raise UnsupportedError(
            f"architecture {model.causal_lm.config.model_type!r} has {len(plan.layers)} layers and caches {len(cache)}"
        )
    padded = {}
    for index, (pair, layer) in enumerate(zip(cache, plan.layers, strict=False)):
        for part, tensor in zip(("key", "value"), pair, strict=True):
            if tensor.shape[1] != layer.kv_heads or tensor.shape[3] > layer.cached_head_size:
                raise UnsupportedError(
                    f"layer {index} caches a {part} of shape {tuple(tensor.shape)}, unlike its heads"
                )
            # Zeros where a window is smaller than the virtual tokens: it never sees those before its own.
            missing, unseen = layer.cached_head_size - tensor.shape[3], count - tensor.shape[2]
            padded[f"{index}.{part}"] = functional.pad(tensor[0], (0, missing, unseen, 0)).float().contiguous().numpy()
    return padded


def save_virtual_cache(cache: VirtualCache, folder: Path) -> None:
    """Write it, if there is one."""
    if cache:
        np.savez(folder / FILE, allow_pickle=False, **cache)


def load_virtual_cache(folder: Path) -> VirtualCache:
    """What `save_virtual_cache` wrote; empty if it wrote nothing."""
    if not (folder / FILE).is_file():
        return {}
    with np.load(folder / FILE) as arrays:
        return dict(arrays)
