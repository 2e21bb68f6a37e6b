"""Architectures that cannot export are refused by name, before any long work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from export.attention.plan import plan_attention
from export.errors import UnsupportedError
from export.model_facts import model_facts
from imsm_core.backbone import load_base_model
from tests.zoo import ARCHITECTURES, REFUSED, make_zoo_base


@pytest.mark.parametrize("name", [name for name in REFUSED])
def test_an_architecture_is_refused_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    model = load_base_model(str(make_zoo_base(tmp_path / "base", name)))
    with pytest.raises(UnsupportedError, match=f"architecture '{model.config.model_type}' is not supported: .{{20}}"):
        plan_attention(model, model_facts(model).layers, 64)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_other_architecture_has_a_plan(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
    facts = model_facts(model)
    plan = plan_attention(model, facts.layers, facts.context_length)
    assert len(plan.layers) == facts.layers
