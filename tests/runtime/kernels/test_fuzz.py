"""Random nodes through kernels that were built with AddressSanitizer and UBSan: none ends a process, whatever it says.

`fuzz.py` says how to run it for longer, and a single node alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.engine import own_kernels

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "runtime" / "kernels"
SECONDS = 12
OPERATORS = (
    "QuantizedMatMul",
    "QuantizedMatMulLowRank",
    "QuantizedSwiGLU",
    "QuantizedSwiGLULowRank",
    "QuantizedGather",
    "GroupQueryAttention",
)
SEEDS = {"valid": 1_000_000, "contradicting": 2_000_000}

if own_kernels.library() is None:
    pytest.skip(own_kernels.describe(), allow_module_level=True)


def sanitizers() -> list[str]:
    """GCC's libraries of the sanitizers, to be loaded before all others."""
    found = [_output("gcc", f"-print-file-name=lib{name}.so") for name in ("asan", "ubsan")]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("GCC has no AddressSanitizer here")
    return found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs GCC")
    sanitizers()
    target = tmp_path_factory.mktemp("sanitized") / "kernels.so"
    flags = ["-O1", "-g", "-std=c11", "-D_GNU_SOURCE", "-fPIC", "-shared", "-fno-omit-frame-pointer"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags.append(f"-I{ROOT / 'third_party' / 'onnxruntime'}")
    sources = map(str, sorted(KERNELS.rglob("*.c")))
    built = subprocess.run(["gcc", *flags, *sources, "-lm", "-o", str(target)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target


@pytest.mark.parametrize(("kind", "threads"), [("valid", 2), ("contradicting", 1)])
def test_random_nodes(library: Path, kind: str, threads: int) -> None:
    arguments = [str(library), kind, str(SEEDS[kind]), str(SECONDS), str(threads)]
    environment = os.environ | {"LD_PRELOAD": ":".join(sanitizers())}
    environment["ASAN_OPTIONS"] = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024"
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.kernels.fuzz", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join([*lines[-1:], done.stderr[-4000:]])
    counts = {what: int(count) for what, count in re.findall(r"^(\w+ \w+): (\d+)$", done.stdout, re.MULTILINE)}
    for operator in OPERATORS:
        assert counts[f"{operator} ran"], counts
        if kind == "contradicting":
            assert counts[f"{operator} refused"], counts
