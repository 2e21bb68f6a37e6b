"""Virtual tokens: they stand before the adapter stream's text alone, and PEFT's own forward agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, MistralConfig, PreTrainedModel

from imsm_core.adapters.attach import adapted_layers, attach_adapter
from imsm_core.adapters.virtual_tokens import adapter_hidden_state, prompt_cache, virtual_tokens
from imsm_core.errors import DataError
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel
from tests.adapters import ADAPTERS, VIRTUAL_TOKENS, make_siamese_with, randomize_adapter
from tests.builders import CONTEXT, HEADS, KV_HEADS, LAYERS

METHODS = ("prefix_tuning", "prefix_projection", "prompt_tuning", "p_tuning", "p_tuning_lstm", "cartridge")
FOLDERS = ("base_folder", "qwen2_folder", "gpt2_folder")
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
TEXT = torch.tensor([[0, 70, 80, 90, 100, 110, 120]])


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_methods_that_change_layers_have_no_virtual_tokens(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "lora")
    assert virtual_tokens(model.peft_model) == 0
    assert prompt_cache(model.peft_model) == []


@pytest.mark.parametrize("method", METHODS)
def test_virtual_tokens_stand_before_the_adapter_streams_text_alone(folder: Path, method: str) -> None:
    model = make_siamese_with(folder, method)
    assert virtual_tokens(model.peft_model) == VIRTUAL_TOKENS
    assert adapted_layers(model.peft_model) == []
    with torch.no_grad():
        states = model.stream_states(TEXT)
    assert states.base.shape == states.adapter.shape == (1, 7, model.causal_lm.config.hidden_size)
    assert (states.base - states.adapter)[:, 0].abs().mean() > 0.05


@torch.no_grad()
def continued(model: PreTrainedModel, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits of TEXT by the plain model after a given cache."""
    logits: Tensor = model(TEXT, past_key_values=DynamicCache(layers)).logits
    return logits


@pytest.mark.parametrize("method", METHODS)
def test_prompt_cache_is_all_that_the_virtual_tokens_do(folder: Path, method: str) -> None:
    """The plain model that goes on from the cache gives what PEFT gives for the text after its virtual tokens."""
    model = make_siamese_with(folder, method)
    cache = prompt_cache(model.peft_model)
    heads = HEADS if model.causal_lm.config.model_type == "gpt2" else KV_HEADS
    assert len(cache) == LAYERS
    assert {part.shape for layer in cache for part in layer} == {
        (1, heads, VIRTUAL_TOKENS, model.causal_lm.config.hidden_size // HEADS)
    }
    assert all(part.dtype == torch.float32 and not part.requires_grad for layer in cache for part in layer)
    with torch.no_grad(), model.peft_model.disable_adapter():
        expected = model.causal_lm.get_output_embeddings()(model.stream_states(TEXT).adapter)
        assert_close(continued(model.causal_lm, cache), expected, **CLOSE)
    with torch.no_grad():
        assert_close(model.peft_model(input_ids=TEXT).logits[:, -7:], expected, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_padding_does_not_reach_the_text_after_virtual_tokens(folder: Path, method: str) -> None:
    model = make_siamese_with(folder, method)
    padded, mask = torch.cat([TEXT, TEXT[:, :3]], dim=1), torch.tensor([[1] * 7 + [0] * 3])
    with torch.no_grad():
        alone = adapter_hidden_state(model.peft_model, TEXT)
        assert_close(adapter_hidden_state(model.peft_model, padded, mask)[:, :7], alone, **CLOSE)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_text_that_leaves_no_room_for_the_virtual_tokens_is_refused(gpt2_folder: Path, method: str) -> None:
    model = make_siamese_with(gpt2_folder, method)
    longest = torch.full((1, CONTEXT - VIRTUAL_TOKENS), 70)
    with torch.no_grad():
        assert model.stream_states(longest).adapter.shape[1] == CONTEXT - VIRTUAL_TOKENS
    with pytest.raises(DataError, match=r"126 tokens after 3 virtual tokens is longer than .* context of 128"):
        model.stream_states(torch.full((1, CONTEXT - VIRTUAL_TOKENS + 1), 70))


def windowed(kind: str, window: int) -> PreTrainedModel:
    """A tiny model with sliding windows: every layer of Mistral's, every second one of Gemma 2's."""
    config_class = {"gemma2": Gemma2Config, "mistral": MistralConfig}[kind]
    config = config_class(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=60,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=window,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False)
    model.eval()
    return model


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
@pytest.mark.parametrize("method", METHODS)
def test_windowed_models_agree_with_pefts_own_forward(kind: str, method: str) -> None:
    base = windowed(kind, window=6)
    model = SiameseModel(attach_adapter(base, ADAPTERS[method](base)), make_gate("mean_logits", 32)).eval()
    randomize_adapter(model, seed=3)
    rows, positions = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    with torch.no_grad():
        states = model.stream_states(TEXT)
        assert (states.base - states.adapter).abs().mean() > 0.02
        logits, _ = model.fused_logits(states, torch.ones_like(TEXT), rows, positions, -1e4)
        assert_close(logits, model.peft_model(input_ids=TEXT).logits[0, -7:], **CLOSE)
    assert [key.shape for key, _ in prompt_cache(model.peft_model)] == [(1, 2, VIRTUAL_TOKENS, 8)] * 2


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
@pytest.mark.parametrize("method", METHODS)
def test_window_shorter_than_the_virtual_tokens_keeps_the_last_of_them(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded on the left, where the windowed layers never look, the cache gives what PEFT's own forward gives."""
    monkeypatch.setattr("tests.adapters.VIRTUAL_TOKENS", 17)
    base = windowed(kind, window=5)
    model = SiameseModel(attach_adapter(base, ADAPTERS[method](base)), make_gate("mean_logits", 32)).eval()
    randomize_adapter(model, seed=3)
    cache = prompt_cache(model.peft_model)
    lengths = [key.shape[2] for key, _ in cache]
    cropped = kind == "gemma2" and method in ("prefix_tuning", "prefix_projection", "cartridge")
    assert lengths == ([4, 17] if cropped else [17, 17])
    missing_rows = [(0, 0, 17 - length, 0) for length in lengths]
    padded = [
        (functional.pad(key, missing, value=9.0), functional.pad(value, missing, value=9.0))
        for (key, value), missing in zip(cache, missing_rows, strict=True)
    ]
    with torch.no_grad():
        expected = model.peft_model(input_ids=TEXT).logits[:, -7:]
        rows, positions = torch.zeros(7, dtype=torch.int64), torch.arange(7)
        logits, _ = model.fused_logits(model.stream_states(TEXT), torch.ones_like(TEXT), rows, positions, -1e4)
        assert_close(logits, expected[0], **CLOSE)
        assert_close(continued(model.causal_lm, padded), expected, **CLOSE)
