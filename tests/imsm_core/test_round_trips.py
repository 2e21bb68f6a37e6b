"""Every PEFT method to disk and back: by this package and by PEFT's own loader alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from imsm_core.adapters.attach import adapted_layers, load_adapter
from imsm_core.adapters.virtual_tokens import prompt_cache
from imsm_core.backbone import load_base_model
from imsm_core.checkpoint import load_checkpoint
from imsm_core.errors import AdapterError
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel
from tests.adapters import ADAPTERS, make_siamese_with, randomize_adapter
from tests.builders import save_tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # SHiRA's forward, by PyTorch

TEXT = torch.tensor([[0, 70, 80, 90, 100, 110, 120]])
ON_SMALL_MODELS = ("lora", "lora_tokens", "lora_saved_embeddings", "adalora", "vera", "vblora", "ln_tuning")
CASES = [("base_folder", name) for name in ADAPTERS] + [
    (base, name)
    for base in ("qwen2_folder", "gpt2_folder")
    for name in (*ON_SMALL_MODELS, "trainable_tokens", "lora_all_biases", "prefix_tuning", "prompt_tuning", "p_tuning")
]


@torch.no_grad()
def pefts_state(peft_model: PeftModel) -> Tensor:
    """The last hidden states by PEFT's own forward."""
    states: Tensor = peft_model.eval()(input_ids=TEXT, output_hidden_states=True).hidden_states[-1]
    return states[:, -TEXT.shape[1] :]


@pytest.mark.parametrize(("base", "name"), CASES)
def test_saved_adapter_is_the_same_for_this_package_and_for_peft_alone(
    base: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(base)
    model = make_siamese_with(folder, name)
    expected = pefts_state(model.peft_model)
    save_tiny_checkpoint(model, folder, tmp_path / "checkpoint")
    assert {file.suffix for file in (tmp_path / "checkpoint" / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    ours, _ = load_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        before, after = model.stream_states(TEXT), ours.stream_states(TEXT)
    exact: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5} if name == "p_tuning_lstm" else {"atol": 0.0, "rtol": 0.0}
    assert torch.equal(before.base, after.base)
    assert_close(before.adapter, after.adapter, **exact)
    assert ours.trainable_parameters() == {}
    for one, other in zip(prompt_cache(model.peft_model), prompt_cache(ours.peft_model), strict=True):
        assert_close(one, other, **exact)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = PeftModel.from_pretrained(load_base_model(str(folder)), str(tmp_path / "checkpoint" / "adapter"))
    assert_close(pefts_state(alone), expected, **exact)


def test_adapter_with_another_name_is_saved_as_the_only_one(base_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(load_base_model(str(base_folder)), config, "first")
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    peft_model.set_adapter("second")
    model = SiameseModel(peft_model, make_gate("mean_logits", 32)).eval()
    assert {layer.name.rsplit(".", 1)[-1] for layer in adapted_layers(peft_model)} == {"up_proj"}
    randomize_adapter(model, seed=1)
    save_tiny_checkpoint(model, base_folder, tmp_path / "checkpoint")
    names = {path.name for path in (tmp_path / "checkpoint" / "adapter").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.equal(loaded.stream_states(TEXT).adapter, model.stream_states(TEXT).adapter)


def test_several_adapters_active_at_once_are_refused_and_one_of_several_is_not(base_folder: Path) -> None:
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    peft_model: Any = get_peft_model(load_base_model(str(base_folder)), config, "first")
    peft_model.add_adapter("second", LoraConfig(r=2, task_type="CAUSAL_LM"))
    SiameseModel(peft_model, make_gate("mean_logits", 32))
    peft_model.base_model.set_adapter(["first", "second"])
    with pytest.raises(AdapterError, match=r"2 adapters are active at once \(first, second\); activate one"):
        SiameseModel(peft_model, make_gate("mean_logits", 32))


def test_merged_adapter_is_refused(base_folder: Path) -> None:
    peft_model = make_siamese_with(base_folder, "lora").peft_model
    peft_model.merge_adapter()
    with pytest.raises(AdapterError, match=r"the adapter is merged into model\.layers\.0"):
        SiameseModel(peft_model, make_gate("mean_logits", 32))


def test_adapter_saved_by_peft_with_its_base_embeddings_is_loaded_if_they_are_the_base_models(
    base_folder: Path, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(load_base_model(str(base_folder)), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(str(tmp_path / "same"))  # PEFT's default stores them
        with torch.no_grad():
            peft_model.get_input_embeddings().get_base_layer().weight[5] += 1
        peft_model.save_pretrained(str(tmp_path / "other"))
    assert any("base_layer" in name for name in load_file(tmp_path / "same" / "adapter_model.safetensors"))
    load_adapter(load_base_model(str(base_folder)), tmp_path / "same")
    with pytest.raises(AdapterError, match=r"stores embeddings or an lm_head unlike the base model's .*such as 5"):
        load_adapter(load_base_model(str(base_folder)), tmp_path / "other")
