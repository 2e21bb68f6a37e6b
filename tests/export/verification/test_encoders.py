"""The runtime's encoder is compared with the tokenizer of training, and a difference is no artifact."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import cli
from export.artifact import seal, write_tokenizer
from export.errors import UnsupportedError, VerificationError
from export.verification.encoders import compare_encoders
from imsm_core.backbone import load_base_model, load_tokenizer
from runtime import ArtifactError
from runtime.generation import hard_texts
from runtime.generation.text import TextCodec
from tests.chat_templates import TEMPLATES, make_chat_tokenizer
from tests.exported import Exported, copied


def written(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, str]:
    """The artifact's files of a tokenizer; returns its named tokens."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
    return dict(tokenizer.special_tokens_map)


@pytest.mark.parametrize("name", TEMPLATES)
def test_encoders_agree_and_the_fingerprint_repeats(name: str, tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer(tmp_path, name)
    tokens = written(tokenizer, tmp_path)
    compared = compare_encoders(tmp_path, tokenizer, tokens)
    assert compared["compared"] > 300
    assert compared == hard_texts.fingerprint(hard_texts.steady_codec(tmp_path, tokens))
    assert hard_texts.check_prompts(tmp_path, tokens, compared) == compared["compared"]


@pytest.mark.parametrize("model", ["stories_folder", "smollm2_folder"])
def test_encoders_agree_on_real_tokenizers(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(request.getfixturevalue(model)))
    assert compare_encoders(tmp_path, tokenizer, written(tokenizer, tmp_path))["compared"] > 150


def test_most_texts_are_encoded_and_some_conversations_are_refused(tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer(tmp_path, "Mistral")
    codec = hard_texts.steady_codec(tmp_path, written(tokenizer, tmp_path))
    encoded = [bool(hard_texts.encode_case(codec, case)) for case in hard_texts.cases([], True)]
    assert 0 < encoded.count(False) < 12
    assert len(set(hard_texts.WORDS)) == len(hard_texts.WORDS)


def lower_case(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def other_decoder(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["decoder"] = {"type": "Sequence", "decoders": [document["decoder"], {"type": "Fuse"}]}
    document["decoder"]["decoders"].append({"type": "Replace", "pattern": {"String": "fox"}, "content": "dog"})
    (folder / "tokenizer.json").write_text(json.dumps(document))


def other_template(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("helpful", "useful"))


def milder_template(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("m.role + ", "(m.role | default('user')) ~ ", 1))
    (folder / "chat_template.jinja").write_text(template.replace("m.content +", "(m.content | string) +"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lower_case, "encodes .* as .*, the tokenizer of training as"),
        (other_decoder, "decodes .*dog"),
        (other_template, "encodes the conversation"),
        (milder_template, r"encodes the conversation .* as \[.*, the tokenizer of training as nothing \(refused\)"),
    ],
)
def test_any_difference_fails(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer(tmp_path, "ChatML")
    tokens = written(tokenizer, tmp_path)
    before = hard_texts.fingerprint(hard_texts.steady_codec(tmp_path, tokens))
    change(tmp_path)
    with pytest.raises(VerificationError, match=message) as caught:
        compare_encoders(tmp_path, tokenizer, tokens)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ArtifactError, match="prompts get other token ids here than at the export"):
        hard_texts.check_prompts(tmp_path, tokens, before)


def test_templates_that_tell_the_date_agree_every_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_chat_tokenizer(tmp_path, "Zephyr")
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y %H:%M:%S.%f') }}" + TEMPLATES["Zephyr"]
    compared = compare_encoders(tmp_path, tokenizer, written(tokenizer, tmp_path))
    module = importlib.import_module("runtime.generation.chat_template")

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls(2031, 1, 1)

    monkeypatch.setattr(module.datetime, "datetime", Later)
    assert hard_texts.fingerprint(hard_texts.steady_codec(tmp_path, dict(tokenizer.special_tokens_map))) == compared
    assert "\n" not in TextCodec(tmp_path, {}).decode([70])


def test_of_several_templates_the_default_one_is_taken(base_folder: Path, tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(str(base_folder)), load_base_model(str(base_folder))
    tokenizer.chat_template = {"default": TEMPLATES["ChatML"], "tool_use": TEMPLATES["Gemma"]}
    tokens = write_tokenizer(tokenizer, model, tmp_path)["special_tokens"]
    assert compare_encoders(tmp_path, tokenizer, tokens)["compared"] > 300
    tokenizer.chat_template = {"rag": TEMPLATES["ChatML"], "tool_use": TEMPLATES["Gemma"]}
    with pytest.raises(UnsupportedError, match=r"chat templates \(rag, tool_use\), but none called default"):
        write_tokenizer(tokenizer, model, tmp_path)
    write_tokenizer(tokenizer, model, tmp_path, raw=True)


def test_the_manifest_has_the_fingerprint_and_verify_checks_it(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tiny.manifest["prompts"]
    assert set(prompts) == {"raw", "compared", "fingerprint"}
    assert cli.main(["verify", str(tiny.artifact)]) == 0
    assert f"prompts  {prompts['compared']} texts" in capsys.readouterr().out
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    seal(artifact, tiny.manifest | {"prompts": prompts | {"fingerprint": "0" * 64}})
    assert cli.main(["verify", str(artifact)]) == 2
    assert "prompts get other token ids here than at the export" in capsys.readouterr().err
