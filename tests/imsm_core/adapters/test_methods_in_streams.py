"""Every PEFT method in the two streams: the base stream is the base model, the adapter stream is PEFT's own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from imsm_core.backbone import load_base_model
from imsm_core.siamese import SiameseModel
from tests.adapters import ADAPTERS, make_siamese_with

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # SHiRA's forward, by PyTorch

TOKENS = torch.tensor([[0, 70, 80, 90, 100, 110, 120, 130, 140], [0, 71, 81, 91, 101, 2, 2, 2, 2]])
ATTENTION = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
LINEAR_ONLY = (  # PEFT has no form of these for GPT-2's transposed layers
    *("loha", "lokr", "lokr_full", "lokr_factored", "oft", "oft_cayley", "oft_shared", "boft", "hra", "c3a", "road"),
    *("miss", "shira", "delora", "psoft", "peanut", "beft", "glora", "supertuning"),
)
CASES = [
    (base, name)
    for base in ("base_folder", "qwen2_folder", "gpt2_folder")
    for name in ADAPTERS
    if not (base == "gpt2_folder" and name in LINEAR_ONLY)
]


@torch.no_grad()
def hidden(folder: Path) -> Tensor:
    """The plain base model's last hidden states."""
    model = load_base_model(str(folder))
    states: Tensor = model.base_model(TOKENS, attention_mask=ATTENTION, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def adapter_logits(model: SiameseModel) -> Tensor:
    """Logits (M, vocab) at every token with the gate forced to 0."""
    rows, positions = torch.nonzero(ATTENTION, as_tuple=True)
    return model.fused_logits(model.stream_states(TOKENS, ATTENTION), ATTENTION, rows, positions, -1e4)[0]


@torch.no_grad()
def peft_logits(model: SiameseModel) -> Tensor:
    """The same by PEFT's own forward, each row alone, through the base model's lm_head."""
    rows = [
        model.peft_model(input_ids=row[mask.bool()][None], output_hidden_states=True).hidden_states[-1][0]
        for row, mask in zip(TOKENS, ATTENTION, strict=True)
    ]
    virtual = [state.shape[0] - int(mask.sum()) for state, mask in zip(rows, ATTENTION, strict=True)]
    states = torch.cat([state[count:] for state, count in zip(rows, virtual, strict=True)])
    logits: Tensor = model.causal_lm.get_output_embeddings()(states)
    return logits


@pytest.mark.parametrize(("base", "name"), CASES)
def test_base_stream_is_the_base_model_and_gate_zero_is_pefts_own_forward(
    base: str, name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    model = make_siamese_with(folder, name)
    with torch.no_grad():
        states = model.stream_states(TOKENS, ATTENTION)
    real = ATTENTION.bool()
    assert torch.equal(states.base[real], hidden(folder)[real])
    assert 0.01 < (states.adapter - states.base)[real].abs().mean() < 3
    assert_close(adapter_logits(model), peft_logits(model), atol=1e-4, rtol=1e-4)
