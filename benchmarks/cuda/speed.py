"""Measuring artifacts beside each other in one process: decode steps in turns, the first token, the host's share."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cuda.document import Document, Plan
from runtime import Session
from runtime.bench.measure import RunTimer, cache_bytes_read
from runtime.engine.execution import Execution
from runtime.engine.state import DecodeState

WARM_UP, BLOCK, FIRST_TOKENS = 8, 16, 3


@dataclass
class _Subject:
    """One artifact while it is measured. Times in ms."""

    session: Session
    generator: np.random.Generator
    state: DecodeState | None = None
    tokens: NDArray[np.int64] | None = None
    first: list[float] = field(default_factory=list)
    blocks: list[list[tuple[float, float]]] = field(default_factory=list)
    """Of every step: all of it, and inside onnxruntime."""

    def __post_init__(self) -> None:
        self.timer = RunTimer(self.session)

    def read(self, batch: int, context: int) -> None:
        """Prompts into a new state; the first token's time is noted."""
        vocabulary = self.session.manifest.vocab_size
        prompts = self.generator.integers(0, vocabulary, (batch, context)).tolist()
        start = time.perf_counter()
        self.state = self.session.new_state(batch)
        self.tokens = self.session.prefill_likeliest(self.state, prompts).ids[:, 0]
        self.first.append(1e3 * (time.perf_counter() - start))

    def decode(self, steps: int) -> list[tuple[float, float]]:
        """Greedy steps."""
        assert self.state is not None
        assert self.tokens is not None
        found = []
        for _ in range(steps):
            inside, start = self.timer.seconds, time.perf_counter()
            self.tokens = self.session.decode_likeliest(self.state, self.tokens).ids[:, 0]
            found.append((1e3 * (time.perf_counter() - start), 1e3 * (self.timer.seconds - inside)))
        return found


def open_all(folders: Mapping[str, Path], plan: Plan, cuda_graph: bool) -> dict[str, Session]:
    """A session of each artifact."""
    execution = Execution(provider=plan.provider, cuda_graph=cuda_graph)
    return {name: Session(folder, execution) for name, folder in folders.items()}


def measure(
    sessions: Mapping[str, Session], batches: Sequence[int], contexts: Sequence[int], steps: int, plan: Plan
) -> list[dict[str, Any]]:
    """An entry for each session, batch and context; the sessions take turns in blocks of 16 steps. ratio: of the block
    medians to those of the last session, the median over the blocks."""
    found = []
    for context in contexts:
        for batch in batches:
            subjects = {name: _Subject(session, np.random.default_rng(0)) for name, session in sessions.items()}
            for subject in subjects.values():
                for _ in range(1 + FIRST_TOKENS):  # the first one pays for memory
                    subject.read(batch, context)
                subject.decode(WARM_UP)
            for _ in range(max(1, steps // BLOCK)):
                for subject in subjects.values():
                    subject.blocks.append(subject.decode(min(BLOCK, steps)))
            last = list(subjects.values())[-1]
            for name, subject in subjects.items():
                found.append({"name": name, "batch": batch, "context": context} | _summary(subject, last))
            for session in sessions.values():
                session.on_run = None
            del subjects, last, subject
            gc.collect()
    return found


def _summary(subject: _Subject, last: _Subject) -> dict[str, Any]:
    assert subject.state is not None
    steps = np.array([step for block in subject.blocks for step in block])
    whole, inside = steps[:, 0], steps[:, 1]
    manifest = subject.session.manifest
    batch = subject.state.batch
    length = float(subject.state.lengths.mean())
    weights = manifest.reads.bytes_per_step(batch, len(manifest.streams))
    caches = cache_bytes_read(subject.state, length)
    ratios = [
        np.median([step[0] for step in own]) / np.median([step[0] for step in other])
        for own, other in zip(subject.blocks, last.blocks, strict=True)
    ]
    median = float(np.median(whole))
    return {
        "cuda_graph": subject.session.cuda_graph,
        "steps": len(whole),
        "ms": round(median, 4),
        "ms_p95": round(float(np.percentile(whole, 95)), 4),
        "inside_ms": round(float(np.median(inside)), 4),
        "host_share": round(float(np.median(1 - inside / whole)), 4),
        "ratio": round(float(np.median(ratios)), 4),
        "first_ms": round(float(np.median(subject.first[1:])), 3),
        "weight_bytes": round(weights),
        "cache_bytes": caches,
        "gb_per_s": round((weights + caches) / median / 1e6, 1),
    }


def memory_used_mb() -> float | None:
    """Memory of the device that is in use, by all processes, in MiB; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**20, 1)


def measure_group(
    title: str,
    folders: Mapping[str, Path],
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    plan: Plan,
    document: Document,
    seconds: float = 0.0,
) -> None:
    """Measure artifacts side by side, with and without a CUDA graph where there are any; the last one is what the
    others are compared with. seconds: what it takes about; it is left out where less is left, and noted as such."""
    graphs = (True, False) if plan.provider == "cuda" else (False,)
    for graph in graphs:
        if plan.left < seconds:
            document.add("left_out", {"title": title, "cuda_graph": graph, "seconds_left": round(plan.left, 1)})
            continue
        before, start = memory_used_mb(), time.perf_counter()
        entry: dict[str, Any] = {"title": title, "cuda_graph": graph}
        try:
            sessions = open_all(folders, plan, graph)
            entry["load_s"] = round(time.perf_counter() - start, 2)
            entry["memory_mb"] = [before, memory_used_mb()]
            entry["results"] = measure(sessions, batches, contexts, steps, plan)
            entry["memory_mb"].append(memory_used_mb())
            del sessions
        except Exception as error:  # one that does not run must not hide the others
            entry["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
        entry["load_average"] = round(os.getloadavg()[0], 2)  # models are made beside the measurements
        entry["seconds"] = round(time.perf_counter() - start, 1)
        document.add("groups", entry)
