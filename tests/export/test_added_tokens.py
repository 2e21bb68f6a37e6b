"""Adapters with their own tokenizer and added tokens, exported: against PEFT's AutoPeftModel, by value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import cli
from runtime import Session, load
from tests.added_tokens import NEW, TEXT, logits, resized, save_tokenizer, train
from tests.builders import EOS, VOCABULARY, make_base_folder

FORCED = -1e4
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def export(adapter: Path, base: Path, artifact: Path, *options: object) -> int:
    return cli.main(["export", "--adapter", str(adapter), "--base", str(base), str(artifact), *map(str, options)])


def artifact_logits(artifact: Path, memory_bias: float = 0.0) -> np.ndarray:
    """After TEXT, which holds both added tokens."""
    session = Session(artifact)
    found: np.ndarray = session.prefill(session.new_state(1, memory_bias), TEXT.tolist()).logits[0]
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["frozen", "trained tokens", "copied embeddings"])
def test_artifact_equals_peft_for_added_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool, way: str
) -> None:
    base = make_base_folder(tmp_path / "base", tied=tied)
    train(base, tmp_path / "adapter", way)
    assert export(tmp_path / "adapter", base, tmp_path / "artifact") == 0
    reported = capsys.readouterr().err
    assert f"tokenizer of {tmp_path / 'adapter'}, {VOCABULARY + 2} tokens, with its chat template" in reported
    assert "the rows of 2 added tokens come with the adapter" in reported
    reference = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    adapter = logits(reference)[0, -1].numpy()
    found = artifact_logits(tmp_path / "artifact", FORCED)
    assert found.shape == (VOCABULARY + 2,)
    np.testing.assert_allclose(found, adapter, atol=1e-4, rtol=1e-4)
    if not (tied and way == "trained tokens"):  # there the lm_head has the trained rows, for both streams
        with reference.disable_adapter():
            base_stream = logits(reference)[0, -1].numpy()
        mean = artifact_logits(tmp_path / "artifact")
        np.testing.assert_allclose(mean, 0.5 * (adapter + base_stream), atol=1e-4, rtol=1e-4)
    manifest = json.loads((tmp_path / "artifact" / "imsm_model.json").read_text())
    assert manifest["training"]["tokenizer"] == str(tmp_path / "adapter")
    assert manifest["tokens"]["eos_token_ids"] == [EOS, NEW[1]]
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert load(tmp_path / "artifact").codec.encode_prompt("Hi") == expected
    assert NEW[0] in expected


@pytest.mark.parametrize("options", [("--precision", "int8"), ("--precision", "fp16"), ("--kv-cache", "int8")])
def test_added_tokens_in_other_precisions(tmp_path: Path, options: tuple[str, str]) -> None:
    base = make_base_folder(tmp_path / "base", tied=True)
    trained = train(base, tmp_path / "adapter", "trained tokens")
    assert export(tmp_path / "adapter", base, tmp_path / "artifact", *options) == 0
    found, expected = artifact_logits(tmp_path / "artifact", FORCED), logits(trained)[0, -1].numpy()
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())


def test_base_that_the_user_resized_keeps_its_other_rows(tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base")
    trained = train(base, tmp_path / "adapter", "frozen", VOCABULARY + 2)
    resized(base, 2, VOCABULARY + 2).save_pretrained(str(tmp_path / "resized"))
    save_tokenizer(base, tmp_path / "resized", None)
    assert export(tmp_path / "adapter", tmp_path / "resized", tmp_path / "artifact") == 0
    found = artifact_logits(tmp_path / "artifact", FORCED)
    np.testing.assert_allclose(found, logits(trained)[0, -1].numpy(), atol=1e-4, rtol=1e-4)


def test_named_adapter_takes_the_tokenizer_at_the_root(tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base")
    trained = train(base, tmp_path / "adapter" / "legal", "frozen")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.move(tmp_path / "adapter" / "legal" / name, tmp_path / "adapter" / name)
    assert export(tmp_path / "adapter", base, tmp_path / "artifact", "--adapter-name", "legal") == 0
    found = artifact_logits(tmp_path / "artifact", FORCED)
    np.testing.assert_allclose(found, logits(trained)[0, -1].numpy(), atol=1e-4, rtol=1e-4)


def test_tokens_that_the_adapters_model_has_no_rows_for_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base_folder(tmp_path / "base")
    train(base, tmp_path / "adapter", "frozen", VOCABULARY + 1)
    assert export(tmp_path / "adapter", base, tmp_path / "artifact") == 0
    reported = capsys.readouterr().err
    assert "1 of its tokens have no embedding, such as '<|im_end|>', and cannot be in a prompt" in reported
    assert artifact_logits_size(tmp_path / "artifact") == VOCABULARY + 1


def artifact_logits_size(artifact: Path) -> int:
    size: int = json.loads((artifact / "imsm_model.json").read_text())["model"]["vocab_size"]
    return size


def test_checkpoint_keeps_the_base_models_tokenizer_unless_its_folder_has_one(
    chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.builders import make_siamese, save_tiny_checkpoint

    checkpoint = tmp_path / "checkpoint"
    save_tiny_checkpoint(make_siamese(chat_folder), chat_folder, checkpoint)
    assert cli.main(["export", str(checkpoint), str(tmp_path / "a")]) == 0
    assert f"tokenizer of the base model, {VOCABULARY} tokens, with its chat template" in capsys.readouterr().err
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert cli.main(["export", str(checkpoint), str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
