"""The configs that `peft` and `peft_config` give, and how every method trains."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel
from torch import Tensor

from imsm_core.adapters.attach import attach_adapter
from imsm_core.adapters.biases import backbone_biases
from imsm_core.adapters.configs import read_peft_config
from imsm_core.adapters.methods import peft_config
from imsm_core.adapters.options import PEFT_METHODS, default_learning_rate
from imsm_core.backbone import hidden_size, load_base_model
from imsm_core.checkpoint import load_checkpoint
from imsm_core.errors import AdapterError, IMSMError, Interrupted, SettingsError
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel
from imsm_core.training import loop
from imsm_core.training.adalora import RankAllocation
from imsm_core.training.loop import answer_loss, train
from imsm_core.training.schedule import make_optimizer
from imsm_core.training.settings import TrainSettings
from tests.adapters import ADAPTERS, make_siamese_with
from tests.builders import PAD, save_tiny_checkpoint
from tests.imsm_core.training.runs import DATASET, EXAMPLES, SETTINGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # SHiRA's forward, by PyTorch
]
RANDOM_START = ("prefix_tuning", "prompt_tuning", "p_tuning", "c3a", "vblora")  # as their authors have it
LINEAR_ONLY = ("loha", "lokr", "oft", "boft", "hra", "delora", "c3a")  # PEFT has no form of these for GPT-2's layers
TEXT = torch.tensor([[0, 70, 80, 90, 100]])


def config_for(folder: Path, method: str, **options: Any) -> Any:
    tokens: dict[str, Any] = {"token_indices": [70, 80]} if method == "trainable_tokens" else {}
    return peft_config(method, **tokens, **options, model=load_base_model(str(folder)))


def fresh(folder: Path, method: str) -> SiameseModel:
    """A new adapter with the method's defaults."""
    base = load_base_model(str(folder))
    torch.manual_seed(0)
    model = SiameseModel(attach_adapter(base, config_for(folder, method)), make_gate("query_aware", hidden_size(base)))
    return model.eval()


def trained(model: SiameseModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}


# Configs


def test_released_defaults() -> None:
    lora = peft_config("lora")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 16, 0.1)  # type: ignore[attr-defined]
    dora = peft_config("dora")
    assert (dora.r, dora.lora_alpha, dora.use_dora) == (16, 32, True)  # type: ignore[attr-defined]
    rates = {"lora": 3e-4, "dora": 1e-4, "adalora": 2e-3}
    assert {method: default_learning_rate(peft_config(method)) for method in rates} == rates
    assert default_learning_rate(IA3Config(target_modules=["k_proj"], feedforward_modules=[])) == 3e-3
    assert default_learning_rate(AdaLoraConfig(total_step=5)) == 2e-3


@pytest.mark.parametrize("method", PEFT_METHODS)
@pytest.mark.parametrize("base", ["base_folder", "qwen2_folder", "gpt2_folder"])
def test_defaults_fit_any_architecture_and_train_something(
    base: str, method: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    if base == "gpt2_folder" and method in LINEAR_ONLY:
        with pytest.raises(AdapterError, match=r"the adapter does not fit the model: .*Conv1D"):
            fresh(folder, method)
        return
    model = fresh(folder, method)
    before, states = trained(model), model.stream_states(TEXT)
    assert len(before) > 2  # beside the gate's two
    loss, _ = answer_loss(model, EXAMPLES, PAD)
    loss.backward()
    reached = [
        name for name, p in model.trainable_parameters().items() if p.grad is not None and p.grad.abs().sum() > 0
    ]
    assert any(not name.startswith("gate.") for name in reached)
    assert not states.base.requires_grad


def test_ia3_without_a_known_mapping_scales_every_linear_layer_and_the_mlps_input(base_folder: Path) -> None:
    model: Any = load_base_model(str(base_folder))
    assert peft_config("ia3", model=model).target_modules is None  # type: ignore[attr-defined]
    model.config.model_type = "unheard_of"
    config: Any = peft_config("ia3", model=model)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert config.feedforward_modules == {"down_proj"}


def test_blocks_are_those_of_the_chosen_layers(base_folder: Path) -> None:
    assert config_for(base_folder, "oft").oft_block_size == 4  # inputs of 32 and 60
    assert config_for(base_folder, "oft", target_modules=["q_proj"]).oft_block_size == 32
    assert config_for(base_folder, "vblora").vector_length == 4
    assert config_for(base_folder, "vblora", target_modules=["k_proj"]).vector_length == 16


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ia3", {"rank": 3}, "^adapter_rank is 3; ia3 does not take it; it takes target_modules"),
        ("prefix_tuning", {"target_modules": ["q_proj"]}, "^target_modules is q_proj; prefix_tuning does not take it"),
        ("prompt_tuning", {"virtual_tokens": 0}, "^virtual_tokens is 0; it must be at least 1"),
        (
            "trainable_tokens",
            {},
            "^token_indices is not given; trainable_tokens trains the embeddings of chosen tokens, at least one",
        ),
        ("trainable_tokens", {"token_indices": [3, 259]}, "the token id 259 is not in the model's vocabulary of 259"),
        ("trainable_tokens", {"token_indices": [3, 3]}, "names a token twice"),
        ("fourierft", {"target_modules": ["nope"]}, "^target_modules is nope; it must name a linear layer"),
        ("c3a", {"target_modules": ["lm_head"]}, "target_modules is lm_head; it must name a linear layer, not"),
        (
            "ln_tuning",
            {"target_modules": ["q_proj"]},
            "^target_modules is q_proj; ln_tuning trains norms, and mo.*q_proj is not one",
        ),
        ("lora", {"rank": 5000}, "^adapter_rank is 5000; it must be at most 4096: no layer"),
    ],
)
def test_option_that_does_not_fit_the_method_is_refused(
    base_folder: Path, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(IMSMError, match=message):
        peft_config(method, **options, model=load_base_model(str(base_folder)))


def test_peft_config_file_is_read_as_peft_writes_it(base_folder: Path, tmp_path: Path) -> None:
    LoraConfig(r=3, target_modules=["q_proj"], inference_mode=True).save_pretrained(str(tmp_path))
    config: Any = read_peft_config(tmp_path / "adapter_config.json")
    assert (config.r, config.target_modules, config.inference_mode, config.task_type) == (
        3,
        {"q_proj"},
        False,
        "CAUSAL_LM",
    )
    attach_adapter(load_base_model(str(base_folder)), config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the PEFT config .*config\.json: No such file"),
        ("{", "is not a PEFT config: JSONDecodeError"),
        ("[]", "is not a PEFT config: it is not a JSON object"),
        ("null", "is not a PEFT config: it is not a JSON object"),
        ('"LORA"', "is not a PEFT config: it is not a JSON object"),
        ("[" * 100_000, "is not a PEFT config: its JSON is nested too deeply"),
        ("{}", "is not a PEFT config: it has no peft_type"),
        ('{"peft_type": "MAGIC"}', "has the unknown peft_type 'MAGIC'; choose one of ADALORA, .* LORA"),
        ('{"peft_type": ["LORA"]}', r"has the unknown peft_type \['LORA'\]"),
        ('{"peft_type": "XLORA", "rr": 3}', "PEFT type XLORA is not supported: it mixes"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "the adapter's lora_alpha is not finite"),
        ('{"peft_type": "LORA", "alpha_pattern": {"q_proj": 1e999}}', "the adapter's alpha_pattern is not finite"),
        (
            '{"peft_type": "LORA", "init_lora_weights": "eva"}',
            "init_lora_weights='eva' is not supported: it needs an extra pass",
        ),
        ('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": "5"}', "num_virtual_tokens is '5'; it must be a whole"),
        ('{"peft_type": "PROMPT_TUNING"}', "num_virtual_tokens is None; it must be a whole"),
        ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 0}', "num_virtual_tokens is 0; it must be a whole"),
        ('{"peft_type": "LORA", "rr": 3}', "has fields that LoraConfig does not know, such as rr"),
        ('{"peft_type": "LORA", "task_type": "POETRY"}', "cannot be used as a LoraConfig: Invalid task type: 'POETRY'"),
    ],
)
def test_unusable_peft_config_file_is_an_error_of_one_line(
    tmp_path: Path, content: str | None, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(AdapterError, match=message) as caught:
        read_peft_config(path)
    assert "\n" not in str(caught.value)
    assert [str(warning.message) for warning in recwarn] == []


def test_peft_config_file_may_begin_with_a_byte_order_mark_and_leave_adalora_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"peft_type": "ADALORA", "tinit": 10}', encoding="utf-8-sig")
    assert read_peft_config(path).tinit == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["TRAINABLE_TOKENS", "LORA"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([-1], "the token id -1 is not in the model's vocabulary of 259"),
        ([259], "the token id 259 is not in the model's vocabulary of 259"),
        ([5, 5], "names a token twice"),
        ([], r"token_indices is \[\]; it must be a list of token ids, at least one"),
        (["5"], r"token_indices is \['5'\]; it must be a list"),
    ],
)
def test_tokens_of_a_config_file_are_checked_as_the_options_are(
    base_folder: Path, tmp_path: Path, kind: str, indices: list[Any], message: str
) -> None:
    field = {"TRAINABLE_TOKENS": "token_indices", "LORA": "trainable_token_indices"}[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"peft_type": kind, field: indices, "target_modules": ["embed_tokens"]}))
    with pytest.raises(AdapterError, match=message):
        attach_adapter(load_base_model(str(base_folder)), read_peft_config(path))


@pytest.mark.parametrize("method", [name for name in PEFT_METHODS if name not in RANDOM_START])
def test_methods_that_change_layers_start_at_the_base_model(base_folder: Path, method: str) -> None:
    states = fresh(base_folder, method).stream_states(TEXT)
    assert torch.allclose(states.base, states.adapter, atol=1e-4)


# Training


@pytest.mark.parametrize("method", ADAPTERS)
def test_training_moves_adapter_and_gate_alone_and_lowers_the_loss(base_folder: Path, method: str) -> None:
    model = make_siamese_with(base_folder, method)
    before = trained(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in before}
    with torch.no_grad():
        base = model.stream_states(TEXT).base
    settings = replace(SETTINGS, steps=15, batch_size=5, gate_dropout=0.0, warmup_ratio=0.0)
    metrics = train(model, DATASET, settings, PAD, progress=False)
    assert metrics["final_loss"] < metrics["first_loss"]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    moved = {name for name, value in before.items() if not torch.equal(parameters[name], value)}
    assert {"gate.gate_down.weight", "gate.gate_up.weight"} < moved
    assert {name for name in before if name not in moved} <= {name for name in before if ".bias" in name}
    with torch.no_grad():
        assert torch.equal(model.stream_states(TEXT).base, base)


def test_learning_rate_is_the_methods_own_unless_given(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def spied(model: SiameseModel, settings: TrainSettings) -> torch.optim.Optimizer:
        made = make_optimizer(model, settings)
        rates.append(made.param_groups[0]["lr"])
        return made

    monkeypatch.setattr(loop, "make_optimizer", spied)
    for learning_rate in (None, 0.5):
        settings = TrainSettings(steps=1, batch_size=2, learning_rate=learning_rate)
        train(make_siamese_with(base_folder, "ia3"), DATASET, settings, PAD, progress=False)
    assert rates == [3e-3, 0.5]


def test_frozen_adapter_is_not_trained(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "lora")
    model.peft_model.requires_grad_(False)
    with pytest.raises(AdapterError, match="the adapter has nothing to train"):
        train(model, DATASET, SETTINGS, PAD, progress=False)


def test_only_the_prompt_encoder_and_the_gate_drop_out_in_training_mode(gpt2_folder: Path) -> None:
    model = make_siamese_with(gpt2_folder, "p_tuning_lstm").train()
    training = {name for name, module in model.named_modules() if module.training}
    inside = {name for name in training if name.startswith("peft_model.base_model")}
    assert inside == set()
    assert any("prompt_encoder" in name for name in training)


def stopped_after(steps: int, model: SiameseModel, settings: TrainSettings, partial: Path) -> None:
    """Train until Ctrl-C after so many steps."""
    step, done = loop._step, [0]

    def stopping(*arguments: Any) -> float:
        loss = step(*arguments)
        done[0] += 1
        if done[0] == steps:
            signal.raise_signal(signal.SIGINT)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", stopping)
        with pytest.raises(Interrupted):
            train(model, DATASET, settings, PAD, partial, progress=False)


@pytest.mark.parametrize("method", ["p_tuning_lstm", "prefix_projection", "lora_tokens", "lora_norms", "oft", "vblora"])
def test_resumed_run_of_any_method_equals_the_uninterrupted_one(base_folder: Path, tmp_path: Path, method: str) -> None:
    whole, cut, resumed = (make_siamese_with(base_folder, method, seed=seed) for seed in (1, 1, 99))
    train(whole, DATASET, SETTINGS, PAD, progress=False)
    stopped_after(3, cut, SETTINGS, tmp_path / "partial")
    train(resumed, DATASET, SETTINGS, PAD, tmp_path / "partial", resume=True, progress=False)
    expected, found = trained(whole), trained(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_trained_biases_are_the_adapter_streams_alone(qwen2_folder: Path) -> None:
    model = make_siamese_with(qwen2_folder, "lora_all_biases")
    before = {name: (base.clone(), tuned.detach().clone()) for name, (base, tuned) in pairs(model).items()}
    train(model, DATASET, SETTINGS, PAD, progress=False)
    assert before
    for name, (base, tuned) in pairs(model).items():
        assert torch.equal(base, before[name][0])
        assert not torch.equal(tuned, before[name][1]) or "k_proj" in name  # softmax does not see the keys' bias
    plain = load_base_model(str(qwen2_folder))
    with torch.no_grad():
        expected = plain.base_model(TEXT, use_cache=False).last_hidden_state
        assert torch.equal(model.stream_states(TEXT).base, expected)


def pairs(model: SiameseModel) -> dict[str, tuple[Tensor, torch.nn.Parameter]]:
    return backbone_biases(model.peft_model)


# AdaLoRA's ranks


def adalora(folder: Path, seed: int = 1) -> SiameseModel:
    base = load_base_model(str(folder))
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_dropout=0.3, target_modules="all-linear", total_step=1, task_type="CAUSAL_LM"
    )
    torch.manual_seed(seed)
    return SiameseModel(attach_adapter(base, config), make_gate("query_aware", 32, 3, 0.3)).eval()


RANKS = replace(SETTINGS, steps=10)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")  # PEFT's own loader
def test_adalora_takes_ranks_away_until_the_budget_is_met(base_folder: Path, tmp_path: Path) -> None:
    model = adalora(base_folder)
    train(model, DATASET, RANKS, PAD, progress=False)
    config: Any = model.peft_model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (10, 1, 2)
    assert sum(sum(kept) for kept in config.rank_pattern.values()) == 2 * 14
    with torch.no_grad():
        expected = model.stream_states(TEXT).adapter
    save_tiny_checkpoint(model, base_folder, tmp_path / "checkpoint")
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    torch.testing.assert_close(loaded.stream_states(TEXT).adapter, expected)
    alone = PeftModel.from_pretrained(load_base_model(str(base_folder)), str(tmp_path / "checkpoint" / "adapter"))
    states = alone(input_ids=TEXT, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, expected)
    ranks = [p.shape[0] for name, p in loaded.peft_model.named_parameters() if "lora_A" in name]
    assert sum(ranks) == 2 * 14
    assert len(set(ranks)) > 1


def test_adaloras_loss_has_the_orthogonality_of_its_vectors(base_folder: Path) -> None:
    model = make_siamese_with(base_folder, "adalora")
    found = RankAllocation(model.peft_model, 10).regularization()
    outputs: Any = model.peft_model(input_ids=TEXT, labels=TEXT)
    plain = model.causal_lm(input_ids=TEXT, labels=TEXT)
    torch.testing.assert_close(found, outputs.loss - plain.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4, 8, 9])
def test_resumed_adalora_run_equals_the_uninterrupted_one_exactly(
    base_folder: Path, tmp_path: Path, steps: int
) -> None:
    whole, cut, fresh_model = adalora(base_folder), adalora(base_folder), adalora(base_folder, seed=99)
    metrics = train(whole, DATASET, RANKS, PAD, progress=False)
    stopped_after(steps, cut, RANKS, tmp_path / "partial")
    resumed = train(fresh_model, DATASET, RANKS, PAD, tmp_path / "partial", resume=True, progress=False)
    assert resumed["final_loss"] == metrics["final_loss"]
    expected, found = trained(whole), trained(fresh_model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    configs: list[Any] = [model.peft_model.peft_config["default"] for model in (whole, fresh_model)]
    assert json.dumps(configs[0].rank_pattern) == json.dumps(configs[1].rank_pattern)


def test_run_too_short_for_adaloras_schedule_is_refused(base_folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"^steps is 1; that is too few for AdaLoRA"):
        train(adalora(base_folder), DATASET, replace(RANKS, steps=1), PAD, progress=False)
    train(adalora(base_folder), DATASET, replace(RANKS, steps=2), PAD, progress=False)


def test_adalora_without_a_rank_to_take_away_is_refused(base_folder: Path) -> None:
    model = adalora(base_folder)
    config: Any = model.peft_model.peft_config["default"]
    config.init_r = 2
    with pytest.raises(AdapterError, match="init_r is 2; it must be above target_r, 2"):
        train(model, DATASET, RANKS, PAD, progress=False)
