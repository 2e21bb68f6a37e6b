"""GPTQ: the error of a layer's output on held-out inputs falls, on one weight, on a model, and on the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.adapters import replaced_layers, two_stream_layers
from export.errors import ExportError
from export.quantization.gptq import backbone_layers, calibrated_weights, gptq, layer_name, output_error
from export.quantization.precision import rounded_weights
from export.quantization.weight_format import QuantizedWeight, dequantize, round_to_nearest
from export.texts import TextReader
from export.verification.quality import measure_quality
from imsm_core.backbone import apply_head, load_tokenizer
from imsm_core.data.dataset import Example
from imsm_core.data.encoding import Encoder
from imsm_core.data.forms import Fields
from imsm_core.errors import SettingsError
from imsm_core.siamese import SiameseModel
from tests.builders import make_siamese, randomize
from tests.export.quantization.test_weight_format import matmul_nbits

Array = NDArray[Any]


def correlated_inputs(rows: int, width: int, seed: int) -> Array:
    """(rows, width) float32, as activations are: of a few directions and some noise; the seed changes the rows."""
    directions = np.random.default_rng(100).normal(size=(width // 4, width))
    generator = np.random.default_rng(seed)
    inputs: Array = generator.normal(size=(rows, width // 4)) @ directions + 0.3 * generator.normal(size=(rows, width))
    return inputs.astype(np.float32)


def error(weight: Array, found: QuantizedWeight, inputs: Array) -> float:
    return float(np.square(inputs @ (weight - dequantize(found, weight.shape[1])).T).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block_size"), [(96, 32), (172, 64), (300, 128)])
def test_the_error_on_unseen_inputs_is_below_that_of_rounding_to_nearest(
    width: int, block_size: int, bits: int, symmetric: bool
) -> None:
    weight = np.random.default_rng(0).normal(size=(24, width)).astype(np.float32)
    inputs, unseen = correlated_inputs(800, width, 1), correlated_inputs(200, width, 2)
    found = gptq(weight, inputs.T @ inputs, bits, block_size, symmetric)
    nearest = round_to_nearest(weight, bits, block_size, symmetric)
    assert error(weight, found, unseen) < 0.8 * error(weight, nearest, unseen)
    np.testing.assert_allclose(matmul_nbits(unseen, found), unseen @ dequantize(found, width).T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_uncorrelated_inputs_are_rounded_to_nearest(symmetric: bool) -> None:
    weight = np.random.default_rng(0).normal(size=(24, 100)).astype(np.float32)
    weight[3, :32] = 0  # a block without a scale
    found = gptq(weight, np.eye(100, dtype=np.float32), 4, 32, symmetric)
    nearest = round_to_nearest(weight, 4, 32, symmetric)
    np.testing.assert_allclose(dequantize(found, 100), dequantize(nearest, 100), atol=1e-6)


def test_an_input_that_calibration_never_sees_keeps_its_weight() -> None:
    weight = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    inputs = correlated_inputs(400, 64, 1)
    inputs[:, 5] = 0
    found = dequantize(gptq(weight, inputs.T @ inputs, 8, 32, True), 64)
    np.testing.assert_allclose(found[:, 5], weight[:, 5], atol=0.05)


def test_output_error_is_the_sum_over_the_inputs() -> None:
    difference, inputs = np.random.default_rng(0).normal(size=(5, 16)), correlated_inputs(30, 16, 1).astype(np.float64)
    expected = np.square(inputs @ difference.T).sum()
    assert output_error(difference, inputs.T @ inputs) == pytest.approx(expected)


@pytest.mark.parametrize("folder", ["base_folder", "gpt2_folder"])
def test_every_linear_layer_is_calibrated_by_the_name_that_the_graph_knows(
    folder: str, request: pytest.FixtureRequest
) -> None:
    model = make_siamese(request.getfixturevalue(folder), target_modules=None)
    causal_lm = model.causal_lm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = calibrated_weights(model, [list(range(20)), [7] * 5], 4, 32, True, lambda line: None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layers = backbone_layers(model)
    assert list(found) == list(layers)
    with replaced_layers(causal_lm, two_stream_layers(model.peft_model)):
        traced = {f"model.{name}" for name, _ in causal_lm.named_parameters()}
    head = causal_lm.get_output_embeddings()
    matrices = {name for name in traced if name.endswith("base_layer.weight")}
    assert {layer_name(name) for name in matrices} == set(found)
    assert all(layer is not head for layer in layers.values())


def test_layers_without_an_adapter_are_calibrated_too(base_folder: Path) -> None:
    some, every = (make_siamese(base_folder, target_modules=names) for names in (["q_proj"], None))
    assert backbone_layers(some).keys() == backbone_layers(every).keys()
    assert layer_name("model.model.layers.0.mlp.up_proj.weight") in backbone_layers(some)


def test_both_streams_inputs_count(base_folder: Path) -> None:
    text = [list(range(60))]
    model, other = make_siamese(base_folder, seed=1), make_siamese(base_folder, seed=2)
    found, changed = (calibrated_weights(each, text, 4, 32, True, lambda line: None) for each in (model, other))
    last = "model.layers.1.mlp.down_proj"
    assert (found[last].packed != changed[last].packed).any()


def test_calibration_without_a_text_is_refused(base_folder: Path) -> None:
    with pytest.raises(ExportError, match="at least one text"):
        calibrated_weights(make_siamese(base_folder), [[]], 4, 32, True)
    with pytest.raises(SettingsError, match="block_size is 31"):
        calibrated_weights(make_siamese(base_folder), [[1, 2]], 4, 31, True)


@torch.no_grad()
def base_logits(model: SiameseModel, text: Example) -> Array:
    logits: Array = apply_head(model.causal_lm, model.stream_states(torch.tensor([text.token_ids])).base)[0].numpy()
    return logits[len(text.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_real_models_perplexity_rises_less_than_by_rounding_to_nearest(
    symmetric: bool, stories_folder: Path, shared_data: Path
) -> None:
    model = make_siamese(stories_folder, "mean_logits", rank=2)
    randomize(model, seed=1, scale=0.03)  # an adapter stream that is still a language model
    tokenizer = load_tokenizer(str(stories_folder))
    reader = TextReader(Encoder(tokenizer), Fields(), 256, len(tokenizer), False, lambda line: None)
    held_out = reader.judged(shared_data / "tinystories" / "heldout.jsonl", 10)
    texts = reader.whole(shared_data / "tinystories" / "train.jsonl", 12)
    expected = {tuple(text.token_ids): base_logits(model, text) for text in held_out}
    calibrated = calibrated_weights(model, texts, 4, 32, symmetric, lambda line: None)
    nearest = {
        name: round_to_nearest(layer.get_parameter("weight").detach().numpy(), 4, 32, symmetric)
        for name, layer in backbone_layers(model).items()
    }
    changes = []
    for rounded in (calibrated, nearest):
        weights = {f"model.{name}.base_layer.weight": weight for name, weight in rounded.items()}
        with rounded_weights(model.causal_lm, weights):
            report = measure_quality(
                lambda text: {"base": expected[tuple(text.token_ids)].__getitem__},
                lambda text: {"base": base_logits(model, text).__getitem__},
                held_out,
            )
        assert report.base is not None
        changes.append(report.base.perplexity_change)
    assert 0 < changes[0] < 0.95 * changes[1]  # 0.6 of it with five times the texts
