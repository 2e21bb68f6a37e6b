"""Decode time of every format, measured in turns as `benchmarks.peers` does."""

from __future__ import annotations

import sys
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.peers.catalogue import Peer
from benchmarks.peers.environments import python_of
from benchmarks.peers.measure import MeasureSettings, Ready, measure
from benchmarks.quality.catalogue import FORMATS, Format
from benchmarks.quality.models import Place

CONTEXT = 128
ENVIRONMENTS = {"ours": "own", "llama.cpp": "llama", "onnxruntime-genai": "genai"}
RUNNERS = {"ours": "runner_ours.py", "llama.cpp": "runner_llama.py", "onnxruntime-genai": "runner_genai.py"}


def decode_ms(place: Place, names: list[str], settings: MeasureSettings) -> dict[str, dict[str, Any]]:
    """name -> what decodes -> median ms a token at a context of 128. `base`: one stream without adapter; `adapter`: one
    stream with it; `fused`: both streams and the gate. A program that fails is left out. Raises Unavailable."""
    ready: dict[str, Ready] = {}
    for name in names:
        format = FORMATS[name]
        environment = ENVIRONMENTS[format.program]
        for what, mode, model in _rows(format, name):
            peer = Peer(f"{name} {what}", "", environment, RUNNERS[format.program], model, weight_bytes=0.0, mode=mode)
            folder = place.base_only(name) if model != name else place.model(name)
            ready[f"{name} {what}"] = Ready(peer, python_of(environment, place.work), folder)
    settings = replace(settings, contexts=(CONTEXT,), prompts=(CONTEXT,), fresh_runs=1, fresh_tokens=1)
    found: dict[str, dict[str, Any]] = {}
    if not ready:
        return found
    for key, measured in measure(ready, settings, next(iter(ready))).items():
        name, _, what = key.rpartition(" ")
        blocks = measured["decode"].get(str(CONTEXT), [])
        if blocks:
            found.setdefault(name, {})[what] = median(step for block in blocks for step in block)
        if "error" in measured:
            print(f"{key}: {measured['error']}", file=sys.stderr)
    return found


def _rows(format: Format, name: str) -> list[tuple[str, str, str]]:
    """What decodes, the runner's mode for it, and a name for its model."""
    if format.program == "ours":
        return [("base", "one", f"{name}, base alone"), ("fused", "one", name)]
    if format.program == "llama.cpp":
        return [("base", "one", name), ("adapter", "one-lora", name)]
    return [("base", "one", name)]
