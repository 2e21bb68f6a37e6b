"""PEFT configs from a file: read as PEFT writes them, and checked before PEFT sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from imsm_core.adapters.attach import attach_adapter
from imsm_core.adapters.configs import read_peft_config
from imsm_core.backbone import load_base_model
from imsm_core.errors import AdapterError


def test_peft_config_file_is_read_as_peft_writes_it(base_folder: Path, tmp_path: Path) -> None:
    LoraConfig(r=3, target_modules=["q_proj"], inference_mode=True).save_pretrained(str(tmp_path))
    config: Any = read_peft_config(tmp_path / "adapter_config.json")
    assert (config.r, config.target_modules, config.inference_mode, config.task_type) == (
        3,
        {"q_proj"},
        False,
        "CAUSAL_LM",
    )
    attach_adapter(load_base_model(str(base_folder)), config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot read the PEFT config .*config\.json: No such file"),
        ("{", "is not a PEFT config: JSONDecodeError"),
        ("[]", "is not a PEFT config: it is not a JSON object"),
        ("null", "is not a PEFT config: it is not a JSON object"),
        ('"LORA"', "is not a PEFT config: it is not a JSON object"),
        ("[" * 100_000, "is not a PEFT config: its JSON is nested too deeply"),
        ("{}", "is not a PEFT config: it has no peft_type"),
        ('{"peft_type": "MAGIC"}', "has the unknown peft_type 'MAGIC'; choose one of ADALORA, .* LORA"),
        ('{"peft_type": ["LORA"]}', r"has the unknown peft_type \['LORA'\]"),
        ('{"peft_type": "XLORA", "rr": 3}', "PEFT type XLORA is not supported: it mixes"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "the adapter's lora_alpha is not finite"),
        ('{"peft_type": "LORA", "alpha_pattern": {"q_proj": 1e999}}', "the adapter's alpha_pattern is not finite"),
        (
            '{"peft_type": "LORA", "init_lora_weights": "eva"}',
            "init_lora_weights='eva' is not supported: it needs an extra pass",
        ),
        ('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": "5"}', "num_virtual_tokens is '5'; it must be a whole"),
        ('{"peft_type": "PROMPT_TUNING"}', "num_virtual_tokens is None; it must be a whole"),
        ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 0}', "num_virtual_tokens is 0; it must be a whole"),
        ('{"peft_type": "LORA", "rr": 3}', "has fields that LoraConfig does not know, such as rr"),
        ('{"peft_type": "LORA", "task_type": "POETRY"}', "cannot be used as a LoraConfig: Invalid task type: 'POETRY'"),
    ],
)
def test_unusable_peft_config_file_is_an_error_of_one_line(
    tmp_path: Path, content: str | None, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(AdapterError, match=message) as caught:
        read_peft_config(path)
    assert "\n" not in str(caught.value)
    assert [str(warning.message) for warning in recwarn] == []


def test_peft_config_file_may_begin_with_a_byte_order_mark_and_leave_adalora_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"peft_type": "ADALORA", "tinit": 10}', encoding="utf-8-sig")
    assert read_peft_config(path).tinit == 10  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["TRAINABLE_TOKENS", "LORA"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([-1], "the token id -1 is not in the model's vocabulary of 259"),
        ([259], "the token id 259 is not in the model's vocabulary of 259"),
        ([5, 5], "names a token twice"),
        ([], r"token_indices is \[\]; it must be a list of token ids, at least one"),
        (["5"], r"token_indices is \['5'\]; it must be a list"),
    ],
)
def test_tokens_of_a_config_file_are_checked_as_the_options_are(
    base_folder: Path, tmp_path: Path, kind: str, indices: list[Any], message: str
) -> None:
    field = {"TRAINABLE_TOKENS": "token_indices", "LORA": "trainable_token_indices"}[kind]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"peft_type": kind, field: indices, "target_modules": ["embed_tokens"]}))
    with pytest.raises(AdapterError, match=message):
        attach_adapter(load_base_model(str(base_folder)), read_peft_config(path))
