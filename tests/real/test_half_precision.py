"""Real models in float16: what it holds, and every way of generating against PyTorch by value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.errors import UnsupportedError
from export.settings import ExportSettings
from imsm_core.reference import reference_step
from runtime import load
from tests.exported import Exported
from tests.real.exports import export_real

pytestmark = pytest.mark.real

PROMPTS = ["What is the capital of Japan?", "Write one sentence about the sea and the people who live beside it."]
FORMATS = {
    "fp16": ExportSettings("fp16"),
    "int8 fp16": ExportSettings("int8", activations="fp16"),
    "int4 fp16": ExportSettings("int4", activations="fp16"),
}
MOST = {"fp16": 0.01, "int8 fp16": 0.15, "int4 fp16": 0.8}
"""Of the logits' root mean square, against the float32 weights: int4's own rounding is most of its."""


@pytest.fixture(scope="module", params=FORMATS)
def half(request: pytest.FixtureRequest, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_real(tmp_path_factory.mktemp("half"), smollm2_folder, "lora", FORMATS[request.param])


def limit(half: Exported) -> float:
    name = half.manifest["precision"]
    return MOST[name if name == "fp16" else f"{name} fp16"]


def off(found: object, expected: object) -> float:
    """Root mean square of the difference from the logits' mean, of that of `expected`."""
    one, other = (np.asarray(value, np.float64) for value in (found, expected))
    one, other = one - one.mean(), other - other.mean()
    return float(np.sqrt(((one - other) ** 2).mean() / (other**2).mean()))


def test_smollm2_comes_near_to_what_float16_holds(half: Exported) -> None:
    found = half.manifest["activation_range"]
    assert 20_000 < found["largest"] < 40_000
    assert found["by_layer"]["model.layers.12"] > 20_000 > found["by_layer"]["model.layers.9"]


@pytest.mark.parametrize("bias", [0.0, 1e4, -1e4], ids=["blend", "base", "adapter"])
def test_a_ragged_batch_and_its_steps_are_pytorchs(half: Exported, bias: float) -> None:
    model = load(half.artifact)
    prompts = [model.codec.encode_prompt(prompt) for prompt in PROMPTS]
    texts = [list(prompt) for prompt in prompts]
    state = model.session.new_state(2, memory_bias=bias)
    output = model.session.prefill(state, prompts)
    for step in range(4):
        for row, text in enumerate(texts):
            expected = reference_step(half.model, text, len(prompts[row]), bias).logits.numpy()
            assert off(output.logits[row], expected) < limit(half)
            text.append(int(expected.argmax()))
        output = model.session.decode_step(state, [text[-1] for text in texts])
        assert np.isfinite(output.logits).all(), step


def test_a_continued_conversation_is_the_whole_text(half: Exported) -> None:
    model = load(half.artifact)
    first, second = map(model.codec.encode_prompt, PROMPTS)
    state = model.session.new_state(1)
    model.session.prefill(state, [first])
    model.session.decode_step(state, [11])
    found = model.session.prefill(state, [second]).logits[0]
    whole = [*first, 11, *second]
    assert off(found, reference_step(half.model, whole, len(whole)).logits.numpy()) < limit(half)


def test_gemma_3_is_refused_in_float16_by_the_layer_that_is_too_large(gemma3_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"largest activation is 1\d\d,\d\d\d \(.*layers\.1\d.*precision bf16"):
        export_real(tmp_path, gemma3_folder, "lora", ExportSettings("fp16"))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_gemma_3_is_written_with_rounded_weights_and_bf16(gemma3_folder: Path, tmp_path: Path, precision: str) -> None:
    exported = export_real(tmp_path, gemma3_folder, "lora", ExportSettings(precision, activations="bf16"))
    assert exported.manifest["activations"] == "bfloat16"
    assert exported.manifest["activation_range"] is None
    assert exported.manifest["parity"]["provider"] is None
