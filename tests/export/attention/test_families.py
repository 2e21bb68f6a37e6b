"""Families with their own attention compute the same through the attention interface as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from export.attention.families import FAMILIES, through_interface
from export.attention.plan import plan_attention
from imsm_core.backbone import last_hidden_state
from tests.zoo import ARCHITECTURES

NAMES = ["bloom", "codegen", "falcon", "falcon, ALiBi", "falcon, new", "gpt_neo", "gptj", "mpt", "xglm"]


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    key_bias: Any = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What GroupQueryAttention computes, written down plainly."""
    length = query.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if key_bias is not None:
        scores = scores + key_bias(torch.arange(length).float(), torch.tensor(float(length - 1)))[:, None]
    back = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (back >= 0) & (back < (sliding_window or length))
    output = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    return output.transpose(1, 2), None


def rotate(x: Tensor, position_ids: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """What the RotaryEmbedding node computes; outside a trace the node computes nothing."""
    assert interleaved
    cos, sin = cos[position_ids][:, None], sin[position_ids][:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def no_mask(*args: Any, **kwargs: Any) -> None:
    pass


AttentionInterface.register("tests_plain", plain_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("tests_plain", no_mask)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_family_computes_the_same_through_the_interface(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.attention.families.sinusoidal.rotary_node", rotate)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    inputs = {"inputs_embeds": torch.randn(2, 40, model.config.hidden_size)}
    if name in ("gptj", "codegen"):
        inputs["position_ids"] = torch.arange(40).repeat(2, 1)
    expected = last_hidden_state(model, **inputs)
    monkeypatch.setattr(model.config, "_attn_implementation", "tests_plain")
    with through_interface(model):
        found = last_hidden_state(model, **inputs)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_every_family_is_tested_here_and_plans_without_a_trace() -> None:
    assert {ARCHITECTURES[name]().model_type for name in NAMES} == set(FAMILIES)
    for name in NAMES:
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name]()).eval()
        assert len(plan_attention(model, 2, 128).layers) == 2


def test_a_local_layer_of_gpt_neo_has_its_window() -> None:
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["gpt_neo"]()).eval()
    assert [layer.sliding_window for layer in plan_attention(model, 2, 128).layers] == [None, 8]
