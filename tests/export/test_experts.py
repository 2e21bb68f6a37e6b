"""Which experts become MoE nodes, and the form of those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from export.experts import SwiGLU, every_expert, plan_experts
from tests.zoo import ARCHITECTURES


def model_of(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = ARCHITECTURES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.eval()
    return model


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("mixtral", SwiGLU(interleaved=False, alpha=1.0, beta=0.0, limit=None)),
        ("qwen2_moe", SwiGLU(interleaved=False, alpha=1.0, beta=0.0, limit=None)),
        ("gpt_oss", SwiGLU(interleaved=True, alpha=1.702, beta=1.0, limit=7.0)),
    ],
)
def test_the_activation_of_experts_is_found_by_its_values(name: str, activation: SwiGLU) -> None:
    plan = plan_experts(model_of(name))
    assert len(plan) == 2
    assert set(plan.values()) == {activation}


def test_another_activation_is_not_taken_for_swiglu() -> None:
    assert set(plan_experts(model_of("mixtral", hidden_act="gelu")).values()) == {None}


def test_a_dense_model_has_no_experts() -> None:
    assert plan_experts(model_of("llama")) == {}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_computing_every_expert_gives_what_the_model_computes(name: str) -> None:
    experts: Any = next(iter(plan_experts(model_of(name))))
    for parameter in experts.parameters():
        parameter.normal_(0, 0.2)
    hidden = torch.randn(7, 32)
    weights, index = torch.rand(7, 4).topk(2)
    torch.testing.assert_close(every_expert(experts, hidden, index, weights), experts(hidden, index, weights))
