"""Measuring an artifact: time to first token, time per token, memory; one process per provider.

Token ids are random and generation does not stop at an end token, so that every run does the same work.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .errors import IMSMRuntimeError, SettingsError
from .machine import describe_machine, peak_rss_mb
from .manifest import read_manifest
from .session import Session


@dataclass(frozen=True)
class BenchSettings:
    """repeats: runs per prompt length, of which the medians are taken, after one that is not counted."""

    prompt_lengths: tuple[int, ...] = (32, 128)
    new_tokens: int = 64
    batch: int = 1
    repeats: int = 3
    threads: int | None = None
    spin: bool = True
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_lengths or min(self.prompt_lengths) < 1:
            raise SettingsError("prompt lengths must be at least 1")
        for name in ("new_tokens", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class BenchResult:
    """One provider and prompt length. Milliseconds; tokens_per_s counts every row; peak_rss_mb is of the process so
    far (prompt lengths run in ascending order); providers: those really in use."""

    provider: str
    providers: list[str]
    prompt_tokens: int
    new_tokens: int
    batch: int
    load_ms: float
    ttft_ms: float
    ms_per_token: float
    ms_per_token_p95: float
    tokens_per_s: float
    peak_rss_mb: float
    cache_bytes: int


def bench(folder: Path, providers: Sequence[str], settings: BenchSettings) -> dict[str, Any]:
    """Measure every provider in a process of its own; returns the document that `bench` prints.

    Raises IMSMRuntimeError with a provider's own message if it cannot run.
    """
    manifest = read_manifest(folder)
    longest = max(settings.prompt_lengths) + settings.new_tokens
    if longest > manifest.context_length:
        raise SettingsError(
            f"{longest} tokens of prompt and answer are more than the context of {manifest.context_length}"
        )
    results: list[BenchResult] = []
    for provider in providers:
        results.extend(_in_own_process(folder, provider, settings))
    size = sum(entry.bytes for entry in manifest.files.values())
    return {
        "machine": {**describe_machine(), "onnxruntime": onnxruntime.__version__},
        "artifact": {
            "folder": str(folder),
            "architecture": manifest.architecture,
            "precision": manifest.precision,
            "streams": list(manifest.streams),
            "gate": manifest.gate_kind,
            "bytes": size,
        },
        "settings": asdict(settings),
        "results": [asdict(result) for result in results],
    }


def format_table(document: dict[str, Any]) -> str:
    """The results as an aligned table."""
    columns = ("provider", "prompt", "new", "batch", "TTFT ms", "ms/token", "p95", "tokens/s", "peak MB", "cache KB")
    rows = [columns]
    for result in document["results"]:
        rows.append(
            (
                result["provider"],
                str(result["prompt_tokens"]),
                str(result["new_tokens"]),
                str(result["batch"]),
                f"{result['ttft_ms']:.1f}",
                f"{result['ms_per_token']:.2f}",
                f"{result['ms_per_token_p95']:.2f}",
                f"{result['tokens_per_s']:.1f}",
                f"{result['peak_rss_mb']:.0f}",
                f"{result['cache_bytes'] / 1024:.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    in_use = {result["provider"]: ", ".join(result["providers"]) for result in document["results"]}
    return "\n".join([*lines, *(f"{provider}: in use {names}" for provider, names in in_use.items())])


def measure(session: Session, provider: str, settings: BenchSettings, load_ms: float) -> list[BenchResult]:
    """Every prompt length on a loaded session, in ascending order."""
    generator = np.random.default_rng(0)
    found = []
    for length in sorted(settings.prompt_lengths):
        ttft: list[float] = []
        steps: list[float] = []
        cache_bytes = 0
        for repeat in range(settings.repeats + 1):
            prompts = generator.integers(0, session.manifest.vocab_size, (settings.batch, length)).tolist()
            first, rest, cache_bytes = _run(session, prompts, settings.new_tokens)
            if repeat:  # the first run pays for memory and threads
                ttft.append(first)
                steps.extend(rest)
        median = float(np.median(steps)) if steps else float("nan")
        found.append(
            BenchResult(
                provider=provider,
                providers=session.providers,
                prompt_tokens=length,
                new_tokens=settings.new_tokens,
                batch=settings.batch,
                load_ms=round(load_ms, 1),
                ttft_ms=round(float(np.median(ttft)), 3),
                ms_per_token=round(median, 3),
                ms_per_token_p95=round(float(np.percentile(steps, 95)), 3) if steps else float("nan"),
                tokens_per_s=round(settings.batch * 1e3 / median, 2),
                peak_rss_mb=round(peak_rss_mb(), 1),
                cache_bytes=cache_bytes,
            )
        )
    return found


def _run(session: Session, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[float], int]:
    """(ms to the first token, ms of each later one, bytes of the caches) of greedy decoding."""
    state = session.new_state(len(prompts))
    times = [time.perf_counter()]
    tokens = session.prefill(state, prompts).logits.argmax(-1)
    times.append(time.perf_counter())
    for _ in range(new_tokens - 1):
        tokens = session.decode_step(state, tokens).logits.argmax(-1)
        times.append(time.perf_counter())
    steps = [float(step) for step in np.diff(times) * 1e3]
    return steps[0], steps[1:], state.cache_bytes


def _in_own_process(folder: Path, provider: str, settings: BenchSettings) -> list[BenchResult]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(sender, folder, provider, settings))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError as error:
        process.join()
        raise IMSMRuntimeError(f"the benchmark of {provider!r} died with exit code {process.exitcode}") from error
    process.join()
    if isinstance(outcome, Exception):
        raise outcome
    results: list[BenchResult] = outcome
    return results


def _worker(sender: Any, folder: Path, provider: str, settings: BenchSettings) -> None:
    try:
        start = time.perf_counter()
        session = Session(folder, provider, settings.threads, settings.spin, settings.allow_fallback)
        load_ms = (time.perf_counter() - start) * 1e3
        sender.send(measure(session, provider, settings, load_ms))
    except IMSMRuntimeError as error:
        sender.send(error)
