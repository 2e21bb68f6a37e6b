"""The configs of the PEFT methods that `peft` offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config

from imsm_core.adapters.attach import attach_adapter
from imsm_core.adapters.methods import peft_config
from imsm_core.adapters.options import PEFT_METHODS, default_learning_rate
from imsm_core.backbone import hidden_size, load_base_model
from imsm_core.errors import AdapterError, IMSMError
from imsm_core.gates import make_gate
from imsm_core.siamese import SiameseModel
from imsm_core.training.loop import answer_loss
from tests.builders import PAD
from tests.imsm_core.training.runs import EXAMPLES, trained

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


@pytest.mark.parametrize("method", [name for name in PEFT_METHODS if name not in RANDOM_START])
def test_methods_that_change_layers_start_at_the_base_model(base_folder: Path, method: str) -> None:
    states = fresh(base_folder, method).stream_states(TEXT)
    assert torch.allclose(states.base, states.adapter, atol=1e-4)
