"""Settings check themselves, name what is wrong, and need neither PyTorch nor PEFT."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from imsm_core.errors import SettingsError
from imsm_core.training.settings import TrainSettings, TuneSettings

PROJECT = Path(__file__).resolve().parents[3]
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "onnx", "safetensors", "numpy"):
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Blocker())
from imsm_core.errors import SettingsError
from imsm_core.training.settings import TrainSettings, TuneSettings
TrainSettings()
TuneSettings(peft="trainable_tokens", token_indices=[3], gate="token", quantized_backbone="int4")
try:
    TuneSettings(peft="ia3", adapter_rank=3)
except SettingsError as error:
    print(error)
"""


def test_epochs_give_the_steps_unless_steps_are_given() -> None:
    assert TrainSettings(epochs=3, batch_size=16).total_steps(160) == 30
    assert TrainSettings(epochs=0.5, batch_size=4, gradient_accumulation=5).total_steps(200) == 5
    assert TrainSettings(epochs=1, batch_size=16).total_steps(1) == 1
    assert TrainSettings(epochs=3, steps=7).total_steps(1000) == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": 10**30},
        {"gradient_accumulation": 10**30},
        {"gradient_accumulation": 0},
        {"save_every": 0},
        {"steps": 0},
        {"epochs": 0},
        {"epochs": math.inf},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"gate_learning_rate": -1.0},
        {"max_grad_norm": 0.0},
        {"weight_decay": -0.1},
        {"warmup_ratio": 1.5},
        {"warmup_ratio": -0.1},
        {"gate_dropout": 1.0},
        {"learning_rate": 101.0},
        {"gate_learning_rate": 1e300},
        {"batch_size": 2**21},
        {"gradient_accumulation": 2**18},
        {"seed": -1},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_setting_outside_its_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        TrainSettings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_length": 1}, "^max_length is 1; it must be at least 2"),
        ({"gate": "garden"}, "^gate is garden; choose one of query_aware"),
        ({"gate_rank": 0}, "^gate_rank is 0; it must be at least 1"),
        ({"gate_rank": 10**12}, "^gate_rank is 1000000000000; it must be at most 4096: the gate would be larger"),
        ({"peft": "magic"}, "^peft is magic; choose one of lora"),
        ({"adapter_rank": 0}, "^adapter_rank is 0; it must be at least 1"),
        ({"virtual_tokens": 3}, "^virtual_tokens is 3; lora does not take it; it takes adapter_rank, adapter_alpha"),
        ({"peft": "trainable_tokens"}, "^token_indices is not given; trainable_tokens trains the embeddings"),
        ({"peft": "trainable_tokens", "token_indices": []}, "^token_indices is empty; trainable_tokens"),
        ({"block_size": 32}, "^block_size is 32; it needs quantized_backbone"),
        ({"quantized_backbone": "int4", "block_size": 0}, "^block_size is 0; it must be a power of two"),
        ({"peft_config": Path("c.json"), "peft": "lora"}, "^peft is lora; it cannot be combined with peft_config"),
        (
            {"peft_config": Path("c.json"), "adapter_alpha": 8},
            "^adapter_alpha is 8; it cannot be combined with peft_co",
        ),
    ],
    ids=str,
)
def test_wrong_choice_is_refused_when_the_settings_are_made(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        TuneSettings(**wrong)
    assert caught.value.name in wrong | {"token_indices": None}


def test_settings_are_checked_where_pytorch_and_peft_are_missing() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "adapter_rank is 3; ia3 does not take it; it takes target_modules\n"


@pytest.mark.parametrize("settings", [TuneSettings, TrainSettings])
def test_every_setting_explains_itself(settings: type) -> None:
    assert all(field.metadata["help"] for field in fields(settings))
