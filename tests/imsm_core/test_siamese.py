"""The siamese model against plain transformers and PEFT models: the method's invariants, by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from imsm_core.adapters.attach import adapted_layers, attach_adapter
from imsm_core.backbone import load_base_model
from imsm_core.errors import AdapterError
from imsm_core.gates import GATES, make_gate
from imsm_core.siamese import SiameseModel, masked_mean
from tests.builders import make_siamese, randomize

# Rows of 9, 6 and 4 tokens, of which 5, 4 and 1 are the prompt; 2 pads.
TOKENS = torch.tensor(
    [[0, 70, 80, 90, 100, 110, 120, 130, 140], [0, 71, 81, 91, 101, 111, 2, 2, 2], [0, 72, 82, 92, 2, 2, 2, 2, 2]]
)
LENGTHS, PROMPTS = (9, 6, 4), (5, 4, 1)
ATTENTION = torch.tensor([[1] * n + [0] * (9 - n) for n in LENGTHS])
QUERY = torch.tensor([[1] * n + [0] * (9 - n) for n in PROMPTS])
ROWS, POSITIONS = torch.nonzero(ATTENTION, as_tuple=True)
FOLDERS = ("base_folder", "qwen2_folder", "gpt2_folder")
ADAPTER_ON_SOME = {"base_folder": ["q_proj", "v_proj"], "qwen2_folder": ["up_proj"], "gpt2_folder": ["c_attn"]}
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@torch.no_grad()
def fused(model: SiameseModel, memory_bias: float = 0.0) -> Tensor:
    """Logits (M, vocab) at every token of the batch."""
    states = model.stream_states(TOKENS, ATTENTION)
    return model.fused_logits(states, QUERY, ROWS, POSITIONS, memory_bias)[0]


@torch.no_grad()
def plain(model: nn.Module) -> Tensor:
    """The same from a plain causal LM, each row alone and without padding."""
    rows = [model(input_ids=row[None, :length]).logits[0] for row, length in zip(TOKENS, LENGTHS, strict=True)]
    return torch.cat(rows)


def merged(folder: Path, **options: object) -> PreTrainedModel:
    """The base model with the same random adapter merged into its weights by PEFT."""
    model: PreTrainedModel = make_siamese(folder, **options).peft_model.merge_and_unload()  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("kind", ["query_aware", "token", "mean_logits"])
def test_gate_forced_to_one_is_the_plain_base_model(folder: Path, kind: str) -> None:
    assert_close(fused(make_siamese(folder, kind), 1e4), plain(load_base_model(str(folder))), **CLOSE)


@pytest.mark.parametrize("kind", ["query_aware", "token", "mean_logits"])
def test_gate_forced_to_zero_is_the_model_with_the_adapter_merged(folder: Path, kind: str) -> None:
    adapted = plain(merged(folder))
    assert (adapted - plain(load_base_model(str(folder)))).abs().mean() > 0.1  # the adapter does something
    assert_close(fused(make_siamese(folder, kind), -1e4), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_gate_forced_to_zero_is_the_merged_model_for_an_adapter_on_some_layers(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder, modules = request.getfixturevalue(name), ADAPTER_ON_SOME[name]
    siamese = make_siamese(folder, target_modules=modules)
    assert {layer.name.rsplit(".", 1)[-1] for layer in adapted_layers(siamese.peft_model)} == set(modules)
    assert_close(fused(siamese, -1e4), plain(merged(folder, target_modules=modules)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["query_aware", "token"])
def test_gate_up_of_zero_is_the_mean_of_both_streams_logits(folder: Path, kind: str) -> None:
    model = make_siamese(folder, kind)
    nn.init.zeros_(model.gate.get_parameter("gate_up.weight"))
    mean = (plain(load_base_model(str(folder))) + plain(merged(folder))) / 2
    assert_close(fused(model), mean, atol=1e-4, rtol=1e-4)


def test_mean_logits_is_the_mean_of_both_streams_logits(folder: Path) -> None:
    mean = (plain(load_base_model(str(folder))) + plain(merged(folder))) / 2
    assert_close(fused(make_siamese(folder, "mean_logits")), mean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in GATES if kind != "query_mixed"])
def test_fresh_lora_gives_the_base_model_under_any_gate(folder: Path, kind: str) -> None:
    model = make_siamese(folder, kind)
    for name, parameter in model.trainable_parameters().items():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    assert_close(fused(model, 0.3), plain(load_base_model(str(folder))), **CLOSE)


@pytest.mark.parametrize("kind", GATES)
def test_fused_logits_are_the_equations_over_two_plain_models(base_folder: Path, kind: str) -> None:
    """Both memories from two separate transformers models, the query's mean by hand, and the gate's formula."""
    model = make_siamese(base_folder, kind)
    base, adapted = load_base_model(str(base_folder)), merged(base_folder)
    expected = []
    with torch.no_grad():
        for row, length, prompt in zip(TOKENS, LENGTHS, PROMPTS, strict=True):
            states = [
                m(input_ids=row[None, :length], output_hidden_states=True).hidden_states[-1][0] for m in (base, adapted)
            ]
            queries = [state[:prompt].sum(0) / prompt for state in states]
            for h_base, h_adapter in zip(*states, strict=True):
                expected.append(base.lm_head(by_hand(model.gate, h_base, h_adapter, *queries)))
    assert_close(fused(model), torch.stack(expected), atol=1e-4, rtol=1e-4)


def by_hand(gate: nn.Module, h_base: Tensor, h_adapter: Tensor, q_base: Tensor, q_adapter: Tensor) -> Tensor:
    if gate.kind == "mean_logits":
        return (h_base + h_adapter) / 2
    if gate.kind == "query_mixed":
        h_base, h_adapter = (h_base + q_base) / 2, (h_adapter + q_adapter) / 2
    z = (q_base, h_base, h_adapter, q_adapter) if gate.kind == "query_aware" else (h_base, h_adapter)
    g = torch.sigmoid(gate.get_parameter("gate_up.weight") @ (gate.get_parameter("gate_down.weight") @ torch.cat(z)))
    h = g * h_base + (1 - g) * h_adapter
    return (h_base + h) / 2 if gate.kind == "residual" else h


@pytest.mark.parametrize("kind", GATES)
def test_row_of_a_padded_batch_is_the_same_row_alone(base_folder: Path, kind: str) -> None:
    model = make_siamese(base_folder, kind)
    together = fused(model)
    with torch.no_grad():
        for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
            mask = torch.tensor([[1] * prompt + [0] * (length - prompt)])
            alone, _ = model.fused_logits(
                model.stream_states(TOKENS[row : row + 1, :length]),
                mask,
                torch.zeros(length, dtype=torch.int64),
                torch.arange(length),
            )
            assert_close(together[row == ROWS], alone, **CLOSE)


def test_query_is_the_prompts_mean_and_later_tokens_do_not_enter_it(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    states = model.stream_states(TOKENS[:1])
    row, position = torch.tensor([0]), torch.tensor([6])
    whole_text = torch.ones_like(TOKENS[:1])
    with torch.no_grad():
        by_prompt = model.fused_logits(states, QUERY[:1], row, position)[1].gate
        by_text = model.fused_logits(states, whole_text, row, position)[1].gate
    assert (by_prompt - by_text).abs().max() > 1e-3


def test_masked_mean_counts_only_what_the_mask_holds() -> None:
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], [[5.0, 6.0], [7.0, 7.0], [7.0, 7.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(masked_mean(states, mask), torch.tensor([[2.0, 3.0], [5.0, 6.0]]))
    assert masked_mean(states.bfloat16(), mask).dtype == torch.float32


def test_one_backbone_in_memory_serves_both_streams(folder: Path) -> None:
    base_count = sum(parameter.numel() for parameter in load_base_model(str(folder)).parameters())
    model = make_siamese(folder)
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
    assert sum(storages.values()) == base_count + sum(p.numel() for p in model.trainable_parameters().values())
    assert all(layer.frozen.weight is layer.tuner.weight for layer in adapted_layers(model.peft_model))


def test_gradient_reaches_adapter_and_gate_and_never_the_backbone_or_the_base_stream(folder: Path) -> None:
    model = make_siamese(folder).train()
    states = model.stream_states(TOKENS, ATTENTION)
    assert not states.base.requires_grad
    assert states.adapter.requires_grad
    logits, _ = model.fused_logits(states, QUERY, ROWS, POSITIONS)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.startswith("gate."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name


def test_trainable_parameters_are_the_adapters_and_the_gates(base_folder: Path) -> None:
    names = set(make_siamese(base_folder, target_modules=["q_proj"]).trainable_parameters())
    assert {name for name in names if name.startswith("gate.")} == {"gate.gate_down.weight", "gate.gate_up.weight"}
    assert len(names) == 2 + 2 * 2  # A and B of two layers
    assert all("lora_" in name for name in names if not name.startswith("gate."))


def test_adapter_stays_frozen_through_a_forward_pass_once_it_is_frozen(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    model.requires_grad_(False)
    states = model.stream_states(TOKENS, ATTENTION)
    assert not states.adapter.requires_grad
    assert model.trainable_parameters() == {}


def test_adapter_stays_on_after_the_base_stream_failed(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    before = model.stream_states(TOKENS[:1]).adapter
    with pytest.raises(IndexError):
        model.stream_states(torch.tensor([[10**6]]))
    after = model.stream_states(TOKENS[:1])
    assert torch.equal(after.adapter, before)
    assert set(model.trainable_parameters()) == {
        n for n, _ in model.named_parameters() if "lora_" in n or n[:5] == "gate."
    }


def test_only_adapter_and_gate_drop_out_in_training_mode(gpt2_folder: Path) -> None:
    """GPT-2's own config has dropout of 0.1 in four places: none of them may run."""
    model = make_siamese(gpt2_folder, dropout=0.5).train()
    assert model.causal_lm.config.resid_pdrop > 0
    dropping = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.training}
    assert dropping
    assert all("lora_dropout" in name or name == "gate.dropout" for name in dropping)
    first, second = model.stream_states(TOKENS[:1]), model.stream_states(TOKENS[:1])
    assert torch.equal(first.base, second.base)
    assert not torch.allclose(first.adapter, second.adapter)
    with torch.no_grad():
        base = load_base_model(str(gpt2_folder)).base_model(TOKENS[:1]).last_hidden_state
    assert_close(first.base, base, **CLOSE)
    model.eval()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.stream_states(TOKENS[:1]).adapter, model.stream_states(TOKENS[:1]).adapter)


def test_streams_stay_apart_when_they_are_run_again(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    first = model.stream_states(TOKENS[:1])
    randomize(model, seed=77)
    second = model.stream_states(TOKENS[:1])
    assert torch.equal(first.base, second.base)
    assert (first.adapter - second.adapter).abs().mean() > 0.05


def test_invariants_hold_on_a_real_model(stories_folder: Path) -> None:
    tokens = torch.tensor([[1, 403, 407, 261, 378, 300, 298, 293]])
    model = make_siamese(stories_folder, rank=8, gate_rank=8, seed=5)
    randomize(model, seed=5, scale=0.1)
    rows, positions = torch.zeros(8, dtype=torch.int64), torch.arange(8)
    query = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        states = model.stream_states(tokens)
        as_base = model.fused_logits(states, query, rows, positions, 1e4)[0]
        as_adapter = model.fused_logits(states, query, rows, positions, -1e4)[0]
        between = model.fused_logits(states, query, rows, positions)[0]
        assert_close(as_base, load_base_model(str(stories_folder))(tokens).logits[0], **CLOSE)
        assert_close(as_adapter, model.peft_model.merge_and_unload()(tokens).logits[0], atol=1e-4, rtol=1e-4)
    assert (between - as_base).abs().mean() > 0.01
    assert (between - as_adapter).abs().mean() > 0.01


@pytest.mark.parametrize("training", [True, False])
def test_forward_check_leaves_the_model_as_it_was(folder: Path, training: bool) -> None:
    model = make_siamese(folder).train(training)
    modes = [module.training for module in model.modules()]
    model.check_forward()
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapter_for_fewer_layers_than_the_model_has_does_not_run(base_folder: Path) -> None:
    base = load_base_model(str(base_folder))
    config = PrefixTuningConfig(num_virtual_tokens=3, num_layers=1, task_type="CAUSAL_LM")
    model = SiameseModel(attach_adapter(base, config), make_gate("mean_logits", base.config.hidden_size))
    with pytest.raises(AdapterError, match="the adapter does not run on this model: ") as caught:
        model.check_forward()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stream", ["base", "adapter"])
def test_stream_whose_states_are_not_finite_is_named(base_folder: Path, stream: str) -> None:
    model = make_siamese(base_folder)
    layer = adapted_layers(model.peft_model)[-1]
    module = layer.frozen if stream == "base" else layer.tuner.get_submodule("lora_B")
    with torch.no_grad():
        next(module.parameters()).fill_(torch.inf)
    with pytest.raises(AdapterError, match=f"the {stream} stream gives values that are not finite"):
        model.check_forward()
