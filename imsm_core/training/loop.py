"""Training the adapter and the gate together, through one frozen backbone, by any PEFT method.

Loss: next-token cross-entropy on the answer tokens, through the gate and into the adapter stream (IMSM, "Training").
Defaults are the authors' released ones, except that the gate's learning rate is a setting of its own.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..adapters.methods import default_learning_rate
from ..console import option
from ..data.collate import IGNORED_LABEL, collate
from ..data.dataset import Dataset, Example, epoch_order
from ..errors import AdapterError, IMSMError, SettingsError
from ..siamese import SiameseModel
from .adalora import RankAllocation, rank_allocation
from .snapshots import newest_snapshot, restore_snapshot, save_snapshot


@dataclass(frozen=True)
class TrainSettings:
    """learning_rate: of the adapter; None is the PEFT method's own. steps: optimizer steps; None means `epochs` over
    the data. One step sees batch_size * gradient_accumulation examples. Learning rates follow a cosine after
    `warmup_ratio` of the steps."""

    learning_rate: float | None = None
    gate_learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    epochs: float = 3
    steps: int | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    gate_dropout: float = 0.1
    seed: int = 2024
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{option(name)} is {getattr(self, name)}; it must be at least 1")
        if self.steps is not None and self.steps < 1:
            raise SettingsError(f"{option('steps')} is {self.steps}; it must be at least 1")
        for name in ("learning_rate", "gate_learning_rate", "max_grad_norm", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f"{option(name)} is {value}; it must be above 0 and finite")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingsError(f"{option('weight_decay')} is {self.weight_decay}; it must be at least 0 and finite")
        for name in ("gate_dropout", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingsError(f"{option(name)} is {getattr(self, name)}; it must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise SettingsError(f"{option('seed')} is {self.seed}; it must be in [0, 2**32)")

    def with_learning_rate_for(self, config: PeftConfig) -> TrainSettings:
        """These settings with the PEFT method's own learning rate if none was given."""
        return self if self.learning_rate is not None else replace(self, learning_rate=default_learning_rate(config))

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run over `examples` rows."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * examples / (self.batch_size * self.gradient_accumulation)))


class Interrupted(IMSMError):
    """Ctrl-C: the run stopped after a whole step; if it has a folder for snapshots, one was written."""

    exit_code = 130

    def __init__(self, step: int, total: int, partial: Path | None) -> None:
        way_on = f"; the same command with --resume goes on ({partial})" if partial is not None else ""
        super().__init__(f"interrupted after step {step} of {total}{way_on}")


class Diverged(IMSMError):
    """The loss is no longer a finite number; going on would write a checkpoint that holds nothing."""


def train(
    model: SiameseModel,
    dataset: Dataset,
    settings: TrainSettings,
    pad_token_id: int,
    partial: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    origin: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tune `model` in place and return its metrics.

    partial: folder for snapshots (every `save_every` steps and on Ctrl-C); with `resume` the newest one is gone on
    from, and the result is the same as without the interruption. origin: what else a resumed run must have in common
    with the interrupted one (the base model, the adapter's settings, ...), JSON values. Raises Interrupted on Ctrl-C,
    SettingsError when a resumed run differs from how it was started, Diverged when the loss is not finite.
    """
    settings = settings.with_learning_rate_for(model.peft_model.peft_config[model.peft_model.active_adapter])
    total = settings.total_steps(len(dataset.examples))
    ranks = rank_allocation(model.peft_model, total)
    parameters = model.trainable_parameters()
    if not any(not name.startswith("gate.") for name in parameters):
        raise AdapterError("the adapter has nothing to train: each of its parameters is frozen")
    optimizer = _optimizer(model, settings)
    shapes = sorted(f"{name} {tuple(parameter.shape)}" for name, parameter in parameters.items())
    started_with = {**asdict(settings), **(origin or {}), "data": dataset.sha256, "parameters": shapes}
    started_with = json.loads(json.dumps(started_with))  # as it comes back from a snapshot: lists for tuples
    losses: list[float] = []
    seconds_before = 0.0
    torch.manual_seed(settings.seed)
    snapshot = newest_snapshot(partial) if partial is not None and resume else None
    if snapshot is not None:
        state, others = restore_snapshot(snapshot, parameters, optimizer, started_with)
        losses, seconds_before = state["losses"], state["seconds"]
        if ranks is not None:
            ranks.restore(others, state["ranks"])
    schedule = _schedule(optimizer, round(settings.warmup_ratio * total), total, done=len(losses))

    model.train()
    start = time.perf_counter()
    batches = _batches(dataset.examples, settings, first_step=len(losses))
    with (
        tqdm(total=total, initial=len(losses), desc="train", unit="step", disable=not progress) as bar,
        _on_ctrl_c() as stop,
    ):
        while len(losses) < total:
            trained, number = list(parameters.values()), len(losses) + 1
            losses.append(_step(model, next(batches), optimizer, trained, settings, pad_token_id, ranks, number))
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} at step {len(losses)}; lower the learning rates")
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{_recent(losses):.4f}")
            interrupted = stop.is_set() and len(losses) < total
            if partial is not None and (interrupted or len(losses) % settings.save_every == 0):
                seconds = seconds_before + time.perf_counter() - start
                others, kept = ranks.state() if ranks is not None else ({}, {})
                state = {"losses": losses, "seconds": seconds, "started_with": started_with, "ranks": kept}
                save_snapshot(partial, len(losses), parameters, optimizer, state, others)
            if interrupted:
                raise Interrupted(len(losses), total, partial)
    model.eval()
    return {
        "steps": total,
        "first_loss": losses[0],
        "final_loss": _recent(losses),
        "examples": len(dataset.examples),
        "skipped_rows": dataset.skipped,
        "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "seconds": round(seconds_before + time.perf_counter() - start, 3),
    }


def answer_loss(model: SiameseModel, examples: Sequence[Example], pad_token_id: int) -> tuple[Tensor, int]:
    """The summed cross-entropy (nats) of the examples' answer tokens, and how many there are.

    The gate and the lm_head run only where a token is to be predicted.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask, query_mask, labels = (part.to(device) for part in collate(examples, pad_token_id))
    states = model.stream_states(input_ids, attention_mask)
    rows, positions = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)  # a state predicts the next token
    logits, _ = model.fused_logits(states, query_mask, rows, positions)
    targets = labels[rows, positions + 1]
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def _step(
    model: SiameseModel,
    micro_batches: list[list[Example]],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    settings: TrainSettings,
    pad_token_id: int,
    ranks: RankAllocation | None,
    number: int,
) -> float:
    """Optimizer step `number`, from 1; returns the mean loss per answer token. Accumulated micro-batches are weighted
    by their tokens, so that they equal one large batch."""
    tokens = sum(len(example.answer_ids) for batch in micro_batches for example in batch)
    total = 0.0
    for batch in micro_batches:
        loss, _ = answer_loss(model, batch, pad_token_id)
        (loss / tokens).backward()
        total += float(loss.detach())
    if ranks is not None:
        ranks.regularization().backward()
    nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimizer.step()
    if ranks is not None:
        ranks.advance(number)
    optimizer.zero_grad(set_to_none=True)
    return total / tokens


def _optimizer(model: SiameseModel, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = model.trainable_parameters()
    gate = [parameter for name, parameter in trained.items() if name.startswith("gate.")]
    adapter = [parameter for name, parameter in trained.items() if not name.startswith("gate.")]
    groups: list[dict[str, Any]] = [
        {"params": adapter, "lr": settings.learning_rate},
        {"params": gate, "lr": settings.gate_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=settings.weight_decay)


def _schedule(
    optimizer: torch.optim.Optimizer, warmup: int, total: int, done: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if done:  # a resumed schedule starts from the peak rates, which it expects to find in the groups
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    schedule: torch.optim.lr_scheduler.LRScheduler = get_cosine_schedule_with_warmup(
        optimizer, warmup, total, last_epoch=done - 1
    )
    return schedule


def _batches(examples: list[Example], settings: TrainSettings, first_step: int) -> Iterator[list[list[Example]]]:
    """Endless optimizer steps, each a list of micro-batches, in an order that depends only on the seed."""
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


def _recent(losses: list[float]) -> float:
    window = losses[-20:]
    return sum(window) / len(window)


@contextmanager
def _on_ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step is never cut in half; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def request_stop(signum: int, frame: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request_stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
