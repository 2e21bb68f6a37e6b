"""Patterns of PEFT configs that are no regular expressions, or take longer than anybody waits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from imsm_core.adapters.attach import attach_adapter, load_adapter
from imsm_core.adapters.configs import read_peft_config
from imsm_core.adapters.patterns import check_patterns
from imsm_core.backbone import load_base_model
from imsm_core.errors import AdapterError
from tests.builders import make_siamese

BOMB = r"(([a-z._0-9]+)+)+!"
FIELDS: dict[str, Any] = {
    "target_modules": lambda text: text,
    "exclude_modules": lambda text: text,
    "modules_to_save": lambda text: ["embed_tokens", text],
    "rank_pattern": lambda text: {text: 2},
    "alpha_pattern": lambda text: {"q_proj": 1, text: 2},
    "layers_pattern": lambda text: ["layers", text],
}


def options(field: str, text: str) -> dict[str, Any]:
    layers = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    return {"target_modules": ["q_proj"], **layers, field: FIELDS[field](text)}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("text", "message"),
    [(BOMB, "takes longer than 3 seconds on the model's modules"), ("(", "missing \\), unterminated subpattern")],
)
def test_unusable_pattern_is_one_line_that_names_its_field(
    base_folder: Path, field: str, text: str, message: str
) -> None:
    begun = time.perf_counter()
    with pytest.raises(
        AdapterError, match=rf"^the adapter's {field} has the pattern .*, which cannot be used: .*{message}"
    ):
        attach_adapter(load_base_model(str(base_folder)), LoraConfig(**options(field, text), task_type="CAUSAL_LM"))
    assert time.perf_counter() - begun < 10


def test_field_of_another_method_is_tried_too(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    fields = {"peft_type": "IA3", "target_modules": ["down_proj"], "feedforward_modules": BOMB}
    path.write_text(json.dumps(fields))
    with pytest.raises(AdapterError, match="the adapter's feedforward_modules has the pattern"):
        attach_adapter(load_base_model(str(base_folder)), read_peft_config(path))


def test_saved_adapter_with_such_a_pattern_is_refused(base_folder: Path, tmp_path: Path) -> None:
    make_siamese(base_folder).peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"exclude_modules": BOMB}))
    with pytest.raises(AdapterError, match="the adapter's exclude_modules has the pattern"):
        load_adapter(load_base_model(str(base_folder)), tmp_path)


def test_patterns_that_match_are_left_alone(base_folder: Path) -> None:
    model = load_base_model(str(base_folder))
    config = LoraConfig(
        target_modules=r".*layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)",
        rank_pattern={r"layers\.1\..*q_proj": 3},
        exclude_modules=r".*\.0\..*up_proj",
        task_type="CAUSAL_LM",
    )
    check_patterns(config, model)
    found = [name for name, _ in attach_adapter(model, config).named_modules() if name.endswith("lora_A.default")]
    assert [name.split("layers.")[1].split(".lora")[0] for name in found] == [
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    ]


def test_new_adapter_that_memory_cannot_hold_is_refused_before_it_is_made(base_folder: Path) -> None:
    config = LoraConfig(r=10**9, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match=r"the adapter would have [0-9,]+ GB of weights, and this machine has"):
        attach_adapter(load_base_model(str(base_folder)), config)
