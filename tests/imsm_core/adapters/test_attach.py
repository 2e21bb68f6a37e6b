"""Which adapters are made and loaded, and which are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    EvaConfig,
    KasaConfig,
    LilyConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    OSFConfig,
    PeftConfig,
    PeftModel,
    PolyConfig,
    ShadowConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from imsm_core.adapters.attach import adapted_layers, attach_adapter, load_adapter, save_adapter
from imsm_core.adapters.biases import backbone_biases
from imsm_core.adapters.methods import peft_config
from imsm_core.backbone import load_base_model
from imsm_core.errors import AdapterError, SettingsError
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel
from tests.adapters import TOKENS, make_siamese_with
from tests.builders import make_siamese

TINY_PHI: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
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


@pytest.mark.parametrize("name", ["base_folder", "qwen2_folder"])
def test_head_stays_frozen(name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(AdapterError, match="touches lm_head; IMSM keeps the lm_head frozen"):
        attach(request.getfixturevalue(name), "q_proj", "lm_head")


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
        ({"method": "magic"}, "^peft is magic; choose one of lora"),
        ({"rank": 0}, "^adapter_rank is 0"),
        ({"alpha": 0}, "^adapter_alpha is 0"),
        ({"dropout": 1.0}, "^adapter_dropout is 1.0"),
        ({"dropout": -0.1}, "^adapter_dropout is -0.1"),
        ({"dropout": float("nan")}, "^adapter_dropout is nan"),
    ],
)
def test_setting_outside_its_range_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
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
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors; its adapter_model\.bin is pickled"):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


def test_adapter_that_lacks_a_weight_is_refused_and_not_filled_with_initial_values(
    base_folder: Path, adapter_folder: Path
) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, file)
    with pytest.raises(AdapterError, match="1 missing or unexpected, such as " + name.replace(".", r"\.")):
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
    with pytest.raises(AdapterError) as caught:
        load_adapter(load_base_model(str(gpt2_folder)), adapter_folder)
    trained_on = json.loads((adapter_folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert str(caught.value) == (
        f"cannot load the adapter in {adapter_folder}: this gpt2 model has none of its target modules, such as "
        "'model.layers.0.mlp.down_proj'; if the adapter was trained on another model, "
        f"{trained_on!r}, give that one by base"
    )


def test_adapter_of_a_wider_base_model_is_refused_with_both_sizes(qwen2_folder: Path, adapter_folder: Path) -> None:
    with pytest.raises(AdapterError, match=r"q_proj\.lora_A\.default\.weight is \[4, 32\] .* and \[4, 64\] .*by base$"):
        load_adapter(load_base_model(str(qwen2_folder)), adapter_folder)


def test_adapter_with_values_that_are_not_finite_is_refused(base_folder: Path, adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights[min(weights)][0, 0] = torch.nan
    save_file(weights, file)
    with pytest.raises(AdapterError, match="not finite"):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "cannot load the adapter in"),
        ("empty", "cannot load the adapter in"),
        ("config is no JSON", r"adapter_config\.json is not a PEFT config: JSONDecodeError"),
        ("config is a list", r"adapter_config\.json is not a PEFT config: it is not a JSON object"),
    ],
)
def test_damaged_adapter_is_an_error_of_one_line(
    base_folder: Path, adapter_folder: Path, damage: str, message: str
) -> None:
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
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(load_base_model(str(base_folder)), adapter_folder)
    assert "\n" not in str(caught.value)


TASK: dict[str, Any] = {"task_type": "CAUSAL_LM"}
Q_PROJ: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
INITS: tuple[Any, ...] = ("pissa", "pissa_niter_4", "olora")
REFUSED: dict[str, tuple[PeftConfig, str]] = {
    "multitask": (
        MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **TASK),
        "PEFT type MULTITASK_PROMPT_TUNING is not supported: it needs a task id",
    ),
    "poly": (PolyConfig(**Q_PROJ), "PEFT type POLY is not supported: it needs a task id"),
    "adaption_prompt": (
        AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **TASK),
        "PEFT type ADAPTION_PROMPT is not supported: it replaces whole attention modules",
    ),
    "shadow": (ShadowConfig(**Q_PROJ), "PEFT type SHADOW is not supported: it runs a second network"),
    "osf": (OSFConfig(**Q_PROJ), "PEFT type OSF is not supported: it replaces the backbone's own weights"),
    "lily": (LilyConfig(**Q_PROJ), "PEFT type LILY is not supported: its router averages over the whole text"),
    "head": (LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"), "touches lm_head"),
    "saved head": (LoraConfig(**Q_PROJ, modules_to_save=["lm_head"]), "touches lm_head"),
    "head's tokens": (LoraConfig(**Q_PROJ, trainable_token_indices={"lm_head": [3]}), "touches lm_head"),
    "alora": (LoraConfig(**Q_PROJ, alora_invocation_tokens=[3, 4]), "alora_invocation_tokens is not supported"),
    "replication": (LoraConfig(**Q_PROJ, layer_replication=[(0, 2), (0, 2)]), "layer_replication is not supported"),
    "kasa": (LoraConfig(**Q_PROJ, kasa_config=KasaConfig()), "kasa_config is not supported: it changes the backbone"),
    "task": (LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"), "for the task SEQ_CLS; IMSM needs"),
} | {
    init: (
        LoraConfig(**Q_PROJ, init_lora_weights=init),
        f"init_lora_weights='{init}' is not supported: it changes the backbone",
    )
    for init in INITS
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapter_that_contradicts_the_method_is_refused_by_name_and_reason(base_folder: Path, name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message) as caught:
        attach_adapter(load_base_model(str(base_folder)), config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["saved head", "head", "pissa", "alora"])
def test_refused_adapter_that_peft_alone_made_is_refused_when_it_is_loaded(
    base_folder: Path, tmp_path: Path, name: str
) -> None:
    config, message = REFUSED[name]
    folder = write_adapter(base_folder, config, tmp_path / "adapter")
    if name == "saved head":  # which is harmless as long as nothing has changed it
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor + 0.1 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
        message = r"trains the lm_head for tokens that the base model has \(259, such as 0\); IMSM keeps it frozen"
    with pytest.raises(AdapterError, match=message):
        load_adapter(load_base_model(str(base_folder)), folder)


def test_adapter_whose_initial_values_change_the_backbone_is_found_out_by_value(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an option of PEFT's that this package has never heard of would."""
    monkeypatch.setattr("imsm_core.adapters.refusals._LORA_INITS", ())
    with pytest.raises(AdapterError, match=r"changes the backbone's own weights.*q_proj\.weight"):
        attach_adapter(load_base_model(str(base_folder)), REFUSED["pissa"][0])


def test_adapter_that_trains_the_heads_bias_is_refused(tmp_path: Path) -> None:
    model = PhiForCausalLM(PhiConfig(**TINY_PHI)).eval().requires_grad_(False)
    with pytest.raises(AdapterError, match="trains the lm_head's bias"):
        attach_adapter(model, LoraConfig(**Q_PROJ, bias="all"))


def test_adapter_that_trains_the_backbones_biases_keeps_the_originals(qwen2_folder: Path) -> None:
    plain = load_base_model(str(qwen2_folder))
    model = make_siamese_with(qwen2_folder, "lora_only_biases")
    biases = backbone_biases(model.peft_model)
    assert set(biases) == {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in (0, 1) for p in "qkv"}
    for name, (frozen, trained) in biases.items():
        assert torch.equal(frozen, plain.get_parameter(name))
        assert trained.requires_grad
        assert not torch.equal(frozen, trained)


def test_peft_model_whose_original_biases_are_lost_is_refused(qwen2_folder: Path) -> None:
    peft_model = get_peft_model(load_base_model(str(qwen2_folder)), LoraConfig(**Q_PROJ, bias="all"))
    with pytest.raises(AdapterError, match="bias='all' trains the backbone's biases, and their original values"):
        SiameseModel(peft_model, make_gate("mean_logits", 64))


def test_adapter_with_nothing_to_train_is_refused(base_folder: Path) -> None:
    config = CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=2, task_type="CAUSAL_LM", inference_mode=True)
    with pytest.raises(AdapterError, match="there is nothing to train: this CARTRIDGE config"):
        attach_adapter(load_base_model(str(base_folder)), config)


@pytest.mark.parametrize("name", ["trainable_tokens", "lora_tokens"])
@pytest.mark.parametrize("base", ["base_folder", "qwen2_folder", "gpt2_folder"])
def test_trained_tokens_of_tied_embeddings_leave_the_head_frozen(
    base: str, name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    model, plain = make_siamese_with(folder, name), load_base_model(str(folder))
    head = model.causal_lm.get_output_embeddings()
    assert type(head) is nn.Linear
    assert torch.equal(head.weight, plain.get_output_embeddings().weight)
    embeddings = model.causal_lm.get_input_embeddings()
    with torch.no_grad():
        changed = (embeddings(torch.arange(256)) != plain.get_input_embeddings()(torch.arange(256))).any(-1)
    assert changed.nonzero().flatten().tolist() == TOKENS
    assert (model.causal_lm.config.tie_word_embeddings is False) == (base == "base_folder")


def test_peft_model_made_elsewhere_gets_its_frozen_head_back(qwen2_folder: Path) -> None:
    config = TrainableTokensConfig(token_indices=TOKENS, **TASK)
    model = SiameseModel(get_peft_model(load_base_model(str(qwen2_folder)), config), make_gate("mean_logits", 64))
    assert type(model.causal_lm.get_output_embeddings()) is nn.Linear


def test_adapted_layers_name_each_module_that_differs_with_the_frozen_one_in_it(base_folder: Path) -> None:
    model, plain = make_siamese_with(base_folder, "lora_norms"), load_base_model(str(base_folder))
    layers = {layer.name: layer for layer in adapted_layers(model.peft_model)}
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    norms = {name for name, _ in plain.named_modules() if name.endswith("norm")}
    assert set(layers) == linear | norms
    for name, layer in layers.items():
        assert torch.equal(layer.frozen.get_parameter("weight"), plain.get_parameter(f"{name}.weight"))
        assert type(layer.frozen) is type(plain.get_submodule(name))
        assert layer.tuner is model.causal_lm.get_submodule(name)


def test_of_nested_tuner_layers_the_outermost_is_listed(base_folder: Path) -> None:
    config = LoraConfig(target_parameters=["q_proj.weight"], target_modules=["k_proj"], **TASK)
    layers = adapted_layers(attach_adapter(load_base_model(str(base_folder)), config))
    assert [layer.name.rsplit(".", 1)[-1] for layer in layers] == ["q_proj", "k_proj"] * 2
    assert all(type(layer.frozen) is nn.Linear for layer in layers)


def rewrite(folder: Path, **fields: object) -> Path:
    """The adapter folder with other fields in its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "NEXT_YEARS_METHOD"}, "has the unknown peft_type 'NEXT_YEARS_METHOD'; choose one of ADALORA"),
        ({"peft_type": "POLY"}, "PEFT type POLY is not supported"),
        ({"lora_alpha": float("nan")}, "the adapter's lora_alpha is not finite"),
        ({"trainable_token_indices": [-1]}, "the token id -1 is not in"),
        ({"next_years_field": 1, "task_type": "SEQ_CLS"}, "for the task SEQ_CLS"),
        ({"modules_to_save": ["lm_head"]}, "touches lm_head; IMSM keeps"),
        (
            {"r": 5},
            r"does not fit: .*lora_A\.default\.weight is \[4, 32\] in its file and \[5, 32\] by",
        ),
        (
            {"r": 10**9},
            r"does not fit: .*lora_A\.default\.weight is \[4, 32\] in its file and \[1000000000,",
        ),
    ],
    ids=str,
)
def test_config_that_does_not_fit_is_refused_in_one_line_and_without_pefts_warnings(
    base_folder: Path, adapter_folder: Path, fields: dict[str, object], message: str, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(load_base_model(str(base_folder)), rewrite(adapter_folder, **fields))
    assert "\n" not in str(caught.value)
    assert [str(warning.message) for warning in recwarn] == []


def test_field_of_a_newer_peft_is_warned_of_when_the_adapter_loads(base_folder: Path, adapter_folder: Path) -> None:
    with pytest.warns(UserWarning, match="next_years_field"):
        load_adapter(load_base_model(str(base_folder)), rewrite(adapter_folder, next_years_field=1))


def test_adapter_of_data_driven_initial_values_loads_but_is_not_made(base_folder: Path, adapter_folder: Path) -> None:
    load_adapter(load_base_model(str(base_folder)), rewrite(adapter_folder, init_lora_weights="eva", eva_config={}))
    with pytest.raises(
        AdapterError, match="init_lora_weights='eva' is not supported: it needs an extra pass over the data"
    ):
        attach_adapter(
            load_base_model(str(base_folder)), LoraConfig(**Q_PROJ, init_lora_weights="eva", eva_config=EvaConfig())
        )


def test_adapter_of_integers_is_refused(base_folder: Path, adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    weights = load_file(file)
    save_file(weights | {min(weights): weights[min(weights)].to(torch.int64)}, file)
    with pytest.raises(AdapterError, match="holds integers in " + min(weights).replace(".", r"\.")):
        load_adapter(load_base_model(str(base_folder)), adapter_folder)


def test_saved_config_has_its_sets_in_order(base_folder: Path, tmp_path: Path) -> None:
    save_adapter(attach(base_folder, *PROJECTIONS), tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["target_modules"] == sorted(PROJECTIONS)
    load_adapter(load_base_model(str(base_folder)), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but")
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_bias_of_lora_itself_is_none_of_the_backbones(base_folder: Path, tmp_path: Path, bias: Any) -> None:
    """A Llama has no biases."""
    peft_model = attach_adapter(load_base_model(str(base_folder)), LoraConfig(**Q_PROJ, bias=bias, lora_bias=True))
    assert backbone_biases(peft_model) == {}
    save_adapter(peft_model, tmp_path / "adapter")
    assert backbone_biases(load_adapter(load_base_model(str(base_folder)), tmp_path / "adapter")) == {}
    elsewhere = get_peft_model(load_base_model(str(base_folder)), LoraConfig(**Q_PROJ, bias=bias, lora_bias=True))
    assert backbone_biases(elsewhere) == {}
