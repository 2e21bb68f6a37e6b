"""The loss in pieces: the values and gradients of the whole loss, with any head, and never all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, PreTrainedConfig, PreTrainedModel

from imsm_core import head_loss
from imsm_core.backbone import apply_head
from imsm_core.head_loss import pieces, summed_loss
from tests.builders import make_config

POSITIONS, WIDTH, VOCABULARY = 23, 32, 259
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "plain": make_config("llama"),
    "tied": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=1, n_head=4),
    "capped": Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "scaled": CohereConfig(**SIZES, logit_scale=0.3),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    made.requires_grad_(False)
    return made


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = 3 * torch.randn(POSITIONS, WIDTH, generator=generator)
    return hidden.requires_grad_(), torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)


@pytest.mark.parametrize("size", [1, 7, POSITIONS, 1000])
def test_pieces_give_the_loss_and_the_gradient_of_the_whole(
    model: PreTrainedModel, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, targets = inputs()
    expected = functional.cross_entropy(apply_head(model, hidden[None])[0], targets, reduction="sum")
    (gradient,) = torch.autograd.grad(0.5 * expected, hidden)
    asked: list[int] = []

    def spied(causal_lm: PreTrainedModel, states: Tensor) -> Tensor:
        asked.append(states.shape[1])
        return apply_head(causal_lm, states)

    monkeypatch.setattr(head_loss, "apply_head", spied)
    monkeypatch.setattr(head_loss, "PIECE_BYTES", 4 * VOCABULARY * size + 5)
    found = summed_loss(model, hidden, targets)
    (0.5 * found).backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-5, atol=1e-6)
    assert max(asked) == min(size, POSITIONS)
    assert sum(asked) == (POSITIONS if size >= POSITIONS else 2 * POSITIONS)  # on the way, and on the way back
    asked.clear()
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(model, hidden, targets), expected.detach(), rtol=1e-6, atol=1e-5)
    assert sum(asked) == POSITIONS


def test_logits_that_are_waited_for_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps between the way there and the way back does not grow with the vocabulary."""
    model = AutoModelForCausalLM.from_config(make_config("llama")).requires_grad_(False)
    monkeypatch.setattr(head_loss, "PIECE_BYTES", 4 * VOCABULARY * 4)
    hidden, targets = inputs()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(model, hidden, targets)
    assert max(kept, default=0) < VOCABULARY * 4


def test_a_piece_holds_at_least_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(make_config("llama"))
    assert list(pieces(model, 3)) == [slice(0, head_loss.PIECE_BYTES // (4 * VOCABULARY))]
    monkeypatch.setattr(head_loss, "PIECE_BYTES", 1)
    assert list(pieces(model, 3)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(pieces(model, 0)) == []
