"""Training by every PEFT method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from imsm_core.adapters.biases import backbone_biases
from imsm_core.backbone import load_base_model
from imsm_core.errors import AdapterError
from imsm_core.siamese import SiameseModel
from imsm_core.training import loop
from imsm_core.training.loop import train
from imsm_core.training.schedule import make_optimizer
from imsm_core.training.settings import TrainSettings
from tests.adapters import ADAPTERS, make_siamese_with
from tests.builders import PAD
from tests.imsm_core.training.runs import DATASET, SETTINGS, stopped_after, trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # SHiRA's forward, by PyTorch
]
TEXT = torch.tensor([[0, 70, 80, 90, 100]])


@pytest.mark.parametrize("method", ADAPTERS)
def test_training_moves_adapter_and_gate_alone_and_lowers_the_loss(base_folder: Path, method: str) -> None:
    model = make_siamese_with(base_folder, method)
    before = trained(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in before}
    with torch.no_grad():
        base = model.stream_states(TEXT).base
    settings = replace(SETTINGS, steps=15, batch_size=5, gate_dropout=0.0, warmup_ratio=0.0)
    metrics = train(model, DATASET, settings, PAD, progress=False)
    assert metrics["final_loss"] < metrics["first_loss"]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    moved = {name for name, value in before.items() if not torch.equal(parameters[name], value)}
    assert {"gate.gate_down.weight", "gate.gate_up.weight"} < moved
    assert {name for name in before if name not in moved} <= {name for name in before if ".bias" in name}
    with torch.no_grad():
        assert torch.equal(model.stream_states(TEXT).base, base)


def test_learning_rate_is_the_methods_own_unless_given(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def spied(model: SiameseModel, settings: TrainSettings) -> torch.optim.Optimizer:
        made = make_optimizer(model, settings)
        rates.append(made.param_groups[0]["lr"])
        return made

    monkeypatch.setattr(loop, "make_optimizer", spied)
    for learning_rate in (None, 0.5):
        settings = TrainSettings(steps=1, batch_size=2, learning_rate=learning_rate)
        train(make_siamese_with(base_folder, "ia3"), DATASET, settings, PAD, progress=False)
    assert rates == [3e-3, 0.5]


def test_frozen_adapter_is_not_trained(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "lora")
    model.peft_model.requires_grad_(False)
    with pytest.raises(AdapterError, match="the adapter has nothing to train"):
        train(model, DATASET, SETTINGS, PAD, progress=False)


def test_only_the_prompt_encoder_and_the_gate_drop_out_in_training_mode(gpt2_folder: Path) -> None:
    model = make_siamese_with(gpt2_folder, "p_tuning_lstm").train()
    training = {name for name, module in model.named_modules() if module.training}
    inside = {name for name in training if name.startswith("peft_model.base_model")}
    assert inside == set()
    assert any("prompt_encoder" in name for name in training)


@pytest.mark.parametrize("method", ["p_tuning_lstm", "prefix_projection", "lora_tokens", "lora_norms", "oft", "vblora"])
def test_resumed_run_of_any_method_equals_the_uninterrupted_one(base_folder: Path, tmp_path: Path, method: str) -> None:
    whole, cut, resumed = (make_siamese_with(base_folder, method, seed=seed) for seed in (1, 1, 99))
    train(whole, DATASET, SETTINGS, PAD, progress=False)
    stopped_after(3, cut, SETTINGS, tmp_path / "partial")
    train(resumed, DATASET, SETTINGS, PAD, tmp_path / "partial", resume=True, progress=False)
    expected, found = trained(whole), trained(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_trained_biases_are_the_adapter_streams_alone(qwen2_folder: Path) -> None:
    model = make_siamese_with(qwen2_folder, "lora_all_biases")
    before = {name: (base.clone(), tuned.detach().clone()) for name, (base, tuned) in pairs(model).items()}
    train(model, DATASET, SETTINGS, PAD, progress=False)
    assert before
    for name, (base, tuned) in pairs(model).items():
        assert torch.equal(base, before[name][0])
        assert not torch.equal(tuned, before[name][1]) or "k_proj" in name  # softmax does not see the keys' bias
    plain = load_base_model(str(qwen2_folder))
    with torch.no_grad():
        expected = plain.base_model(TEXT, use_cache=False).last_hidden_state
        assert torch.equal(model.stream_states(TEXT).base, expected)


def pairs(model: SiameseModel) -> dict[str, tuple[Tensor, torch.nn.Parameter]]:
    return backbone_biases(model.peft_model)
