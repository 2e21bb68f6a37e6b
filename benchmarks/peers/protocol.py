"""What every runner speaks: one JSON document a line, commands on stdin and answers on stdout.

    {"cmd": "prefill", "mode": M, "tokens": 128}                  -> {"ms": [time to the first token]}
    {"cmd": "decode", "mode": M, "context": 128, "steps": 16}     -> {"ms": [each step]}
    {"cmd": "generate", "mode": M, "tokens": 128, "steps": 64}    -> {"ms": [first token, each step], "peak_mb": ...}
    {"cmd": "tokens", "mode": M, "prompt": [...], "steps": 8}     -> {"tokens": [...]}

The first line that a runner writes says that it has loaded: {"load_ms", "imports_ms", "versions"}. Standard library
only: each runner imports this in its own environment. A runner that waits costs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

Step = Callable[[], int]
"""Feed the token that was chosen last and return the next one, greedily."""
Begin = Callable[[list[int]], Step]
"""Read a prompt in a new state and choose the first token."""
Load = Callable[[argparse.Namespace], tuple[Mapping[str, Begin], int]]
"""Load the model; returns what each mode does, and the vocabulary's size."""
DRIFT = 8
"""A state serves decode blocks until it has grown by an eighth of the context that they ask for."""


def main(imports: Callable[[], Mapping[str, str]], load: Load) -> None:
    """Import, load, and answer until stdin ends. imports: import what `load` needs, return the versions."""
    args = arguments()
    answers = claim_stdout()
    start = time.perf_counter()
    versions = dict(imports())
    imported = time.perf_counter()
    modes, vocabulary = load(args)
    ready = {"imports_ms": _ms(start, imported), "load_ms": _ms(imported, time.perf_counter()), "versions": versions}
    print(json.dumps(ready), file=answers, flush=True)
    runner = Runner(modes, vocabulary)
    for line in sys.stdin:
        print(json.dumps(runner.answer(json.loads(line))), file=answers, flush=True)


def arguments() -> argparse.Namespace:
    """What a runner is told when it starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="the longest text of this process")
    parser.add_argument("--modes", nargs="+", required=True)
    return parser.parse_args()


class Runner:
    """The states of one loaded model between commands."""

    def __init__(self, modes: Mapping[str, Begin], vocabulary: int) -> None:
        self.modes = modes
        self.vocabulary = vocabulary
        self.random = random.Random(0)
        self.running: dict[tuple[str, int], tuple[Step, int]] = {}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        begin = self.modes[command["mode"]]
        match command["cmd"]:
            case "prefill":
                return {"ms": self._prefill(begin, command["tokens"])[:1]}
            case "decode":
                return {"ms": self._decode(command["mode"], command["context"], command["steps"])}
            case "generate":
                first, step = self._prefill(begin, command["tokens"])
                return {"ms": [first, *_timed(step, command["steps"] - 1)], "peak_mb": peak_mb()}
            case "tokens":
                step = begin(command["prompt"])
                return {"tokens": [step() for _ in range(command["steps"])]}
        raise ValueError(f"unknown command {command}")

    def _prefill(self, begin: Begin, tokens: int) -> tuple[float, Step]:
        prompt = [self.random.randrange(2, self.vocabulary) for _ in range(tokens)]
        start = time.perf_counter()
        step = begin(prompt)
        return _ms(start, time.perf_counter()), step

    def _decode(self, mode: str, context: int, steps: int) -> list[float]:
        step, grown = self.running.pop((mode, context), (None, 0))
        if step is None or grown + steps > max(steps, context // DRIFT):
            del step  # its memory, before the next one's
            step, grown = self._prefill(self.modes[mode], context)[1], 0
        times = _timed(step, steps)
        self.running[mode, context] = step, grown + steps
        return times


def peak_mb() -> float:
    """The largest resident memory of this process so far, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10


def _timed(step: Step, steps: int) -> list[float]:
    times = [time.perf_counter()]
    for _ in range(steps):
        step()
        times.append(time.perf_counter())
    return [_ms(start, end) for start, end in pairwise(times)]


def _ms(start: float, end: float) -> float:
    return round((end - start) * 1e3, 4)


def claim_stdout() -> Any:
    """The real stdout, for answers only: whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
