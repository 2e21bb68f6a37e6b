"""Where the nodes of a decode step run: what onnxruntime's profiler recorded of one step.

A session may name a provider as in use and still run most of its nodes elsewhere.
"""

from __future__ import annotations

import errno
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.execution import Execution
from ..engine.providers import PROVIDERS
from ..engine.session import Session


@dataclass(frozen=True)
class Placement:
    """Nodes of one decode step. nodes_by_provider: as onnxruntime names them; fallback_ops: the operators that did not
    run on the requested provider, and how many of each. A provider that fuses nodes counts them as one."""

    nodes_by_provider: dict[str, int]
    fallback_ops: dict[str, int]

    @property
    def nodes_total(self) -> int:
        """All nodes that ran."""
        return sum(self.nodes_by_provider.values())

    @property
    def nodes_fallback(self) -> int:
        """Those that ran elsewhere."""
        return sum(self.fallback_ops.values())


def place_nodes(folder: Path, execution: Execution, prompts: list[list[int]]) -> Placement:
    """Open the artifact with the profiler on, and run a prefill and a decode step. Slow: never while timing. With
    another session of it open, its weights are in memory twice."""
    with tempfile.TemporaryDirectory() as profiles:
        session = Session(folder, execution, profile=Path(profiles) / "profile")
        state = session.new_state(len(prompts))
        session.prefill(state, prompts)
        session.decode_step(state, np.zeros(len(prompts), np.int64))
        path = Path(session.onnx.end_profiling())
        try:
            events = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except ValueError as error:
            text = "onnxruntime did not write its profile whole; is the disk full?"
            raise OSError(errno.ENOSPC, text, str(path)) from error
    return read_events(events, PROVIDERS[execution.provider])


def read_events(events: list[dict[str, Any]], wanted: str) -> Placement:
    """The nodes of the last run among the profiler's events."""
    last = max((event for event in events if event.get("name") == "model_run"), key=lambda event: int(event["ts"]))
    start, end = int(last["ts"]), int(last["ts"]) + int(last["dur"])
    nodes = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if start <= int(event["ts"]) <= end:
            facts = event["args"]
            nodes[event["name"], facts.get("node_index")] = (facts["provider"], facts["op_name"])
    places = Counter(place for place, _ in nodes.values())
    fallback = Counter(operator for place, operator in nodes.values() if place != wanted)
    return Placement(dict(places.most_common()), dict(fallback.most_common()))
