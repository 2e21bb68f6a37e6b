"""The KL of rounded weights without a graph: against the logits of a model that has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.quantization.divergence import Reference, rounded_activations
from export.quantization.layers import backbone_layers, embedding_layer, head_layer, weight_of
from export.quantization.weight_format import QuantizedWeight, dequantize, round_to_nearest
from imsm_core.backbone import apply_head
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream, answer_states
from imsm_core.siamese import SiameseModel
from tests.builders import make_siamese
from tests.export.quantization.set_weight import set_weight

TEXTS = [Example([0, 80, 104], [77, 35, 102, 9]), Example([0, 114], [67])]


def rounded_weights_of(model: SiameseModel) -> dict[str, QuantizedWeight]:
    """Every layer, the head and the embeddings, in 4 bits."""
    layers = {**backbone_layers(model), **dict([head_layer(model)]), **dict([embedding_layer(model)])}
    return {name: round_to_nearest(weight_of(layer), 4, 32, True) for name, layer in layers.items()}


@torch.no_grad()
def logits_of(model: SiameseModel, stream: Stream) -> Tensor:
    states = torch.cat([answer_states(model, [text], stream, 0)[0] for text in TEXTS])
    return apply_head(model.causal_lm, states[None])[0].double().log_softmax(-1)


@pytest.mark.parametrize("folder", ["base_folder", "qwen2_folder", "gpt2_folder"])
def test_the_divergence_is_that_of_a_model_with_these_weights(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    model, other = make_siamese(path, target_modules=None), make_siamese(path, target_modules=None)
    weights = rounded_weights_of(model)
    for name, layer in {**backbone_layers(other), **dict([head_layer(other)])}.items():
        set_weight(layer, dequantize(weights[name], weight_of(layer).shape[1]))
    if folder == "base_folder":  # the others' are tied
        name, embeddings = embedding_layer(other)
        set_weight(embeddings, dequantize(weights[name], 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = Reference(model, TEXTS, base_only=False).divergence(weights, round_activations=False)
    streams: tuple[Stream, ...] = ("base", "fused")
    for stream, value in zip(streams, (found.base, found.blend), strict=True):
        expected, actual = logits_of(model, stream), logits_of(other, stream)
        assert value == pytest.approx(float((expected.exp() * (expected - actual)).sum(-1).mean()), rel=1e-3)
    assert found.worst == max(found.base, found.blend)
    assert found.base != found.blend
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_is_not_far_from_itself_and_rounded_activations_are(base_folder: Path) -> None:
    model = make_siamese(base_folder)
    reference = Reference(model, TEXTS, base_only=True)
    same = reference.divergence({}, round_activations=False)
    assert abs(same.worst) < 1e-6
    assert same.base == same.blend
    assert 1e-6 < reference.divergence({}, round_activations=True).base < 0.05


def test_the_head_in_pieces_is_the_head(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_siamese(base_folder)
    weights = rounded_weights_of(model)
    whole = Reference(model, TEXTS, False).divergence(weights, False)
    monkeypatch.setattr("imsm_core.head_loss.PIECE_BYTES", 1)
    pieces = Reference(model, TEXTS, False).divergence(weights, False)
    assert pieces.base == pytest.approx(whole.base, rel=1e-4)
    assert pieces.blend == pytest.approx(whole.blend, rel=1e-4)


@pytest.mark.parametrize("width", [32, 50, 96])
def test_activations_are_rounded_in_blocks_of_32(width: int) -> None:
    values = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    values[0, 0, :32] = 0
    found = rounded_activations(values)
    assert found.shape == values.shape
    for start in range(0, width, 32):
        block, rounded = values[..., start : start + 32], found[..., start : start + 32]
        step = block.abs().amax(-1, keepdim=True) / 127
        assert ((block - rounded).abs() <= step * 0.501).all()
        codes = rounded / step.clamp(min=1e-9)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
