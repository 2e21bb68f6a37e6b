"""Where onnxruntime puts the nodes of graphs on a machine with CUDA, or with the rehearsal's libraries (rehearsal/).

    python -m benchmarks.cuda.placement [--plain] GRAPH.onnx ...

Prints one JSON object a graph: `path`, the nodes by operator for `cuda` and `cpu`, and why it cannot be opened with
CUDA graphs, `refused` (null: it can). A graph that cannot be opened at all has no nodes. With --plain, onnxruntime
changes nothing first, so that nodes are those of the file.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def place(graph: Path, plain: bool = False) -> dict[str, Any]:
    """Open a graph twice: to see where its nodes go, and with CUDA graphs asked for."""
    nodes: dict[str, Counter[str]] = {CUDA: Counter(), CPU: Counter()}
    refused = None
    try:
        for part in _open(graph, plain, capture=False).get_provider_graph_assignment_info():
            nodes[part.ep_name].update(node.op_type for node in part.get_nodes())
        _open(graph, plain, capture=True)
    except Exception as error:  # onnxruntime's own, of any kind
        refused = str(error).splitlines()[0]
    return {"path": str(graph), "cuda": dict(nodes[CUDA]), "cpu": dict(nodes[CPU]), "refused": refused}


def _open(graph: Path, plain: bool, capture: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = [(CUDA, {"enable_cuda_graph": str(int(capture))}), CPU]
    session = onnxruntime.InferenceSession(str(graph), options, providers=providers)
    if CUDA not in session.get_providers():
        raise SystemExit(f"onnxruntime {onnxruntime.__version__} has no CUDA provider that starts here")
    return session


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Where nodes run")
    parser.add_argument("graphs", nargs="+", type=Path, metavar="GRAPH.onnx")
    parser.add_argument("--plain", action="store_true", help="without onnxruntime's own changes of the graph")
    options = parser.parse_args()
    for graph in options.graphs:
        print(json.dumps(place(graph, options.plain)), flush=True)


if __name__ == "__main__":
    main()
