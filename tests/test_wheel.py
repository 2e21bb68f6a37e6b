"""The wheel, installed into a fresh environment without PyTorch, generates text."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from runtime.engine import own_kernels
from tests.exported import Exported

ROOT = Path(__file__).resolve().parents[1]
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
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), f"{wheel}[cpu]"], check=True)
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


def test_training_commands_say_what_is_missing(environment: Path, tmp_path: Path) -> None:
    done = run(tmp_path, environment / "imsm-train", "--help")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
