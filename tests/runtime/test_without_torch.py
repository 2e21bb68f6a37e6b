"""The runtime's commands in a process where importing PyTorch and its company fails."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import write_jsonl
from tests.exported import Exported

ROOT = Path(__file__).resolve().parents[2]
BANNED = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "optimum", "accelerate")
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BANNED!r}:
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Blocker())
import cli
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


TRAIN = ["train", "--model", "m", "--data", "d", "--out", "o"]


def run_blocked(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """cli.py in a process that cannot import what BANNED names; a file, since bench starts its own processes."""
    script = tmp_path / "blocked.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + BLOCKER)
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)


def test_a_command_that_needs_pytorch_says_how_to_get_it(tmp_path: Path) -> None:
    for command, extra in ((["export", "nowhere", "there"], "export"), (TRAIN, "train")):
        done = run_blocked(tmp_path, *command)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {command[0]} needs torch, ")
        assert f"pip install 'imsm-runtime[{extra}]'" in done.stderr


def test_the_check_against_a_checkpoint_says_how_to_get_pytorch(tiny: Exported, tmp_path: Path) -> None:
    done = run_blocked(tmp_path, "verify", str(tiny.artifact), "--checkpoint", str(tiny.checkpoint))
    assert done.returncode == 2
    assert "pip install 'imsm-runtime[export]'" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "ARTIFACT", "--prompt", "Hello", "--max-new-tokens", "4", "--json"],
        ["score", "ARTIFACT", "--input", "ROWS"],
        ["inspect", "ARTIFACT", "--json"],
        ["verify", "ARTIFACT"],
        ["bench", "ARTIFACT", "--prompt-lengths", "4", "--new-tokens", "3", "--repeats", "1"],
        ["doctor"],
        ["--help"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_command_runs_without_pytorch(tiny: Exported, tmp_path: Path, arguments: list[str]) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hello", "continuation": "x"}])
    files = {"ARTIFACT": str(tiny.artifact), "ROWS": str(rows)}
    done = run_blocked(tmp_path, *(files.get(word, word) for word in arguments))
    assert done.returncode == 0, done.stderr
    if arguments[0] == "generate":
        assert len(json.loads(done.stdout)["token_ids"]) == 4


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports absolutely."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "banned"),
    [
        ("runtime", {*BANNED, "imsm_core", "export", "cli"}),
        ("export", {"runtime", "cli", "export"}),
        ("imsm_core", {"runtime", "export", "cli"}),
    ],
)
def test_imports_run_in_one_direction(package: str, banned: set[str]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imports_of(path) & banned, path
