"""AdaLoRA's ranks shrink to their budget, also across an interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel

from imsm_core.adapters.attach import attach_adapter
from imsm_core.backbone import load_base_model
from imsm_core.checkpoint import load_checkpoint
from imsm_core.errors import AdapterError, SettingsError
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel
from imsm_core.training.adalora import RankAllocation
from imsm_core.training.loop import train
from tests.adapters import make_siamese_with
from tests.builders import PAD, save_tiny_checkpoint
from tests.imsm_core.training.runs import DATASET, SETTINGS, stopped_after, trained

TEXT = torch.tensor([[0, 70, 80, 90, 100]])


def adalora(folder: Path, seed: int = 1) -> SiameseModel:
    base = load_base_model(str(folder))
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_dropout=0.3, target_modules="all-linear", total_step=1, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return SiameseModel(attach_adapter(base, config), make_gate("query_aware", 32, 3, 0.3)).eval()


RANKS = replace(SETTINGS, steps=10)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT's own loader
def test_adalora_takes_ranks_away_until_the_budget_is_met(base_folder: Path, tmp_path: Path) -> None:
    model = adalora(base_folder)
    train(model, DATASET, RANKS, PAD, progress=False)
    config: Any = model.peft_model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (10, 1, 2)
    assert sum(sum(kept) for kept in config.rank_pattern.values()) == 2 * 14
    with torch.no_grad():
        expected = model.stream_states(TEXT).adapter
    save_tiny_checkpoint(model, base_folder, tmp_path / "checkpoint")
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    torch.testing.assert_close(loaded.stream_states(TEXT).adapter, expected)
    alone = PeftModel.from_pretrained(load_base_model(str(base_folder)), str(tmp_path / "checkpoint" / "adapter"))
    states = alone(input_ids=TEXT, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, expected)
    ranks = [p.shape[0] for name, p in loaded.peft_model.named_parameters() if "lora_A" in name]
    assert sum(ranks) == 2 * 14
    assert len(set(ranks)) > 1


def test_adaloras_loss_has_the_orthogonality_of_its_vectors(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "adalora")
    found = RankAllocation(model.peft_model, 10).regularization()
    outputs: Any = model.peft_model(input_ids=TEXT, labels=TEXT)
    plain = model.causal_lm(input_ids=TEXT, labels=TEXT)
    torch.testing.assert_close(found, outputs.loss - plain.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 8, 9])
def test_resumed_adalora_run_equals_the_uninterrupted_one_exactly(
    base_folder: Path, tmp_path: Path, steps: int
) -> None:
    whole, cut, fresh_model = adalora(base_folder), adalora(base_folder), adalora(base_folder, seed=99)
    metrics = train(whole, DATASET, RANKS, PAD, progress=False)
    stopped_after(steps, cut, RANKS, tmp_path / "partial")
    resumed = train(fresh_model, DATASET, RANKS, PAD, tmp_path / "partial", resume=True, progress=False)
    assert resumed["final_loss"] == metrics["final_loss"]
    expected, found = trained(whole), trained(fresh_model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    configs: list[Any] = [model.peft_model.peft_config["default"] for model in (whole, fresh_model)]
    assert json.dumps(configs[0].rank_pattern) == json.dumps(configs[1].rank_pattern)


def test_run_too_short_for_adaloras_schedule_is_refused(base_folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"^steps is 1; that is too few for AdaLoRA"):
        train(adalora(base_folder), DATASET, replace(RANKS, steps=1), PAD, progress=False)
    train(adalora(base_folder), DATASET, replace(RANKS, steps=2), PAD, progress=False)


def test_adalora_without_a_rank_to_take_away_is_refused(base_folder: Path) -> None:
    model = adalora(base_folder)
    config: Any = model.peft_model.peft_config["default"]
    config.init_r = 2
    with pytest.raises(AdapterError, match="init_r is 2; it must be above target_r, 2"):
        train(model, DATASET, RANKS, PAD, progress=False)
