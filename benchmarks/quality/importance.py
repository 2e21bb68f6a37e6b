"""llama.cpp's importance matrix, computed with PyTorch: how large each input of every matrix is on calibration text.

Source: llama.cpp's tools/imatrix, which sums the squares of the inputs of every product in the blocks.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imsm_core.backbone import last_hidden_state, load_base_model

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A layer's projections in transformers, and in GGUF files of Llama and Gemma 3."""


@torch.no_grad()
def write_importance(base: Path, texts: list[list[int]], target: Path) -> None:
    """An .npz with (inputs,) float32 mean squares by GGUF tensor name. The lm_head has none, as by default there."""
    model = load_base_model(str(base))
    sums: dict[str, Any] = defaultdict(float)

    def listen(name: str, module: nn.Module) -> None:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += inputs[0].double().square().sum((0, 1))

        module.register_forward_pre_hook(add)

    for name, module in model.named_modules():
        _, _, place = name.rpartition("layers.")
        number, _, part = place.partition(".")
        if part in NAMES:
            listen(f"blk.{number}.{NAMES[part]}.weight", module)
    for ids in texts:
        last_hidden_state(model, input_ids=torch.tensor([ids]))
    tokens = sum(map(len, texts))
    np.savez(target, **{name: (total / tokens).float().numpy() for name, total in sums.items()})
