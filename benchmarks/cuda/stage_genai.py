"""Stage 4: onnxruntime-genai's single stream of the 0.5B shape, from its own builder, measured as our own steps are."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cuda.document import Document, Plan
from benchmarks.cuda.models import SIZES
from benchmarks.cuda.speed import FIRST_TOKENS, WARM_UP
from benchmarks.shapes import random_base, small_tokenizer

PRECISIONS = {"cuda": ("fp16", "int4"), "cpu": ("fp32", "int4")}
"""What its builder writes for an execution provider."""
BLOCK_SIZE = 32
BUILDER = Path(__file__).parents[1] / "peers" / "build_genai.py"


def run(plan: Plan, document: Document) -> None:
    """A group for each precision, with and without a CUDA graph; what cannot be built or run says why."""
    import torch  # noqa: F401  # its CUDA libraries are the ones that onnxruntime uses

    document.note("version", _installed())
    size = SIZES[plan.size]
    base = plan.work / "genai-backbone" / "base"
    if not base.is_dir():
        random_base(size.middle).half().save_pretrained(base)
        small_tokenizer().save_pretrained(base)
    for precision in PRECISIONS[plan.provider]:
        for graph in (True, False) if plan.provider == "cuda" else (False,):
            if not plan.wants(precision):
                continue
            entry: dict[str, Any] = {"title": precision, "cuda_graph": graph}
            start = time.perf_counter()
            try:
                folder = _built(base.parent, precision, graph, plan)
                entry["build_s"] = round(time.perf_counter() - start, 1)
                entry["results"] = _measure(folder, size.middle["vocab_size"], size.contexts, size.steps)
            except Exception as error:  # another precision may do
                entry["error"] = f"{type(error).__name__}: {error}"
            entry["seconds"] = round(time.perf_counter() - start, 1)
            document.add("groups", entry)
            gc.collect()


def _installed() -> str:
    for name in ("onnxruntime-genai-cuda", "onnxruntime-genai"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    raise RuntimeError("onnxruntime-genai is not installed; join its wheel among the parts")


def _built(backbone: Path, precision: str, graph: bool, plan: Plan) -> Path:
    """The builder's folder. Raises RuntimeError with the last line that it wrote."""
    folder = plan.work / f"genai-{precision}{'-graph' if graph else ''}"
    if folder.is_dir():
        return folder
    draft = folder.with_suffix(".draft")
    builder = [sys.executable, str(BUILDER), str(draft), "--backbone", str(backbone), "--precision", precision]
    builder += ["--block-size", str(BLOCK_SIZE), "--prune-lm-head", "--provider", plan.provider]
    builder += ["--cuda-graph"] if graph else []
    done = subprocess.run(builder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the builder failed: {lines[-1]}")
    draft.rename(folder)
    return folder


def _measure(folder: Path, vocabulary: int, contexts: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    generator = np.random.default_rng(0)
    found = []
    for context in contexts:
        longest = context + WARM_UP + steps + 1
        first, times = [], []
        running: Any = None
        for _ in range(1 + FIRST_TOKENS):
            del running
            prompt = generator.integers(2, vocabulary, context).tolist()
            params = og.GeneratorParams(model)
            # min_length: an end token must not end the run.
            params.set_search_options(max_length=longest, min_length=longest, do_sample=False)
            start = time.perf_counter()
            running = og.Generator(model, params)
            running.append_tokens(prompt)
            running.generate_next_token()
            first.append(1e3 * (time.perf_counter() - start))
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            running.generate_next_token()
            int(running.get_next_tokens()[0])
            times.append(1e3 * (time.perf_counter() - start))
        del running
        found.append(
            {
                "name": "onnxruntime-genai",
                "batch": 1,
                "context": context,
                "steps": steps,
                "ms": round(float(np.median(times[WARM_UP:])), 4),
                "ms_p95": round(float(np.percentile(times[WARM_UP:], 95)), 4),
                "first_ms": round(float(np.median(first[1:])), 3),
            }
        )
    return found
