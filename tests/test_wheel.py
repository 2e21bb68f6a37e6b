"""The wheel, installed into a fresh environment without PyTorch, generates text."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

from runtime.engine import own_kernels
from tests.exported import Exported

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"train": ["--model", "m", "--data", "d", "--out", "o"], "export": ["checkpoint", "artifact"]}
PROBE = """
import importlib.util, json, imsm_runtime
from imsm_runtime.engine import own_kernels
names = ("torch", "transformers", "onnx", "runtime", "export", "cli")
found = [name for name in names if importlib.util.find_spec(name)]
print(json.dumps({"found": found, "names": len(imsm_runtime.__all__), "kernels": own_kernels.describe()}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of a fresh virtual environment with the wheel and its [cpu] extra."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([str(word) for word in (*install, "-c", ROOT / "constraints.txt", f"{wheel}[cpu]")], check=True)
    return programs


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, check=False)


def test_nothing_called_runtime_or_export_is_installed_and_no_pytorch(environment: Path, tmp_path: Path) -> None:
    done = run(tmp_path, environment / "python", "-c", PROBE)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["found"] == []
    assert document["names"] > 10
    assert document["kernels"] == own_kernels.describe()  # built for the wheel as for this checkout


def test_the_installed_commands_work(environment: Path, tiny: Exported, tmp_path: Path) -> None:
    generated = run(
        tmp_path, environment / "imsm", "generate", tiny.artifact, "--prompt", "Hi", "--max-new-tokens", "3", "--json"
    )
    assert generated.returncode == 0, generated.stderr
    assert len(json.loads(generated.stdout)["token_ids"]) == 3
    for command in (["verify", tiny.artifact], ["inspect", tiny.artifact], ["doctor"]):
        done = run(tmp_path, environment / "imsm", *command)
        assert done.returncode == 0, done.stderr
    bench = run(tmp_path, environment / "imsm", "bench", tiny.artifact, "--prompt-lengths", "4", "--new-tokens", "3")
    assert json.loads(bench.stdout.splitlines()[-1])["results"]


def test_every_command_is_shown_and_what_is_missing_is_told(environment: Path, tmp_path: Path) -> None:
    done = run(tmp_path, environment / "imsm", "--help")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for command, extra in (("train", "train"), ("export", "export")):
        assert f"(needs pip install 'imsm-runtime[{extra}]')" in shown
        refused = run(tmp_path, environment / "imsm", command, *REQUIRED[command])
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {command} needs torch, ")
    assert run(tmp_path, environment / "imsm", "--version").stdout == f"imsm {version('imsm-runtime')}\n"


def test_without_onnxruntime_the_commands_say_so(environment: Path, tiny: Exported, tmp_path: Path) -> None:
    code = """
import sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "onnxruntime":
            raise ImportError(name)
sys.meta_path.insert(0, Blocker)
from imsm_runtime.console import main
sys.exit(main(sys.argv[1:]))
"""
    generated = run(tmp_path, environment / "python", "-c", code, "generate", tiny.artifact, "--prompt", "Hi")
    assert generated.returncode == 2
    assert generated.stderr == (
        "error: generate needs onnxruntime, which is not installed; run pip install 'imsm-runtime[cpu]'\n"
    )
    assert run(tmp_path, environment / "python", "-c", code, "inspect", tiny.artifact).returncode == 0
