"""The command line: every command explains itself, every mistake is one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

import cli
from tests.builders import make_base_folder, make_siamese, save_tiny_checkpoint
from tests.exported import Exported

COMMANDS = ("train", "export", "verify", "inspect", "generate", "chat", "batch", "score", "embed", "bench", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    options = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")]
    assert options
    assert "None" not in text  # a default that says nothing


def other_checkpoint(folder: Path) -> Path:
    """A checkpoint on another base model."""
    base = make_base_folder(folder / "other_base", head_dim=12)
    save_tiny_checkpoint(make_siamese(base), base, folder / "other_checkpoint")
    return folder / "other_checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "/no/where", "--data", "DATA", "--out", "OUT"], "no base model at '/no/where'"),
        (["train", "--model", "BASE", "--data", "/no/file", "--out", "OUT"], "cannot read the data file /no/file"),
        (["train", "--model", "BASE", "--data", "DATA", "--out", "OUT"], "line 1: no form is known"),
        (
            ["train", "--model", "BASE", "--data", "DATA", "--out", "OUT", "--peft", "magic"],
            "--peft is magic; choose one of lora",
        ),
        (
            ["train", "--model", "BASE", "--data", "DATA", "--out", "OUT", "--gate", "garden"],
            "--gate is garden; choose one of query_aware",
        ),
        (["train", "--model", "BASE", "--data", "DATA", "--out", "ARTIFACT"], "exists and is kept"),
        (["export", "/no/where", "OUT"], "no checkpoint at /no/where"),
        (["export", "CKPT", "ARTIFACT"], "exists and is kept"),
        (["export", "CKPT", "OUT", "--precision", "int1"], "--precision is int1; choose one of fp32, fp16"),
        (["export", "CKPT", "OUT", "--context-length", "4096"], "--context-length is 4096; the model allows 2 .. 128"),
        (["inspect", "/no/where"], "no artifact at /no/where"),
        (["inspect", "CKPT"], "has no imsm_model.json"),
        (["generate", "ARTIFACT", "--prompt", ""], "the prompt is empty"),
        (["generate", "ARTIFACT", "--prompt", "X" * 200], "201 tokens; the model's context is 128"),
        (["generate", "ARTIFACT", "--prompt", "x", "--provider", "quantum"], "unknown execution provider 'quantum'"),
        (["generate", "ARTIFACT", "--prompt", "x", "--temperature", "-1"], "--temperature is -1.0; it must be 0"),
        (["generate", "ARTIFACT", "--prompt", "x", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (
            ["generate", "ARTIFACT", "--prompt", "x", "--memory-bias", "nan"],
            "--memory-bias is nan; it must be a number",
        ),
        (["verify", "ARTIFACT", "--checkpoint", "/no/where"], "no checkpoint at /no/where"),
        (["verify", "ARTIFACT", "--checkpoint", "OTHER"], "was not exported from"),
        (["generate", "ARTIFACT", "--prompt", "x", "--memory-bias", "-1e4", "--top-k", "-1"], "--top-k is -1"),
        (["generate", "ARTIFACT", "--prompt", "x", "--provider", "coreml"], "or allow it with --allow-fallback"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "?", "answer": "!"}\n')
    names = {
        "BASE": tiny.base,
        "CKPT": tiny.checkpoint,
        "ARTIFACT": tiny.artifact,
        "DATA": data,
        "OUT": tmp_path / "out",
    }
    if "OTHER" in arguments:
        names["OTHER"] = other_checkpoint(tmp_path)
    assert cli.main([str(names.get(word, word)) for word in arguments]) == 2
    *progress, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not any("error" in before.lower() or "Traceback" in before for before in progress)
    assert not (tmp_path / "out").exists()
