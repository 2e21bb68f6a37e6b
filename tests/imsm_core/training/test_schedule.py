"""Learning rates and the order of the examples, fixed by the settings alone."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from imsm_core.data.dataset import Example
from imsm_core.errors import Interrupted
from imsm_core.siamese import SiameseModel
from imsm_core.training import loop
from tests.builders import make_siamese
from tests.imsm_core.training.runs import EXAMPLES, SETTINGS, run, trained


def test_adapter_and_gate_have_their_own_learning_rates_on_a_cosine_with_warm_up(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    sizes: list[int] = []
    model = make_siamese(base_folder)
    step = loop._step

    def spied(*arguments: Any) -> float:
        rates.append([group["lr"] for group in arguments[2].param_groups])
        sizes[:] = [sum(parameter.numel() for parameter in group["params"]) for group in arguments[2].param_groups]
        assert {group["weight_decay"] for group in arguments[2].param_groups} == {0.01}
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", spied)
    run(model, replace(SETTINGS, steps=20))
    warm_up, total = 2, 20
    shape = [
        t / warm_up if t < warm_up else (1 + math.cos(math.pi * (t - warm_up) / (total - warm_up))) / 2
        for t in range(total)
    ]
    assert [adapter for adapter, _ in rates] == pytest.approx([1e-2 * share for share in shape])
    assert [gate for _, gate in rates] == pytest.approx([3e-2 * share for share in shape])
    gate_size = sum(parameter.numel() for parameter in model.gate.parameters())
    assert sizes == [sum(p.numel() for p in trained(model).values()) - gate_size, gate_size]


def test_every_row_is_seen_once_an_epoch(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Example] = []
    loss = loop.answer_loss

    def spied(model: SiameseModel, examples: list[Example], pad: int) -> tuple[Tensor, int]:
        seen.extend(examples)
        return loss(model, examples, pad)

    monkeypatch.setattr(loop, "answer_loss", spied)
    run(make_siamese(base_folder), replace(SETTINGS, steps=5, batch_size=1, gradient_accumulation=2))
    first, second = seen[:5], seen[5:]
    assert all(example in first and example in second for example in EXAMPLES)
    assert first != second


def test_resumed_learning_rates_are_those_of_the_uninterrupted_run(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    step = loop._step

    def spied(*arguments: Any) -> float:
        rates.append([group["lr"] for group in arguments[2].param_groups])
        loss = step(*arguments)
        if len(rates) == 6 + 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(loop, "_step", spied)
    run(make_siamese(base_folder))
    with pytest.raises(Interrupted):
        run(make_siamese(base_folder), partial=tmp_path / "partial")
    run(make_siamese(base_folder), partial=tmp_path / "partial", resume=True)
    assert rates[6:] == rates[:6]
