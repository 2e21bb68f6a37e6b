"""Training the adapter and the gate together, through one frozen backbone, by any PEFT method.

Loss: next-token cross-entropy on the answer tokens, through the gate and into the adapter stream (IMSM, "Training").
The defaults are those that the authors released, except that the gate has its own learning rate.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data.collate import IGNORED_LABEL, collate
from ..data.dataset import Dataset, Example
from ..errors import AdapterError, Diverged, Interrupted, SettingsError, setting
from ..head_loss import summed_loss
from ..siamese import SiameseModel
from .adalora import RankAllocation, rank_allocation
from .schedule import make_optimizer, make_schedule, micro_batches, with_learning_rate
from .settings import TrainSettings
from .snapshots import newest_snapshot, restore_snapshot, save_snapshot


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

    partial: folder for snapshots (every `save_every` steps and on Ctrl-C); with `resume` the run continues from the
    newest one, and the result is the same as without the interruption. origin: what else a resumed run must have in
    common with the interrupted one (the base model, the adapter's settings, ...), JSON values by the name of the
    setting. Raises Interrupted on Ctrl-C, SettingsError or CheckpointError when the snapshot does not belong to this
    run, Diverged when the loss is not finite, AdapterError when nothing of the adapter can be trained.
    """
    settings = with_learning_rate(settings, model.peft_model.peft_config[model.peft_model.active_adapter])
    total = settings.total_steps(len(dataset.examples))
    ranks = rank_allocation(model.peft_model, total)
    parameters = model.trainable_parameters()
    if all(name.startswith("gate.") for name in parameters):
        raise AdapterError("the adapter has nothing to train: all its parameters are frozen")
    optimizer = make_optimizer(model, settings)
    started_with = {**asdict(settings), **(origin or {}), "data": dataset.sha256}
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
    schedule = make_schedule(optimizer, settings, total, done=len(losses))

    model.train()
    start = time.perf_counter()
    batches = micro_batches(dataset.examples, settings, first_step=len(losses))
    with (
        tqdm(total=total, initial=len(losses), desc="train", unit="step", disable=not progress) as bar,
        _on_ctrl_c() as stop,
    ):
        while len(losses) < total:
            trained, number = list(parameters.values()), len(losses) + 1
            with _memory_told(settings):
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
                raise Interrupted(f"interrupted after step {len(losses)} of {total}{_advice(partial)}")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters.values()):
        rates = f"{setting('learning_rate')}, {setting('gate_learning_rate')} or {setting('weight_decay')}"
        raise Diverged(f"after step {total} the adapter or the gate holds values that are not finite; lower {rates}")
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

    The gate and the lm_head run only at positions that predict an answer token.
    """
    device = next(model.parameters()).device
    input_ids, attention_mask, query_mask, labels = (part.to(device) for part in collate(examples, pad_token_id))
    states = model.stream_states(input_ids, attention_mask)
    rows, positions = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)  # a state predicts the next token
    fused = model.fused_states(states, query_mask, rows, positions).fused
    targets = labels[rows, positions + 1]
    return summed_loss(model.causal_lm, fused, targets), len(targets)


def _step(
    model: SiameseModel,
    batches: list[list[Example]],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    settings: TrainSettings,
    pad_token_id: int,
    ranks: RankAllocation | None,
    number: int,
) -> float:
    """Optimizer step `number`, from 1; returns the mean loss per answer token. Accumulated micro-batches are weighted
    by their tokens, so that they equal one large batch."""
    tokens = sum(len(example.answer_ids) for batch in batches for example in batch)
    total = 0.0
    for batch in batches:
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


def _advice(partial: Path | None) -> str:
    return f"; {setting('resume')} continues from there ({partial})" if partial is not None else ""


def _recent(losses: list[float]) -> float:
    window = losses[-20:]
    return sum(window) / len(window)


@contextmanager
def _memory_told(settings: TrainSettings) -> Iterator[None]:
    """Inside the block, memory that runs out is a SettingsError. PyTorch has a type for it on a GPU only."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in text:
            raise
        rule = "a step takes more memory than there is; lower it, and raise {gradient_accumulation} by the same factor"
        raise SettingsError("batch_size", settings.batch_size, rule) from error


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
