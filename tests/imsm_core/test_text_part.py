"""The text part of multimodal models: the same logits as the whole model's, and adapters that were trained on it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import cli
from imsm_core.adapters.attach import put_on
from imsm_core.adapters.saved import read_adapter
from imsm_core.adapters.text_names import for_text_part
from imsm_core.backbone import load_base_model
from imsm_core.errors import BaseModelError
from imsm_core.text_part import TAKEN_OUT
from tests.builders import write_jsonl
from tests.multimodal import CONFIGS, make_multimodal

IDS = torch.tensor([[5, 9, 3, 77, 250, 31, 8, 12, 100, 44, 55, 66]])  # longer than the windows


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def test_every_kind_is_tested() -> None:
    assert set(CONFIGS) == TAKEN_OUT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_text_part_gives_the_logits_of_the_whole_model(tmp_path: Path, kind: str, tied: bool) -> None:
    whole = make_multimodal(tmp_path, kind, tied)
    text = load_base_model(str(tmp_path))
    assert type(text).__name__.endswith("ForCausalLM")
    assert not any(re.search("vision|visual|audio|projector", name) for name, _ in text.named_parameters())
    torch.testing.assert_close(logits(text), logits(whole), rtol=1e-6, atol=1e-6)
    assert logits(whole).std() > 0.1


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "idefics3"])
def test_weights_may_have_the_names_of_the_model_in_memory(tmp_path: Path, kind: str) -> None:
    whole = make_multimodal(tmp_path, kind)
    weights = {name: value.contiguous() for name, value in whole.state_dict().items()}
    assert set(weights) != set(load_file(tmp_path / "model.safetensors")) or kind == "idefics3"
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(load_base_model(str(tmp_path))), logits(whole), rtol=1e-6, atol=1e-6)


def test_weight_of_the_text_part_that_it_does_not_use_is_refused(tmp_path: Path) -> None:
    make_multimodal(tmp_path, "llava")
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    weights[name.replace("weight", "bias")] = torch.zeros(64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"has 1 weights that a 'llama' model .*q_proj\.bias"):
        load_base_model(str(tmp_path))


def test_kind_whose_text_part_is_not_taken_out_is_refused_by_name(tmp_path: Path) -> None:
    """PaliGemma's prompt attends to all of itself, which its text model alone would not do."""
    (tmp_path / "config.json").write_text('{"model_type": "paligemma", "text_config": {"model_type": "gemma"}}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"is multimodal \(paligemma with gemma\), and its text part is not taken"):
        load_base_model(str(tmp_path))


# Targets as users write them: PEFT looks for the list in pictures' layers too, and there is one expression a form.
TARGETS: dict[str, Any] = {
    "list": ["q_proj", "v_proj"],
    "expression": r".*language_model.*\.(q_proj|v_proj)",
    "places": ["model.language_model.layers.1.self_attn.q_proj", "language_model.layers.0.mlp.up_proj"],
}


def multimodal_adapter(folder: Path, kind: str, **options: Any) -> tuple[Path, PeftModel]:
    """A LoRA with random values on the whole model, as PEFT saves it, and the model with it."""
    whole = make_multimodal(folder / "base", kind)
    tuned: Any = get_peft_model(whole, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(str(folder / "adapter"))
    return folder / "adapter", tuned.eval()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen3_vl"])
def test_adapter_of_the_whole_model_works_on_its_text_part(
    tmp_path: Path, kind: str, targets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole = multimodal_adapter(tmp_path, kind, target_modules=TARGETS[targets])
    base = load_base_model(str(tmp_path / "base"))
    before = logits(base)
    tuned = put_on(base, for_text_part(base, read_adapter(folder)))
    torch.testing.assert_close(logits(tuned), logits(whole), rtol=1e-5, atol=1e-5)
    assert (logits(tuned) - before).abs().max() > 0.05
    vision = [name for name in load_file(folder / "adapter_model.safetensors") if "language_model" not in name]
    said = "are not for the text part of its multimodal model and are left out" in capsys.readouterr().err
    assert said == bool(vision)
    assert bool(vision) == (targets == "list" and kind != "qwen3_vl")


def test_patterns_layers_and_saved_modules_keep_their_meaning(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "language_model.layers",
        "rank_pattern": {"language_model.layers.1.self_attn.q_proj": 2, "v_proj": 3},
        "alpha_pattern": {"v_proj": 5},
        "modules_to_save": ["language_model.norm", "multi_modal_projector"],
    }
    folder, whole = multimodal_adapter(tmp_path, "gemma3", **options)
    base = load_base_model(str(tmp_path / "base"))
    tuned = put_on(base, for_text_part(base, read_adapter(folder)))
    torch.testing.assert_close(logits(tuned), logits(whole), rtol=1e-5, atol=1e-5)
    ranks = {name: p.shape[0] for name, p in tuned.named_parameters() if "lora_A" in name}
    assert {name.split(".lora_A")[0].removeprefix("base_model.model."): rank for name, rank in ranks.items()} == {
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.self_attn.v_proj": 3,
    }


def test_names_of_older_versions_of_transformers_are_known(tmp_path: Path) -> None:
    folder, whole = multimodal_adapter(tmp_path, "llava", target_modules=TARGETS["expression"])
    file = folder / "adapter_model.safetensors"
    old = {
        name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model."): value
        for name, value in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    assert next(iter(old)).startswith("base_model.model.language_model.model.layers.")
    base = load_base_model(str(tmp_path / "base"))
    tuned = put_on(base, for_text_part(base, read_adapter(folder)))
    torch.testing.assert_close(logits(tuned), logits(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_train_and_export_on_the_text_part(tmp_path: Path, kind: str) -> None:
    """The export compares the graph with PyTorch by value."""
    make_multimodal(tmp_path / "base", kind)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Once", "answer": " upon a time"}])
    checkpoint = tmp_path / "checkpoint"
    command = ["--debug", "train", "--model", tmp_path / "base", "--data", data, "--out", checkpoint, "--steps", "2"]
    assert cli.main([*map(str, command), "--no-progress"]) == 0
    assert cli.main(["--debug", "export", str(checkpoint), str(tmp_path / "artifact")]) == 0


def test_adapter_of_the_whole_model_exports(tmp_path: Path) -> None:
    folder, _ = multimodal_adapter(tmp_path, "gemma3", target_modules=TARGETS["expression"])
    base, artifact = str(tmp_path / "base"), str(tmp_path / "artifact")
    assert cli.main(["--debug", "export", "--adapter", str(folder), "--base", base, artifact]) == 0
    shutil.rmtree(artifact)
