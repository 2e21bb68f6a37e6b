"""Every operator, with the nth call of onnxruntime's interface or the nth request for memory failing, for every n."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "runtime" / "kernels"
SOURCE = Path(__file__).with_name("failing_api.c")
WRAPPED = ("malloc", "calloc", "realloc", "aligned_alloc", "free")
UNSUPPORTED = 77  # the program's exit code without kernels for this processor


def build(compiler: str, program: Path, *options: str) -> subprocess.CompletedProcess[str]:
    sources = [SOURCE, *sorted(KERNELS.rglob("*.c"))]
    flags = ["-O1", "-g", "-std=c11", "-D_GNU_SOURCE", "-Wall", f"-I{ROOT / 'third_party' / 'onnxruntime'}"]
    flags += ["-Wl," + ",".join(f"--wrap={name}" for name in WRAPPED)]
    command = [compiler, *flags, *options, *map(str, sources), "-lm", "-lpthread", "-o", str(program)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_failure_is_returned_and_nothing_is_leaked(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs GCC or Clang")
    program = tmp_path / "failing_api"
    built = build(compiler, program, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    if built.returncode != 0:  # a compiler without the sanitizers' libraries
        built = build(compiler, program)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [program], capture_output=True, text=True, check=False, env={"ASAN_OPTIONS": "detect_leaks=0"}
    )
    if done.returncode == UNSUPPORTED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert names == {
        "RegisterCustomOps",
        "QuantizedMatMul",
        "QuantizedMatMulLowRank",
        "QuantizedSwiGLU",
        "QuantizedSwiGLULowRank",
        "QuantizedGather",
        "GroupQueryAttention",
    }
