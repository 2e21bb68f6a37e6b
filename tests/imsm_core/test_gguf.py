"""A GGUF file as the base model: the weights and the tokenizer that it was written from, through both commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from imsm_core.backbone import load_base_model, load_tokenizer
from imsm_core.checkpoint import load_checkpoint
from imsm_core.errors import BaseModelError
from tests.builders import write_jsonl

pytest.importorskip("gguf", reason="needs the package gguf")
from tests.gguf_file import write_gguf


@pytest.fixture(scope="module")
def stories_gguf(stories_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(stories_folder, tmp_path_factory.mktemp("gguf") / "stories.gguf")


def test_gguf_gives_the_logits_and_tokens_of_the_folder_it_was_written_from(
    stories_folder: Path, stories_gguf: Path
) -> None:
    wanted, found = load_base_model(str(stories_folder)), load_base_model(str(stories_gguf))
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in found.parameters())
    text = "Once upon a time, there was a naïve girl. 🙂"
    tokens = load_tokenizer(str(stories_gguf))(text)["input_ids"]
    assert tokens == load_tokenizer(str(stories_folder))(text)["input_ids"]
    ids = torch.tensor([tokens])
    torch.testing.assert_close(found(input_ids=ids).logits, wanted(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_train_remembers_the_file_and_export_reads_it(
    stories_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Once", "answer": " upon a time"}])
    monkeypatch.chdir(stories_gguf.parent)
    checkpoint, artifact = tmp_path / "checkpoint", tmp_path / "artifact"
    command = ["--debug", "train", "--model", stories_gguf.name, "--data", data, "--out", checkpoint, "--steps", "2"]
    assert cli.main([*map(str, command), "--no-progress"]) == 0
    assert "it/s" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint(checkpoint)[1].base_model == str(stories_gguf)
    assert cli.main(["--debug", "export", str(checkpoint), str(artifact)]) == 0
    adapter = ["--adapter", str(checkpoint / "adapter"), "--base", str(stories_gguf)]
    assert cli.main(["--debug", "export", *adapter, str(tmp_path / "other")]) == 0


def refused(name: Any, load: Any = load_base_model) -> str:
    with pytest.raises(BaseModelError) as caught:
        load(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("load", [load_base_model, load_tokenizer])
def test_missing_package_or_file_is_named(
    stories_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    assert "no base model at" in refused(tmp_path / "none.gguf", load)
    monkeypatch.setattr("imsm_core.base_source.find_spec", lambda name: None)
    assert "needs gguf, which is not installed; run pip install 'imsm-runtime[gguf]'" in refused(stories_gguf, load)


def test_architecture_that_transformers_does_not_read_is_named(stories_folder: Path, tmp_path: Path) -> None:
    file = write_gguf(stories_folder, tmp_path / "other.gguf", architecture="chameleon")
    assert "chameleon" in refused(file)


@pytest.mark.parametrize("length", [0, 3, 30, 5_000, 500_000, -1])
def test_file_that_is_cut_short_is_refused(stories_gguf: Path, tmp_path: Path, length: int) -> None:
    (tmp_path / "short.gguf").write_bytes(stories_gguf.read_bytes()[:length])
    assert "short.gguf" in refused(tmp_path / "short.gguf")


def test_folder_that_holds_only_a_gguf_file_is_told_so(stories_gguf: Path) -> None:
    assert f"has no config.json; give the GGUF file itself, such as {stories_gguf}" in refused(stories_gguf.parent)
