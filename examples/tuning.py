"""Tuning the demo's base model on a new task in two ways that differ in nothing but the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imsm_core.adapters.attach import attach_adapter
from imsm_core.adapters.methods import peft_config
from imsm_core.backbone import hidden_size, load_base_model
from imsm_core.data.dataset import Dataset
from imsm_core.gates import Gate, Gated, Memories, make_gate
from imsm_core.siamese import SiameseModel
from imsm_core.training.loop import train
from imsm_core.training.settings import TrainSettings

GATE_KIND, GATE_RANK = "query_aware", 8
LORA_RANK, LORA_ALPHA, LORA_DROPOUT = 16, 16, 0.1

# LoRA and gate dropout are the authors' settings. The adapter's learning rate is three times theirs: the run is short.
# The gate's is a tenth of theirs: the gate sees the new task alone, which never rewards remembering, and in so small a
# model a rate of 1e-3 moves it most of the way to the adapter within the run.
SETTINGS = TrainSettings(learning_rate=1e-3, gate_learning_rate=1e-4, steps=200, batch_size=16, gate_dropout=0.1)


class AdapterOnlyGate(Gate):
    """The adapter stream alone: training through it is plain fine-tuning of the adapter."""

    kind = "adapter_only"
    rank = 0

    def forward(self, memories: Memories, memory_bias: Tensor | None = None) -> Gated:
        return Gated(memories.adapter, torch.zeros_like(memories.adapter, dtype=torch.float32))


def tune(
    base: Path, task: Dataset, settings: TrainSettings, pad_token_id: int, siamese: bool
) -> tuple[SiameseModel, dict[str, Any]]:
    """A new LoRA on the base model in folder `base`, tuned on `task`, and the metrics of the training.

    siamese: with a query-aware gate (IMSM); otherwise the LoRA alone. Both start from the same LoRA weights and see the
    same rows in the same order.
    """
    model = load_base_model(str(base))
    torch.manual_seed(settings.seed)
    adapted = attach_adapter(model, peft_config("lora", LORA_RANK, LORA_ALPHA, LORA_DROPOUT))
    gate = make_gate(GATE_KIND, hidden_size(model), GATE_RANK, settings.gate_dropout) if siamese else AdapterOnlyGate()
    tuned = SiameseModel(adapted, gate)
    return tuned, train(tuned, task, settings, pad_token_id)
