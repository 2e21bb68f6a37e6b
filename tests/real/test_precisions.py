"""A real model with quantized weights: how far it is from float32, and that it writes the same through every door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cli
from export.settings import ExportSettings
from runtime import generate, load
from tests.builders import write_jsonl
from tests.exported import Exported
from tests.real.exports import export_real

pytestmark = pytest.mark.real

MOST_KL = {"int8": 0.01, "int4": 0.1}  # nats a token; 0.005 and 0.04 were measured
QUESTION, WORD = "What is the opposite of up?", "down"
TEXTS = [
    "The sea was calm that morning, and the fishermen had already left the harbor when the sun came up.",
    "To make bread you need flour, water, salt and yeast. Mix them, let the dough rest and bake it in a hot oven.",
    "A computer stores numbers as bits. Eight bits make a byte, and a byte can hold one of 256 values.",
    "She opened the letter slowly, read the first line, and began to laugh. Her brother was coming home at last.",
    "Plants take in carbon dioxide from the air and water from the soil, and use light to turn them into sugar.",
    "The train to the north leaves at nine. If you miss it, the next one goes at noon and stops at every village.",
]


@pytest.fixture(scope="module", params=MOST_KL)
def quantized(
    request: pytest.FixtureRequest, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    texts = write_jsonl(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    return export_real(folder, smollm2_folder, "lora", ExportSettings(request.param, eval_data=texts))


def test_the_divergence_from_float32_is_within_its_bound(quantized: Exported) -> None:
    quality = quantized.manifest["quality"]
    assert quality["tokens"] >= 100
    for name in ("blend", "base", "adapter"):
        assert 0 < quality[name]["mean_kl"] < MOST_KL[quantized.manifest["precision"]]


def test_the_weights_take_the_bytes_that_their_bits_say(quantized: Exported) -> None:
    size = (quantized.artifact / "model.onnx.data").stat().st_size
    least = {"int8": 134.5e6, "int4": 87e6}[quantized.manifest["precision"]]
    assert least < size < 1.35 * least


def test_the_base_memory_still_knows_what_the_model_knows(quantized: Exported) -> None:
    text = generate(load(quantized.artifact), QUESTION, max_new_tokens=16, memory_bias=1e4).text
    assert WORD in text.lower()


def test_the_command_line_writes_the_librarys_tokens(quantized: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(quantized.artifact), "--prompt", QUESTION, "--max-new-tokens", "16", "--json"]
    assert cli.main(command) == 0
    document = json.loads(capsys.readouterr().out)
    expected = generate(load(quantized.artifact), QUESTION, max_new_tokens=16)
    assert document["token_ids"] == expected.token_ids
