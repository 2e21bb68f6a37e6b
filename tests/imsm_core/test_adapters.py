"""Which adapters are made and loaded, and which are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from imsm_core.adapters import adapted_layers, attach_adapter, load_adapter, peft_config
from imsm_core.backbone import load_base_model
from imsm_core.errors import AdapterError
from tests.builders import make_siamese

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def attach(folder: Path, *targets: str) -> PeftModel:
    return attach_adapter(load_base_model(str(folder)), peft_config("lora", 4, target_modules=targets or None))


@pytest.fixture
def adapter_folder(base_folder: Path, tmp_path: Path) -> Path:
    make_siamese(base_folder).peft_model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def write_adapter(base_folder: Path, config: PeftConfig, target: Path) -> Path:
    """An adapter folder that PEFT wrote without this package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(load_base_model(str(base_folder)), config).save_pretrained(str(target))
    return target


def test_defaults_are_the_authors() -> None:
    config = peft_config("lora")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 16, 0.1)  # type: ignore[attr-defined]


def test_adapter_is_on_every_linear_layer_but_the_head_unless_told(base_folder: Path, gpt2_folder: Path) -> None:
    llama = [layer.name for layer in adapted_layers(attach(base_folder))]
    assert len(llama) == 2 * 7
    assert {name.rsplit(".", 1)[-1] for name in llama} == PROJECTIONS
    gpt2 = {layer.name.rsplit(".", 1)[-1] for layer in adapted_layers(attach(gpt2_folder))}
    assert gpt2 == {"c_attn", "c_proj", "c_fc"}


def test_target_modules_choose_the_layers(base_folder: Path) -> None:
    names = [layer.name for layer in adapted_layers(attach(base_folder, "q_proj", "layers.1.mlp.up_proj"))]
    assert names == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_target_module_that_matches_nothing_is_refused_even_beside_one_that_does(base_folder: Path) -> None:
    with pytest.raises(AdapterError, match="'q_porj'"):
        attach(base_folder, "q_proj", "q_porj")
    with pytest.raises(AdapterError, match="not found in the base model"):
        attach(base_folder, "q_porj")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("name", ["base_folder", "qwen2_folder"])
def test_head_and_embeddings_stay_frozen(name: str, target: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(AdapterError, match=f"touches .*{target}"):
        attach(request.getfixturevalue(name), "q_proj", target)


def test_layer_that_lora_cannot_adapt_is_an_error_of_one_line(base_folder: Path) -> None:
    with pytest.raises(AdapterError, match="does not fit the model") as caught:
        attach(base_folder, "input_layernorm")
    assert "\n" not in str(caught.value)


def test_attaching_to_transposed_layers_warns_of_nothing(gpt2_folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    attach(gpt2_folder)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ia3"}, "unsupported PEFT method 'ia3'; choose one of lora"),
        ({"rank": 0}, "adapter rank is 0"),
        ({"alpha": 0}, "adapter alpha is 0"),
        ({"dropout": 1.0}, "adapter dropout is 1.0"),
        ({"dropout": -0.1}, "adapter dropout is -0.1"),
        ({"dropout": float("nan")}, "adapter dropout is nan"),
    ],
)
def test_setting_outside_its_range_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        peft_config(**({"method": "lora"} | arguments))  # type: ignore[arg-type]


def test_loaded_adapter_has_the_saved_values(base_folder: Path, adapter_folder: Path) -> None:
    loaded = load_adapter(load_base_model(str(base_folder)), adapter_folder)
    saved = load_file(adapter_folder / "adapter_model.safetensors")
    values = {name.replace(".default", ""): parameter for name, parameter in loaded.named_parameters()}
    assert len(saved) == 2 * 2 * 7
    assert all(torch.equal(values[name], tensor) for name, tensor in saved.items())
    assert all(tensor.abs().sum() > 0 for tensor in saved.values())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(base_folder: Path, adapter_folder: Path, name: str) -> None:
    (adapter_folder / name).unlink()
    with pytest.raises(AdapterError, match=f"has no {name}"):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


def test_pickled_adapter_is_not_read(base_folder: Path, adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    torch.save(load_file(file), adapter_folder / "adapter_model.bin")
    file.unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


def test_adapter_that_lacks_a_weight_is_refused_and_not_filled_with_initial_values(
    base_folder: Path, adapter_folder: Path
) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, file)
    with pytest.raises(AdapterError, match="1 missing or too many, such as " + name.replace(".", r"\.")):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


def test_adapter_with_a_weight_for_a_layer_that_is_not_there_is_refused(
    base_folder: Path, adapter_folder: Path
) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file(weights | {name: torch.ones(4, 32)}, file)
    with pytest.raises(AdapterError, match=r"layers\.7"):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


def test_adapter_of_another_base_model_is_refused(gpt2_folder: Path, adapter_folder: Path) -> None:
    with pytest.raises(AdapterError, match="cannot load the adapter in"):
        load_adapter(load_base_model(str(gpt2_folder)), adapter_folder)


def test_adapter_with_values_that_are_not_finite_is_refused(base_folder: Path, adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights[min(weights)][0, 0] = torch.nan
    save_file(weights, file)
    with pytest.raises(AdapterError, match="not finite"):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "config is no JSON", "config is a list"])
def test_damaged_adapter_is_an_error_of_one_line(base_folder: Path, adapter_folder: Path, damage: str) -> None:
    weights, config = adapter_folder / "adapter_model.safetensors", adapter_folder / "adapter_config.json"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-50])
        case "empty":
            weights.write_bytes(b"")
        case "config is no JSON":
            config.write_text("{")
        case "config is a list":
            config.write_text("[]")
    with pytest.raises(AdapterError, match="cannot load the adapter in") as caught:
        load_adapter(load_base_model(str(base_folder)), adapter_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "PEFT type IA3"),
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PEFT type PREFIX_TUNING"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"), "modules_to_save"),
        (LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"), "embed_tokens"),
        (
            LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4], task_type="CAUSAL_LM"),
            "trainable_token_indices",
        ),
    ],
    ids=["ia3", "prefix", "modules_to_save", "embeddings", "token_indices"],
)
def test_adapter_that_peft_alone_made_is_refused_where_it_contradicts_the_method(
    base_folder: Path, tmp_path: Path, config: PeftConfig, message: str
) -> None:
    folder = write_adapter(base_folder, config, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_base_model(str(base_folder)), folder)


def test_adapter_that_trains_the_backbones_biases_is_refused(qwen2_folder: Path, tmp_path: Path) -> None:
    """Such an adapter changes the base stream: its biases stay changed when it is disabled."""
    config = LoraConfig(target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    folder = write_adapter(qwen2_folder, config, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="bias='lora_only'"):
        load_adapter(load_base_model(str(qwen2_folder)), folder)


def test_unknown_peft_type_is_refused(base_folder: Path, adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "NEXT_YEARS_METHOD"}))
    with pytest.raises(AdapterError, match="cannot load the adapter"):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)
