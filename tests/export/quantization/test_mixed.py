"""Every weight in every width, whatever memory there is, and by the names that the graph asks for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.errors import ExportError
from export.quantization.layers import (
    backbone_layers,
    check_finite,
    embedding_layer,
    head_layer,
    layer_name,
    weight_of,
)
from export.quantization.mixed import Candidates, Form, nearest_backbone, round_backbone
from export.quantization.moments import collect
from export.quantization.weight_format import dequantize, round_to_nearest
from imsm_core.siamese import SiameseModel
from tests.adapters import make_siamese_with
from tests.builders import make_siamese
from tests.export.quantization.set_weight import set_weight

WIDTHS = (4, 5, 6, 8)
TEXTS = [list(range(3, 40)), [0, 90, 80, 70, 60]]


def silent(line: str) -> None:
    pass


def found_of(model: SiameseModel, mean: float | None = None, texts: Any = TEXTS, symmetric: bool = True) -> Candidates:
    return round_backbone(model, texts, Form(WIDTHS, 32, symmetric), mean, silent)


@pytest.mark.parametrize("folder", ["base_folder", "qwen2_folder", "gpt2_folder"])
def test_every_layer_and_both_ends_are_there_and_the_model_stays(folder: str, request: pytest.FixtureRequest) -> None:
    model = make_siamese(request.getfixturevalue(folder), target_modules=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines: list[str] = []
    found = round_backbone(model, TEXTS, Form(WIDTHS, 32, True), 4.75, lines.append)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layers, (head, _), (embeddings, _) = backbone_layers(model), head_layer(model), embedding_layer(model)
    assert found.layers.keys() == layers.keys()
    assert found.ends.keys() == {head, embeddings}
    assert found.choose(4.75).keys() == {*layers, head, embeddings}
    for name, layer in layers.items():
        candidate = found.layers[name]
        assert set(candidate.forms) == {4, 5}  # what a mean of 4.75 is made of
        assert candidate.size == weight_of(layer).size
        assert candidate.cost > 0
    tied = folder != "base_folder"
    assert all(set(forms) == {6} for forms in found.ends.values())
    assert (found.ends[head][6] is found.ends[embeddings][6]) == tied
    assert lines == [f"round     {count} of {len(layers)} layers" for count in (*range(8, len(layers), 8), len(layers))]


def test_values_are_near_and_nearer_with_more_bits(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    found = found_of(model)
    every = {name: candidate.forms for name, candidate in found.layers.items()} | found.ends
    for name, layer in [*backbone_layers(model).items(), head_layer(model), embedding_layer(model)]:
        weight, forms = weight_of(layer), every[name]
        errors = [float(np.square(dequantize(forms[bits], weight.shape[1]) - weight).mean()) for bits in WIDTHS]
        assert all(more > fewer for more, fewer in itertools.pairwise(errors))
        assert errors[0] < 0.05 * float(np.square(weight).mean())


@pytest.mark.parametrize("symmetric", [True, False])
def test_little_memory_takes_more_passes_and_gives_the_same(
    base_folder: Path, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_siamese(base_folder, target_modules=None)
    whole = found_of(model, symmetric=symmetric)
    passes: list[int] = []

    def counted(*args: Any) -> Any:
        passes.append(len(args[1]))
        return collect(*args)

    monkeypatch.setattr("export.quantization.mixed.collect", counted)
    monkeypatch.setattr("export.quantization.mixed.MOMENT_BYTES", 40_000)
    parts = found_of(model, symmetric=symmetric)
    assert len(passes) > 3
    assert sum(passes) == len(backbone_layers(model)) + 1
    for name, expected in whole.layers.items():
        candidate = parts.layers[name]
        assert (candidate.size, candidate.group) == (expected.size, expected.group)
        assert candidate.cost == pytest.approx(expected.cost, rel=1e-3)
        for bits in WIDTHS:
            np.testing.assert_array_equal(candidate.forms[bits].packed, expected.forms[bits].packed)
    assert parts.choose(5.5).keys() == whole.choose(5.5).keys()
    for name, weight in parts.choose(5.5).items():
        assert weight.bits == whole.choose(5.5)[name].bits


def test_layers_of_one_group_get_one_width(base_folder: Path) -> None:
    chosen = found_of(make_siamese(base_folder)).choose(4.6)
    for layer in (0, 1):
        attention = {chosen[f"model.layers.{layer}.self_attn.{name}_proj"].bits for name in "qkv"}
        assert len(attention) == 1
    assert {weight.bits for weight in chosen.values()} > {4}


def test_layers_that_no_text_reaches_are_rounded_by_their_own_values(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    found = found_of(model, texts=[[5]])
    for name, layer in backbone_layers(model).items():
        weight = weight_of(layer)
        assert found.layers[name].cost == 0
        nearest = dequantize(round_to_nearest(weight, 4, 32, True), weight.shape[1])
        searched = dequantize(found.layers[name].forms[4], weight.shape[1])
        assert np.square(searched - weight).sum() < np.square(nearest - weight).sum()
    assert {weight.bits for weight in found.choose(5.0).values()} >= {5}


@pytest.mark.parametrize("folder", ["base_folder", "qwen2_folder", "gpt2_folder"])
@pytest.mark.parametrize(("mean", "widths", "of_ends"), [(4.6, {4, 5}, 6), (5.5, {5, 6}, 6), (7.0, {6, 8}, 8)])
def test_weights_rounded_to_nearest_keep_the_mean(
    folder: str, mean: float, widths: set[int], of_ends: int, request: pytest.FixtureRequest
) -> None:
    model = make_siamese(request.getfixturevalue(folder), target_modules=None)
    chosen = nearest_backbone(model, Form(WIDTHS, 32, True), mean).choose(mean)
    layers, ends = backbone_layers(model), dict([head_layer(model), embedding_layer(model)])
    assert chosen.keys() == {*layers, *ends}
    assert {chosen[name].bits for name in layers} == widths
    assert {chosen[name].bits for name in ends} == {of_ends}
    sizes = {name: weight_of(layer).size for name, layer in layers.items()}
    spent = sum(chosen[name].bits * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean - 0.5 < spent <= mean
    for name, layer in (layers | ends).items():
        expected = round_to_nearest(weight_of(layer), chosen[name].bits, 32, True)
        np.testing.assert_array_equal(chosen[name].packed, expected.packed)
        np.testing.assert_array_equal(chosen[name].scales, expected.scales)
    for name in layers:
        if name.endswith(("k_proj", "v_proj")):
            assert chosen[name].bits == chosen[f"{name[:-6]}q_proj"].bits
        if name.endswith("up_proj"):
            assert chosen[name].bits == chosen[name.replace("up_proj", "gate_proj")].bits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens"])
def test_weights_that_are_not_finite_are_named(base_folder: Path, where: str, bad: float) -> None:
    model = make_siamese(base_folder)
    check_finite(model)
    layer = dict([*backbone_layers(model).items(), head_layer(model), embedding_layer(model)])[where]
    weight = weight_of(layer).copy()
    weight[0, 3] = bad
    set_weight(layer, weight)
    with pytest.raises(ExportError, match=f"the weight of {where} has values that are not finite"):
        check_finite(model)


def test_values_that_overflow_are_as_if_no_text_had_reached_the_layer(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    layer = backbone_layers(model)["model.layers.0.mlp.up_proj"]
    set_weight(layer, weight_of(layer) * np.float32(3e37))
    found = found_of(model)
    assert found.layers["model.layers.1.mlp.up_proj"].cost == 0
    assert {weight.bits for weight in found.choose(4.5).values()} <= set(WIDTHS)


@pytest.mark.parametrize("adapter", ["lora_embeddings", "lora_saved_embeddings", "trainable_tokens", "boft", "lora"])
@pytest.mark.parametrize("tied", ["qwen2_folder", "base_folder"])
def test_names_are_those_of_the_frozen_weights(adapter: str, tied: str, request: pytest.FixtureRequest) -> None:
    """As `layer_name` makes them of what stands in a two-stream module."""
    model = make_siamese_with(request.getfixturevalue(tied), adapter)
    found = round_backbone(model, [[3, 4, 5]], Form((4,), 32, True), 4.0, silent)
    expected = {"model.embed_tokens", "lm_head", *(f"model.layers.{n}.mlp.up_proj" for n in (0, 1))}
    names = {*found.layers, *found.ends}
    assert expected <= names
    assert layer_name("model.model.layers.0.mlp.up_proj.base_layer.weight") in names
    assert not any("base_layer" in name or "original_module" in name for name in names)
