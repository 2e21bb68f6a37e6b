"""What layers read and what rounding costs: against gradients by other means, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from export.quantization.divergence import Reference
from export.quantization.layers import backbone_layers, head_layer, weight_of
from export.quantization.moments import collect, read_together
from export.quantization.weight_format import dequantize, round_to_nearest
from export.rounding import _judged
from export.self_text import own_texts
from imsm_core.backbone import apply_head, last_hidden_state, load_tokenizer
from imsm_core.siamese import SiameseModel
from tests.adapters import make_siamese_with
from tests.builders import make_siamese, randomize
from tests.zoo import make_zoo_base

TEXTS = [[0, 80, 104, 77, 35, 102], [0, 114, 67, 118]]


@contextmanager
def added(layer: nn.Module, change: Tensor) -> Iterator[None]:
    """Inside the block `change` is added to what the layer gives."""
    handle = layer.register_forward_hook(lambda _, args, output: output + change)
    try:
        yield
    finally:
        handle.remove()


def loss_of(model: SiameseModel, text: list[int], adapted: bool) -> Tensor:
    """The summed next-token cross-entropy of one stream, by its logits."""
    with nullcontext() if adapted else model.adapter_disabled():
        token_ids = torch.tensor([text])
        logits = apply_head(model.causal_lm, last_hidden_state(model.causal_lm, input_ids=token_ids))[0]
    return functional.cross_entropy(logits[:-1], token_ids[0, 1:], reduction="sum")


def expected_moments(model: SiameseModel, layer: nn.Module) -> tuple[Tensor, float]:
    """By the definition, with gradients of a number that is added to the layer's output."""
    error = torch.from_numpy(weight_of(layer))
    error = error - torch.from_numpy(dequantize(round_to_nearest(error.numpy(), 4, 32, True), error.shape[1]))
    inputs, cost, unit, tokens = torch.zeros(error.shape[1], error.shape[1]), 0.0, 0.0, 0
    for text in TEXTS:
        for adapted in (False, True):
            rows: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].detach()[0]))
            count = len(text) - 1 if error.shape[0] > 200 else len(text)  # the head has no prediction to make last
            change = torch.zeros(len(text), error.shape[0], requires_grad=True)
            with added(layer, change):
                (gradient,) = torch.autograd.grad(loss_of(model, text, adapted), change)
            handle.remove()
            x, g = rows[0][:count], gradient[:count]
            sizes = g.square().mean(1)
            unit = unit or float(sizes.mean())
            inputs += (x * (1 + sizes / unit)[:, None]).T @ x
            cost += 0.5 * float(((x @ error.T) * g).square().sum())
            tokens += len(text) - 1
    return inputs, cost / tokens


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_inputs_and_costs_are_those_of_both_streams(base_folder: Path, name: str) -> None:
    model = make_siamese(base_folder)
    layers = {**backbone_layers(model), "lm_head": head_layer(model)[1]}
    found = collect(model, {name: layers[name]}, TEXTS, 32)[name]
    inputs, cost = expected_moments(model, layers[name])
    assert found is not None
    np.testing.assert_allclose(found.inputs, inputs, rtol=1e-3, atol=1e-4 * float(inputs.abs().max()))
    assert found.cost == pytest.approx(cost, rel=1e-3)


def test_the_head_in_pieces_counts_once(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_siamese(base_folder)
    name, head = head_layer(model)
    whole = collect(model, {name: head}, TEXTS, 32)
    monkeypatch.setattr("imsm_core.head_loss.PIECE_BYTES", 4 * 259 * 2)  # two positions
    pieces = collect(model, {name: head}, TEXTS, 32)
    found, expected = pieces[name], whole[name]
    assert found is not None
    assert expected is not None
    assert found.cost == pytest.approx(expected.cost, rel=1e-4)


def state_of(model: SiameseModel) -> tuple[Any, ...]:
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [parameter.grad is None for parameter in model.parameters()]
    return hooks, flags, gradients, torch.is_grad_enabled(), [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(base_folder: Path, fails: bool) -> None:
    model = make_siamese(base_folder)
    before, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert any(before[1])  # the adapter is trained elsewhere
    with torch.no_grad(), pytest.raises(IndexError) if fails else nullcontext():
        collect(model, backbone_layers(model), [TEXTS[0], [5, 10**6] if fails else []], 32)
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_layers_that_are_unpriced_have_the_same_inputs(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    layers = {name: layer for name, layer in backbone_layers(model).items() if "layers.1.mlp" in name}
    priced, found = (collect(model, layers, TEXTS, 32, unpriced) for unpriced in ((), ["model.layers.1.mlp.up_proj"]))
    for name in layers:
        mine, other = found[name], priced[name]
        assert mine is not None
        assert other is not None
        np.testing.assert_array_equal(mine.inputs, other.inputs)
        assert other.cost
        assert mine.cost == (None if name.endswith("up_proj") else other.cost)


def test_layers_that_read_the_same_values_are_together(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    found = read_together(model, backbone_layers(model))
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert {found[f"{attention}.{name}_proj"] for name in "qkv"} == {f"{attention}.q_proj"}
    assert found[f"{mlp}.up_proj"] == found[f"{mlp}.gate_proj"] == f"{mlp}.gate_proj"
    assert found[f"{mlp}.down_proj"] == f"{mlp}.down_proj"


@pytest.mark.parametrize("trained", [False, True])
def test_looking_for_them_leaves_the_model_as_it_was(base_folder: Path, trained: bool) -> None:
    model = make_siamese_with(base_folder, "hra").requires_grad_(trained)
    before = state_of(model)
    layers = backbone_layers(model)
    assert read_together(model, layers).keys() == layers.keys()
    assert state_of(model) == before


def test_texts_of_a_token_and_of_none_predict_nothing(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    found = collect(model, backbone_layers(model), [[7], []], 32)
    assert set(found.values()) == {None}


def test_layers_that_an_adapter_does_not_run_count_for_the_base_stream(base_folder: Path) -> None:
    """HRA multiplies by a changed weight by itself."""
    model = make_siamese_with(base_folder, "hra")
    other = make_siamese_with(base_folder, "hra", seed=2)
    name = "model.layers.0.self_attn.q_proj"  # nothing that differs is before it
    moments = [collect(each, {name: backbone_layers(each)[name]}, TEXTS, 32)[name] for each in (model, other)]
    assert moments[0] is not None
    assert moments[1] is not None
    np.testing.assert_allclose(moments[0].inputs, moments[1].inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "adapter"), [("ctrl", "lora"), ("opt, projected embeddings", "lora"), ("llama", "prompt_tuning")]
)
def test_models_that_use_their_embeddings_in_other_ways(tmp_path: Path, kind: str, adapter: str) -> None:
    """Scaled in place, projected first, and beside virtual tokens."""
    model = make_siamese_with(make_zoo_base(tmp_path / "base", kind), adapter)
    found = collect(model, backbone_layers(model), TEXTS, 32)
    assert all(each is not None and each.cost for each in found.values())


def test_costs_predict_the_kl_of_a_trained_model_on_its_own_text(stories_folder: Path) -> None:
    model = make_siamese(stories_folder, "mean_logits", rank=2)
    randomize(model, seed=1, scale=0.0)
    tokenizer = load_tokenizer(str(stories_folder))
    texts = own_texts(model, tokenizer, ["Once"], 40, lambda line: None, rows=8)
    layers = {name: layer for name, layer in backbone_layers(model).items() if ".3." in name}
    reference = Reference(model, _judged(texts), base_only=True)
    ratios = []
    for name, moments in collect(model, layers, texts, 32).items():
        assert moments is not None
        assert moments.cost is not None
        rounded = round_to_nearest(weight_of(layers[name]), 4, 32, True)
        ratios.append(moments.cost / reference.divergence({name: rounded}, round_activations=False).base)
    assert 0.5 < np.median(ratios) < 2
    assert min(ratios) > 0.25
    assert max(ratios) < 4
