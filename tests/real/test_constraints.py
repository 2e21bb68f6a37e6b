"""A real model writes what a schema, an expression or a grammar demands, and says there what it knows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from export.settings import ExportSettings
from runtime import Model, generate, load, score_texts
from tests.real.exports import export_real

pytestmark = pytest.mark.real

ASKED = "Tell me about Anna, who is 31 and lives in Paris."
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(export_real(tmp_path_factory.mktemp("smollm2"), smollm2_folder, "lora", ExportSettings()).artifact)


def test_a_schema_is_filled_in(model: Model) -> None:
    result = generate(model, ASKED, json_schema=json.dumps(SCHEMA), max_new_tokens=100, memory_bias=1e4)
    assert result.finish_reason == "stop"
    assert json.loads(result.text) == {"name": "Anna", "age": 31, "city": "Paris"}


@pytest.mark.parametrize("seed", range(3))
def test_what_is_drawn_matches_too(model: Model, seed: int) -> None:
    expression = r"[A-Z][a-z]{2,8} is \d{1,3} years old\."
    result = generate(model, ASKED, regex=expression, max_new_tokens=60, temperature=1.5, seed=seed)
    assert re.fullmatch(expression, result.text)
    grammar = 'start: item ("; " item){1,3}\nitem: /[a-z]{1,12}/ "=" /[0-9]{1,4}/'
    result = generate(model, ASKED, grammar=grammar, max_new_tokens=100, temperature=1.5, seed=seed)
    assert re.fullmatch(r"[a-z]{1,12}=[0-9]{1,4}(; [a-z]{1,12}=[0-9]{1,4}){1,3}", result.text)


def test_the_right_choice_is_the_likeliest(model: Model) -> None:
    rows = [
        {"prompt": "The capital of France is", "continuation": [" Paris", " London", " Berlin", " Madrid"]},
        {"prompt": "The opposite of hot is ", "continuation": ["cold", "warm", "red"]},
    ]
    for scores in score_texts(model, rows, memory="base", raw=True):
        assert max(range(len(scores)), key=lambda index: scores[index].logprob) == 0
