"""Scales of int8 caches, by value against the keys and values of plain transformers models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from export.adapters import base_layers, replaced_layers
from export.attention.kv_scales import HEADROOM, LARGEST_INT8, SMALLEST, KVScales, find_scales
from export.attention.plan import AttentionPlan, plan_attention
from export.errors import UnsupportedError
from imsm_core.backbone import load_base_model
from imsm_core.siamese import SiameseModel
from tests.adapters import make_siamese_with
from tests.builders import CONTEXT, LAYERS, make_base_folder, make_siamese, save_tiny_checkpoint
from tests.exported import PROMPT
from tests.zoo import make_zoo_base

TEXTS = [PROMPT, [9, 200, 31]]


def plan_of(model: SiameseModel, layers: int = LAYERS) -> AttentionPlan:
    with replaced_layers(model.causal_lm, base_layers(model.peft_model)):
        return plan_attention(model.causal_lm, layers, CONTEXT)


@torch.no_grad()
def largest_of(models: Sequence[torch.nn.Module], texts: Sequence[Sequence[int]], layer: int, part: str) -> Tensor:
    """Largest absolute value of every channel, (kv_heads, head_size), over models and texts."""
    found = []
    for model in models:
        for text in texts:
            cache = model(input_ids=torch.tensor([list(text)]), use_cache=True).past_key_values
            found.append(getattr(cache.layers[layer], part)[0].abs().amax(1))
    return torch.stack(found).amax(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with heads of 12, which the cache pads to 16, and a checkpoint with a LoRA."""
    folder = tmp_path_factory.mktemp("scales")
    make_base_folder(folder / "base", "llama", head_dim=12)
    save_tiny_checkpoint(make_siamese(folder / "base"), folder / "base", folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SiameseModel:
    return make_siamese(folder / "base")


@pytest.fixture(scope="module")
def scales(model: SiameseModel) -> KVScales:
    return find_scales(model, plan_of(model), TEXTS)


@pytest.fixture(scope="module")
def streams(folder: Path) -> list[torch.nn.Module]:
    """The base model, and the base model with the adapter merged: what the streams are without this project."""
    base = load_base_model(str(folder / "base"))
    tuned = PeftModel.from_pretrained(load_base_model(str(folder / "base")), str(folder / "checkpoint" / "adapter"))
    return [base, tuned.merge_and_unload().eval()]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("part", ["keys", "values"])
def test_scales_are_the_largest_values_of_both_streams_and_all_texts(
    scales: KVScales, streams: list[torch.nn.Module], layer: int, part: str
) -> None:
    found = getattr(scales, part)[layer]
    assert (found.shape, found.dtype) == ((1, 2, 1, 16), torch.float32)
    expected = largest_of(streams, TEXTS, layer, part) * HEADROOM / LARGEST_INT8
    torch.testing.assert_close(found[0, :, 0, :12], expected, atol=1e-6, rtol=1e-4)
    assert (found[0, :, 0, 12:] == SMALLEST).all()  # padding


def test_neither_stream_nor_text_alone_gives_them(scales: KVScales, streams: list[torch.nn.Module]) -> None:
    limit = scales.keys[1][0, :, 0, :12] * LARGEST_INT8 / HEADROOM * 0.999
    for models, texts in ((streams[:1], TEXTS), (streams[1:], TEXTS), (streams, TEXTS[:1]), (streams, TEXTS[1:])):
        assert (largest_of(models, texts, 1, "keys") < limit).any()


def test_what_was_seen_is_cached_to_half_a_step(scales: KVScales, streams: list[torch.nn.Module]) -> None:
    with torch.no_grad():
        cache = streams[1](input_ids=torch.tensor([PROMPT]), use_cache=True).past_key_values
    for layer in range(LAYERS):
        for scale, exact in zip(scales.of(layer), (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
            step = scale[..., :12]
            rounded = (exact / step).round()
            assert rounded.abs().max() <= LARGEST_INT8
            assert ((rounded * step - exact).abs() <= 0.501 * step).all()


def test_tokens_that_a_window_has_passed_count_too(tmp_path: Path) -> None:
    base = make_zoo_base(tmp_path / "base", "mistral")
    model = make_siamese(base)
    text = [*PROMPT, *PROMPT[::-1]]  # a window is 8 tokens
    plan = plan_of(model, 3)
    whole = find_scales(model, plan, [text])
    for layer, start in enumerate(find_scales(model, plan, [text[:7]]).keys):
        assert (whole.keys[layer] >= start * 0.999).all()


def test_trained_biases_are_not_the_base_streams(tmp_path: Path, gpt2_folder: Path) -> None:
    model = make_siamese_with(gpt2_folder, "lora_all_biases")
    bias = model.causal_lm.get_parameter("transformer.h.0.attn.c_attn.base_layer.bias")
    with torch.no_grad():
        bias[-48:] = 0  # in the adapter stream alone
    base = load_base_model(str(gpt2_folder))
    found = find_scales(model, plan_of(model), TEXTS).values[0][0, :, 0, :12]
    smallest = largest_of([base], TEXTS, 0, "values") * HEADROOM / LARGEST_INT8
    assert (found >= smallest * 0.999).all()


def test_finding_scales_leaves_the_model_as_it_was(model: SiameseModel, scales: KVScales) -> None:
    again = find_scales(model, plan_of(model), TEXTS)
    torch.testing.assert_close(again.keys, scales.keys, rtol=0, atol=0)
    assert model.peft_model.active_adapter == "default"


def test_a_model_that_caches_other_layers_or_heads_is_refused(model: SiameseModel) -> None:
    plan = plan_of(model)
    with pytest.raises(UnsupportedError, match="caches 2 layers, not 1: no int8 cache"):
        find_scales(model, replace(plan, layers=plan.layers[:1]), TEXTS)
    heads = [replace(layer, kv_heads=4) for layer in plan.layers]
    with pytest.raises(UnsupportedError, match="other heads than it attends with"):
        find_scales(model, replace(plan, layers=heads), TEXTS)


def test_the_node_gets_them(scales: KVScales) -> None:
    assert scales.of(1) == (scales.keys[1], scales.values[1])
    assert scales.attributes == {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
