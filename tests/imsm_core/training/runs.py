"""Short training runs on a few rows, and what tests do to them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imsm_core.data.dataset import Dataset, Example
from imsm_core.errors import Interrupted
from imsm_core.siamese import SiameseModel
from imsm_core.training import loop
from imsm_core.training.settings import TrainSettings
from tests.builders import EOS, PAD

EXAMPLES = [
    Example([0, 70, 71, 72], [80, 81, EOS]),
    Example([0, 73], [82, EOS]),
    Example([0, 74, 75, 76, 77, 78], [83, 84, 85, 86, EOS]),
    Example([0, 79], [EOS]),
    Example([0, 80, 81], [87, 88, EOS]),
]
DATASET = Dataset(EXAMPLES, "rows.jsonl", "0" * 64, skipped=2)
SETTINGS = TrainSettings(steps=6, batch_size=2, save_every=2, learning_rate=1e-2, gate_learning_rate=3e-2, seed=5)


def run(model: SiameseModel, settings: TrainSettings = SETTINGS, **options: Any) -> dict[str, Any]:
    return loop.train(model, DATASET, settings, PAD, progress=False, **options)


def trained(model: SiameseModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}


def spy_on_steps(monkeypatch: pytest.MonkeyPatch, after: Callable[[int, torch.optim.Optimizer, float], None]) -> None:
    """Call after(number of steps so far, optimizer, loss) when an optimizer step ends."""
    step, done = loop._step, [0]

    def spied(*arguments: Any) -> float:
        rates = [group["lr"] for group in arguments[2].param_groups]
        loss = step(*arguments)
        assert [group["lr"] for group in arguments[2].param_groups] == rates
        done[0] += 1
        after(done[0], arguments[2], loss)
        return loss

    monkeypatch.setattr(loop, "_step", spied)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    def after(done: int, optimizer: torch.optim.Optimizer, loss: float) -> None:
        if done == steps:
            signal.raise_signal(signal.SIGINT)

    spy_on_steps(monkeypatch, after)


def stopped_after(steps: int, model: SiameseModel, settings: TrainSettings, partial: Path) -> None:
    """Train until Ctrl-C after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, steps)
        with pytest.raises(Interrupted):
            run(model, settings, partial=partial)
