"""Stage 1: what this machine is, what is installed, and which execution providers start."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.cuda.document import Document, Plan

PACKAGES = (
    "torch", "transformers", "peft", "onnx", "onnx-ir", "onnxscript", "optimum", "onnxruntime", "onnxruntime-gpu",
    "onnxruntime-genai-cuda", "tokenizers", "safetensors", "numpy", "jinja2", "gguf", "matplotlib",
)  # fmt: skip
COPIED = 1 << 30


def run(plan: Plan, document: Document) -> None:
    """Note everything; nothing here can fail but what the project itself needs."""
    document.note("python", sys.version.split()[0])
    document.note("packages", {name: _version(name) for name in PACKAGES})
    document.note("gpus", _nvidia_smi())
    import torch

    document.note("torch", _torch_facts(torch))
    import onnxruntime

    document.note("onnxruntime", {"version": onnxruntime.__version__, "file": onnxruntime.__file__})
    document.note("onnxruntime_providers", onnxruntime.get_available_providers())
    if torch.cuda.is_available():
        document.note("copy_gb_per_s", round(_copy_speed(torch), 1))
    from runtime.doctor import examine

    document.note("doctor", examine())  # last: it starts every provider, and a broken one may end the process
    document.note("libraries", _loaded_libraries())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> list[dict[str, str]] | str:
    fields = ("name", "memory.total", "memory.used", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    rows = [line.split(", ") for line in done.stdout.splitlines() if line]
    return [dict(zip(fields, row, strict=False)) for row in rows] or f"nvidia-smi: {done.stderr.strip()}"


def _torch_facts(torch: Any) -> dict[str, Any]:
    facts = {"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
    if facts["available"]:
        device = torch.cuda.get_device_properties(0)
        facts |= {
            "device": device.name,
            "memory_gb": round(device.total_memory / 1e9, 2),
            "multiprocessors": device.multi_processor_count,
            "capability": f"{device.major}.{device.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _copy_speed(torch: Any) -> float:
    """10^9 bytes a second that the device reads and writes in a large copy, the best of five."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = max(best, 2 * COPIED / (time.perf_counter() - start) / 1e9)
    return best


def _loaded_libraries() -> list[str]:
    """The files of CUDA and cuDNN that this process has loaded."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if any(word in path for word in ("libcuda", "libcublas", "libcudnn.")))
