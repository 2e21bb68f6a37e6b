"""Write graphs of many models in half precision, and say which of their nodes have no CUDA kernel.

    python -m benchmarks.cuda.zoo FOLDER [--precision bf16] [--architectures NAME ...] [--adapters NAME ...] ...
    LD_LIBRARY_PATH=REHEARSAL PYTHON_WITH_GPU -m benchmarks.cuda.placement --plain FOLDER/*/model.onnx > PLACES
    python -m benchmarks.cuda.zoo FOLDER --compare PLACES

Each model is traced once, and written in floating point and with int8 and int4 weights, unverified. A comparison says
where onnxruntime put something else on the CPU than `export/cuda_kernels.py` expects.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import onnx_ir as ir

from export.artifact import GRAPH, write_graph
from export.cuda_kernels import CudaKernels, cuda_kernels
from export.passes import finish_quantized, run_passes
from export.passes.quantization import Quantization
from export.prepare import prepare
from export.settings import ExportSettings
from export.trace import trace
from export.two_stream import TwoStreamStep
from imsm_core.backbone import load_tokenizer
from imsm_core.checkpoint import CheckpointInfo
from imsm_core.siamese import SiameseModel
from tests.adapters import make_siamese_with
from tests.zoo import ARCHITECTURES, make_zoo_base

WEIGHTS = {"float": None, "int8": 8, "int4": 4}


def graphs_of(
    model: SiameseModel, base: Path, settings: ExportSettings, folder: Path, weights: Sequence[str] = tuple(WEIGHTS)
) -> Iterator[tuple[str, ir.Model]]:
    """Trace a model once, and write it into `folder`/model.onnx with each kind of weights; yields (the kind, the graph
    as it was written) while the file is there. settings: without quantization."""
    info = CheckpointInfo(str(base), None, "", model.gate.kind, model.gate.rank, "")
    prepared = prepare(model, load_tokenizer(str(base)), info, settings, lambda line: None)
    gate = None if settings.base_only else model.gate
    with prepared.as_traced():
        step = TwoStreamStep(
            model.causal_lm, gate, prepared.plan, prepared.layout, prepared.virtual_tokens, prepared.kv_scales
        )
        traced = trace(step.eval()).model
        for kind in weights:
            bits = WEIGHTS[kind]
            graph = traced.clone()
            run_passes(graph, None if bits is None else Quantization(bits, 32, True, {}, experts=False))
            if bits is not None:
                finish_quantized(graph, own_operators=False)
            write_graph(graph, folder)
            yield kind, ir.load(folder / GRAPH)


def _write(options: argparse.Namespace) -> None:
    for architecture, adapter, gate in product(options.architectures, options.adapters, options.gates):
        with tempfile.TemporaryDirectory() as temporary:
            try:
                base = make_zoo_base(Path(temporary) / "base", architecture)
                model = make_siamese_with(base, adapter, gate)
                settings = ExportSettings(
                    precision=options.precision, kv_cache=options.kv_cache, base_only=options.base_only
                )
                for kind, graph in graphs_of(model, base, settings, Path(temporary), options.weights):
                    kept = options.folder / f"{architecture}+{adapter}+{gate}+{kind}".replace(" ", "_").replace(",", "")
                    write_graph(graph, _empty(kept))
                    print(_verdict(kept.name, cuda_kernels(graph)), flush=True)
            except Exception as error:  # a model that fails must not end the run
                print(f"FAILED {architecture} {adapter} {gate}: {str(error).splitlines()[0]}", flush=True)


def _empty(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _verdict(name: str, found: CudaKernels) -> str:
    missing = ", ".join(f"{count} {operator}" for operator, count in found.missing.items())
    return f"{name}: {found.nodes} nodes, {found.shape_nodes} of sizes, without a kernel: {missing or 'none'}"


def _compare(folder: Path, places: Path) -> int:
    """Print where the list and onnxruntime disagree, and what cannot be captured; returns how many graphs that is."""
    count = 0
    for line in places.read_text(encoding="utf-8").splitlines():
        place: dict[str, Any] = json.loads(line)
        path = Path(place["path"])
        found = cuda_kernels(ir.load(path))
        expected, there = found.shape_nodes + sum(found.missing.values()), sum(place["cpu"].values())
        if expected != there or place["refused"]:
            count += 1
            print(f"{path.parent.name}: {expected} nodes on the CPU expected, {place['cpu']}; {place['refused']}")
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="CUDA kernels for the graphs of many models")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16"])
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--kv-cache", default="float", choices=["float", "int8"])
    parser.add_argument("--base-only", action="store_true")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), metavar="NAME")
    parser.add_argument("--adapters", nargs="+", default=["lora"], metavar="NAME")
    parser.add_argument("--gates", nargs="+", default=["query_aware"], metavar="KIND")
    parser.add_argument("--compare", type=Path, metavar="PLACES", help="what benchmarks.cuda.placement printed")
    options = parser.parse_args()
    if options.compare is None:
        _write(options)
    elif count := _compare(options.folder, options.compare):
        raise SystemExit(f"{count} graphs differ")


if __name__ == "__main__":
    main()
