"""What a run's settings fix before it starts: learning rates, optimizer groups, and the order of the examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from transformers import get_cosine_schedule_with_warmup

from ..adapters.options import default_learning_rate
from ..data.dataset import Example, epoch_order
from ..siamese import SiameseModel
from .settings import TrainSettings


def with_learning_rate(settings: TrainSettings, config: PeftConfig) -> TrainSettings:
    """`settings`, with the PEFT method's own learning rate if none was given."""
    if settings.learning_rate is not None:
        return settings
    return replace(settings, learning_rate=default_learning_rate(config))


def make_optimizer(model: SiameseModel, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW with one group for the adapter and one for the gate, each with its learning rate; a gate without
    parameters has none."""
    trained = model.trainable_parameters()
    gate = [parameter for name, parameter in trained.items() if name.startswith("gate.")]
    adapter = [parameter for name, parameter in trained.items() if not name.startswith("gate.")]
    groups: list[dict[str, Any]] = [
        {"params": adapter, "lr": settings.learning_rate},
        {"params": gate, "lr": settings.gate_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=settings.weight_decay)


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, total: int, done: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A linear warm-up, then a cosine to 0 over `total` optimizer steps, of which `done` are over."""
    if done:  # a resumed schedule starts from the peak rates, which it expects to find in the groups
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    warmup = round(settings.warmup_ratio * total)
    schedule: torch.optim.lr_scheduler.LRScheduler = get_cosine_schedule_with_warmup(
        optimizer, warmup, total, last_epoch=done - 1
    )
    return schedule


def micro_batches(examples: list[Example], settings: TrainSettings, first_step: int) -> Iterator[list[list[Example]]]:
    """The micro-batches of each optimizer step from `first_step` (from 0) on, without end, in an order that depends
    only on the seed."""
    per_step = settings.batch_size * settings.gradient_accumulation
    position = first_step * per_step
    orders: dict[int, list[int]] = {}
    while True:
        chosen = []
        for index in range(position, position + per_step):
            epoch, place = divmod(index, len(examples))
            if epoch not in orders:
                orders = {epoch: epoch_order(len(examples), settings.seed, epoch)}
            chosen.append(examples[orders[epoch][place]])
        position += per_step
        yield [chosen[first : first + settings.batch_size] for first in range(0, per_step, settings.batch_size)]
