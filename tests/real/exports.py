"""Real models with an adapter and a gate of random values, small enough that both streams still write sentences."""

from __future__ import annotations

from pathlib import Path

import torch

from export.settings import ExportSettings
from imsm_core.adapters.attach import attach_adapter
from imsm_core.backbone import hidden_size, load_base_model
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel
from tests.adapters import ADAPTERS, randomize_adapter
from tests.builders import save_tiny_checkpoint
from tests.exported import Exported, export_existing

SCALES = {"lora": 0.03, "dora": 0.03, "ia3": 0.1, "prefix_tuning": 0.3}
"""Of the adapter's noise: as far from the base model as a short tuning leads."""


def export_real(folder: Path, base: Path, adapter: str, settings: ExportSettings | None = None) -> Exported:
    """Export the model in folder `base` with a random adapter of ADAPTERS and a random query-aware gate."""
    model = load_base_model(str(base))
    torch.manual_seed(1)  # LoRA's A starts at random
    gate = make_gate("query_aware", hidden_size(model), 8)
    siamese = SiameseModel(attach_adapter(model, ADAPTERS[adapter](model)), gate)
    randomize_adapter(siamese, seed=1, scale=SCALES[adapter])
    info = save_tiny_checkpoint(siamese.eval(), base, folder / "checkpoint")
    return export_existing(folder, base, siamese, info, settings)
