"""Loading a base model, its fingerprint, its states and its head, on real Hugging Face folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from imsm_core.backbone import apply_head, fingerprint, hidden_size, last_hidden_state, load_base_model, load_tokenizer
from imsm_core.errors import BaseModelError
from tests.builders import CHAT_TEMPLATE, VOCABULARY, make_base_folder, make_tokenizer

LLAMA_LIKE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_LIKE = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | {
    name: LLAMA_LIKE[name] for name in ("bos_token_id", "eos_token_id")
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "mixtral": LLAMA_LIKE | {"num_local_experts": 2},
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE | {"final_logit_softcapping": 0.5},
    "granite": LLAMA_LIKE | {"logits_scaling": 3.0},
    "cohere": LLAMA_LIKE | {"logit_scale": 0.3},
    "phi": LLAMA_LIKE,  # an lm_head with a bias
    "gpt2": GPT2_LIKE,
    "gpt_neox": {name: LLAMA_LIKE[name] for name in LLAMA_LIKE if name not in ("num_key_value_heads", "head_dim")},
    "opt": {
        **{name: LLAMA_LIKE[name] for name in LLAMA_LIKE if name not in ("num_key_value_heads", "head_dim")},
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_of_the_last_hidden_state_is_the_models_own_logits(architecture: str) -> None:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and scales too
            parameter += 0.2 * torch.randn_like(parameter)
        input_ids = torch.randint(3, 60, (2, 7))
        hidden = last_hidden_state(model, input_ids=input_ids)
        logits = apply_head(model, hidden)
        assert hidden.shape == (2, 7, hidden_size(model))
        torch.testing.assert_close(logits, model(input_ids=input_ids, use_cache=False).logits)
        assert logits.std() > 1e-3
        # Any states go through the head, at any number of positions, and the model itself is as before.
        torch.testing.assert_close(apply_head(model, hidden[:, 2:4]), logits[:, 2:4])
        torch.testing.assert_close(model(input_ids=input_ids, use_cache=False).logits, logits)


def test_model_comes_back_to_life_after_a_failure_inside_its_head(base_folder: Path) -> None:
    model = load_base_model(str(base_folder))
    with pytest.raises(RuntimeError):
        apply_head(model, torch.zeros(1, 2, 5))
    assert model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, VOCABULARY)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_loaded_model_is_frozen_float32_and_in_eval_mode(tmp_path: Path, kind: str) -> None:
    folder = make_base_folder(tmp_path / kind, kind)
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    model.save_pretrained(str(folder))
    model = load_base_model(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    assert hidden_size(model) == model.config.hidden_size


def test_fingerprint_sees_one_changed_weight_and_nothing_else(base_folder: Path) -> None:
    model = load_base_model(str(base_folder))
    before = fingerprint(model)
    assert fingerprint(load_base_model(str(base_folder))) == before
    assert len(before) == 64
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    assert fingerprint(model) != before


def test_fingerprint_does_not_depend_on_where_or_in_which_files_the_weights_are(
    base_folder: Path, tmp_path: Path
) -> None:
    model = load_base_model(str(base_folder))
    model.save_pretrained(str(tmp_path), max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint(load_base_model(str(tmp_path))) == fingerprint(model)


@pytest.fixture
def copied_base(base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_folder, tmp_path / "copy"))


def test_base_model_that_lacks_a_weight_is_refused_and_not_filled_with_random_values(copied_base: Path) -> None:
    weights = load_file(copied_base / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, copied_base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 weights, such as model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_base_model(str(copied_base))


def test_truncated_base_model_is_refused(copied_base: Path) -> None:
    file = copied_base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="cannot load the base model"):
        load_base_model(str(copied_base))


def test_pickled_weights_are_not_read(copied_base: Path) -> None:
    torch.save(load_file(copied_base / "model.safetensors"), copied_base / "pytorch_model.bin")
    (copied_base / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="safetensors"):
        load_base_model(str(copied_base))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no", "~/no", "a/b/c", "no/"])
def test_missing_folder_is_named(name: str) -> None:
    for load in (load_base_model, load_tokenizer):
        with pytest.raises(BaseModelError, match=f"no base model at '{name}': the folder does not exist"):
            load(name)


def test_folder_without_a_model_gives_one_line(tmp_path: Path) -> None:
    for load in (load_base_model, load_tokenizer):
        with pytest.raises(BaseModelError) as caught:
            load(str(tmp_path))
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_hub_id_without_a_network_is_an_error_of_one_line() -> None:
    with pytest.raises(BaseModelError, match="cannot load the base model 'nobody/no-such-model'") as caught:
        load_base_model("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_tokenizer_keeps_its_chat_template_and_encodes_any_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, CHAT_TEMPLATE)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert len(tokenizer) == VOCABULARY
    text = "naïve\u2028 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
