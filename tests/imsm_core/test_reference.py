"""The oracle, against plain transformers models where the gate is forced, and against itself step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from imsm_core.backbone import load_base_model
from imsm_core.gates import GATES
from imsm_core.reference import reference_generate, reference_step
from tests.builders import make_siamese

PROMPT = [0, 70, 80, 90]


def greedy(model: torch.nn.Module, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("name", ["base_folder", "qwen2_folder", "gpt2_folder"])
def test_gate_forced_to_one_decodes_as_the_plain_base_model(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    steps = reference_generate(make_siamese(folder), PROMPT, 6, memory_bias=1e4)
    assert [step.token for step in steps] == greedy(load_base_model(str(folder)), PROMPT, 6)


@pytest.mark.parametrize("name", ["base_folder", "qwen2_folder", "gpt2_folder"])
def test_gate_forced_to_zero_decodes_as_the_merged_model(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    steps = reference_generate(make_siamese(folder), PROMPT, 6, memory_bias=-1e4)
    assert [step.token for step in steps] == greedy(make_siamese(folder).peft_model.merge_and_unload(), PROMPT, 6)


@pytest.mark.parametrize("kind", GATES)
def test_query_stays_the_prompt_while_tokens_are_generated(base_folder: Path, kind: str) -> None:
    """Every step equals one pass over the final text, because nothing before a position depends on what follows."""
    model = make_siamese(base_folder, kind)
    steps = reference_generate(model, PROMPT, 5)
    text = PROMPT + [step.token for step in steps]
    tokens = torch.tensor([text[:-1]])
    query = torch.tensor([[1] * len(PROMPT) + [0] * 4])
    positions = torch.arange(len(PROMPT) - 1, len(text) - 1)
    with torch.no_grad():
        states = model.stream_states(tokens)
        logits, gated = model.fused_logits(states, query, torch.zeros_like(positions), positions)
    for index, step in enumerate(steps):
        torch.testing.assert_close(step.logits, logits[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step.gate, gated.gate[index], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step.hidden_base, states.base[0, positions[index]], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step.hidden_adapter, states.adapter[0, positions[index]], atol=1e-4, rtol=1e-4)


def test_step_holds_both_streams_states_and_the_token_that_wins(base_folder: Path) -> None:
    step = reference_step(make_siamese(base_folder), PROMPT, len(PROMPT))
    assert step.token == int(step.logits.argmax())
    assert step.gate.shape == step.hidden_base.shape == step.hidden_adapter.shape == (32,)
    assert (step.hidden_base - step.hidden_adapter).abs().mean() > 0.05
    assert not step.logits.requires_grad


def test_decoding_stops_after_an_end_token(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    tokens = [step.token for step in reference_generate(model, PROMPT, 6)]
    stop = tokens[2]
    stopped = [step.token for step in reference_generate(model, PROMPT, 6, eos_token_ids=[999, stop])]
    assert stopped == tokens[: tokens.index(stop) + 1]
    assert reference_generate(model, PROMPT, 0) == []


def test_decoding_drops_nothing_out_even_after_training_mode(base_folder: Path) -> None:
    model = make_siamese(base_folder, dropout=0.5).train()
    first = reference_generate(model, PROMPT, 2)
    assert torch.equal(first[1].logits, reference_generate(model, PROMPT, 2)[1].logits)
