"""An adapter for a model that has none: a random LoRA of real size, as strong as a tuned one, in a CHECKPOINT."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.shapes import GATE, GATE_RANK, random_siamese
from imsm_core.backbone import apply_head, fingerprint, load_base_model
from imsm_core.checkpoint import CheckpointInfo, save_checkpoint
from imsm_core.siamese import SiameseModel

RANK = 16
TARGET = 0.25  # nats; tuning on instructions moves small models by 0.1 to 0.5
NEAR = 0.1  # of its logarithm
STEPS = 16


def random_checkpoint(base_folder: Path, target: Path, texts: list[list[int]]) -> float:
    """Write the CHECKPOINT `target` on the model in `base_folder`: LoRA of rank 16 on all seven projections and a
    query-aware gate, all random, scaled so that KL(base || adapter) on `texts` is about 0.25 nats; returns what it is.
    """
    base = load_base_model(str(base_folder))
    name, print_of_base = str(base_folder), fingerprint(base)  # before PEFT wraps the parameters
    model = random_siamese(base, RANK).eval()
    found = _scale(model, texts)
    info = CheckpointInfo(
        name,
        None,
        print_of_base,
        GATE,
        GATE_RANK,
        "LORA",
        training={"raw": True},
        metrics={"kl_from_base": found},
    )
    save_checkpoint(model, info, target)
    return found


@torch.no_grad()
def _scale(model: SiameseModel, texts: list[list[int]]) -> float:
    """Multiply the LoRA's second factors until the change is near TARGET; KL grows with their square, or faster."""
    factors = [p for name, p in model.trainable_parameters().items() if "lora_B" in name]
    low, high = -math.inf, math.inf  # logarithms of the scale
    scale = 0.0
    for _ in range(STEPS):
        found = sum(_change(model, ids) for ids in texts) / sum(map(len, texts))
        distance = math.log(TARGET / max(found, 1e-12))
        if abs(distance) < NEAR:
            return found
        low, high = (scale, high) if distance > 0 else (low, scale)
        new = scale + distance / 2
        if not low < new < high:  # the square was a bad guess, and there are two bounds by now
            new = (low + high) / 2
        for factor in factors:
            factor.mul_(math.exp(new - scale))
        scale = new
    raise SystemExit(f"no scale of the random adapter changes the model by {TARGET} nats; the last one did by {found}")


def _change(model: SiameseModel, ids: list[int]) -> float:
    """KL(base || adapter) summed over all positions of a text, in nats."""
    states = model.stream_states(torch.tensor([ids]))
    base, adapter = (apply_head(model.causal_lm, state)[0].log_softmax(-1) for state in states)
    return float(functional.kl_div(adapter, base, reduction="sum", log_target=True))
