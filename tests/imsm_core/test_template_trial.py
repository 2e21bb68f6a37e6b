"""Chat templates that do not end or ask for all memory, wherever they come from, and files that are none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from imsm_core import template_trial
from imsm_core.template_trial import check_templates
from tests.builders import write_jsonl
from tests.chat_templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
HUGE = "{{ messages[0]['content'] * 99999999 * 20 }}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_models_are_taken(name: str) -> None:
    assert check_templates(TEMPLATES[name]) is None


def test_templates_that_refuse_or_are_none_are_left_to_whoever_uses_them() -> None:
    assert (
        check_templates({"default": "{{ raise_exception('no') }}", "other": "{% if %}", "third": "{{ 1 / 0 }}"}) is None
    )
    assert check_templates(None) is None


def test_what_takes_forever_or_all_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_trial, "SECONDS", 2.0)
    assert check_templates({"default": "x", "bomb": ENDLESS}) == "it does not come to an end"
    assert check_templates(HUGE) == "it computes something too large"
    assert check_templates(5) == "it is no text but of type int"


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_commands_refuse_them_in_one_line(
    base_folder: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    if where == "base":
        (base / "chat_template.jinja").write_text(HUGE)
        rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}])
        command = ["train", "--model", str(base), "--data", str(rows), "--out", str(tmp_path / "out")]
    else:
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "chat_template.jinja").write_text(HUGE)
        command = ["export", "--adapter", str(adapter), "--base", str(base), str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "cannot be used: it computes something too large" in capsys.readouterr().err


def test_a_pipe_in_a_base_models_folder_is_refused_and_not_waited_for(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "b"}])
    command = ["train", "--model", str(base), "--data", str(rows), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "config.json, which is no file but a pipe or a device" in capsys.readouterr().err


def test_a_panic_of_the_tokenizers_library_is_one_line(base_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    document = json.loads((base / "tokenizer.json").read_text())
    pattern = {"Regex": r"(x+x+)+y|(a|a)*$|([a-z ]+)+\d"}
    document["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    (base / "tokenizer.json").write_text(json.dumps(document))
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a " * 40 + "!", "answer": "b"}])
    command = [
        sys.executable,
        "cli.py",
        "train",
        "--model",
        str(base),
        "--data",
        str(rows),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
