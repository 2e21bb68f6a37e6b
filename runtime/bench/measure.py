"""Measuring one loaded session: time to first token, time per token and where it goes, memory.

Token ids are random and generation does not stop at an end token, so that every run does the same work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..engine.session import Session
from ..engine.state import DecodeState
from ..machine import peak_rss_mb
from .settings import BenchSettings


@dataclass(frozen=True)
class BenchResult:
    """One provider and prompt length. Milliseconds; None where no token follows the first.

    providers: those in use. tokens_per_s counts every row. overhead_percent: share of a decode step's time spent
    outside onnxruntime, choosing the token included; None where there are no steps.
    weight_bytes_read, cache_bytes_read: what a decode step must read, the caches at half of the new tokens; gb_per_s:
    both, divided by the time. peak_rss_mb covers the process so far (prompt lengths run in ascending order).
    """

    provider: str
    providers: list[str]
    prompt_tokens: int
    new_tokens: int
    batch: int
    load_ms: float
    ttft_ms: float
    ms_per_token: float | None
    ms_per_token_p95: float | None
    tokens_per_s: float | None
    overhead_percent: float | None
    weight_bytes_read: int
    cache_bytes_read: int
    gb_per_s: float | None
    peak_rss_mb: float
    cache_bytes: int


class RunTimer:
    """Adds up the time that a session spends running its graph."""

    def __init__(self, session: Session) -> None:
        self.seconds = 0.0
        session.on_run = self._add

    def _add(self, seconds: float) -> None:
        self.seconds += seconds


class Run(NamedTuple):
    """Milliseconds to the first token, of each later one, and of each later one inside onnxruntime; the tokens (B, new
    tokens); the state at the end."""

    ttft_ms: float
    step_ms: list[float]
    inside_ms: list[float]
    tokens: list[list[int]]
    state: DecodeState


def measure(
    session: Session, settings: BenchSettings, load_ms: float
) -> tuple[list[BenchResult], list[list[list[int]]]]:
    """Every prompt length on a loaded session, in ascending order; and the tokens of the last run of each."""
    generator = np.random.default_rng(0)
    timer = RunTimer(session)
    weights = session.manifest.reads.bytes_per_step(settings.batch, len(session.manifest.streams))
    found, tokens = [], []
    for length in sorted(settings.prompt_lengths):
        runs = []
        for _ in range(settings.repeats + 1):  # the first run pays for memory and threads
            prompts = generator.integers(0, session.manifest.vocab_size, (settings.batch, length)).tolist()
            runs.append(_run(session, timer, prompts, settings.new_tokens))
        del runs[0]
        steps = np.array([run.step_ms for run in runs])
        inside = np.array([run.inside_ms for run in runs])
        caches = cache_bytes_read(runs[-1].state, length + settings.new_tokens / 2)
        median = float(np.median(steps)) if steps.size else None
        found.append(
            BenchResult(
                provider=session.execution.provider,
                providers=session.providers,
                prompt_tokens=length,
                new_tokens=settings.new_tokens,
                batch=settings.batch,
                load_ms=round(load_ms, 1),
                ttft_ms=round(float(np.median([run.ttft_ms for run in runs])), 3),
                ms_per_token=None if median is None else round(median, 3),
                ms_per_token_p95=None if median is None else round(float(np.percentile(steps, 95)), 3),
                tokens_per_s=None if median is None else round(settings.batch * 1e3 / median, 2),
                overhead_percent=round(float(np.median(100 - 100 * inside / steps)), 2) if inside.any() else None,
                weight_bytes_read=weights,
                cache_bytes_read=caches,
                gb_per_s=None if median is None else round((weights + caches) / median / 1e6, 3),
                peak_rss_mb=round(peak_rss_mb(), 1),
                cache_bytes=runs[-1].state.cache_bytes,
            )
        )
        tokens.append(runs[-1].tokens)
    return found, tokens


def _run(session: Session, timer: RunTimer, prompts: list[list[int]], new_tokens: int) -> Run:
    """Greedy decoding."""
    state = session.new_state(len(prompts))
    times = [time.perf_counter()]
    tokens = [session.prefill_likeliest(state, prompts).ids[:, 0]]
    times.append(time.perf_counter())
    inside = [timer.seconds]
    for _ in range(new_tokens - 1):
        tokens.append(session.decode_likeliest(state, tokens[-1]).ids[:, 0])
        times.append(time.perf_counter())
        inside.append(timer.seconds)
    first, *steps = (np.diff(times) * 1e3).tolist()
    return Run(first, steps, (np.diff(inside) * 1e3).tolist(), np.stack(tokens, 1).tolist(), state)


def cache_bytes_read(state: DecodeState, length: float) -> int:
    """Bytes of the keys and values of `length` tokens of text per row; attention windows are not subtracted."""
    caches = state.caches.values()
    return round(sum(cache.nbytes / cache.capacity * (length + cache.virtual_tokens) for cache in caches))
