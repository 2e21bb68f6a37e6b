"""The price of the second stream: a siamese model against the base model alone, exported by the same code.

    python benchmarks/second_stream.py [--shape qwen2.5-0.5b] [--rounds 3] [--threads 2]

Weights are random: only time and memory mean anything. The two artifacts run in turns, each in a process of its own,
through the runtime's public benchmark; medians over the rounds and their ratio are printed, and the last line of
stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import GATE, GATE_RANK, SHAPES, random_base, random_siamese, small_tokenizer
from runtime.bench.compare import BenchSettings, bench
from runtime.machine import describe_machine

COMPARED = ("ms_per_token", "ttft_ms", "peak_rss_mb", "cache_bytes", "load_ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b", help="shape of the random model")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on every projection")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt length")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=2, help="threads of onnxruntime")
    parser.add_argument("--keep", type=Path, help="a folder for the two artifacts; those that are there are reused")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        artifacts = {name: folder / f"{args.shape}-{name}" for name in ("base", "siamese")}
        if not all(artifact.is_dir() for artifact in artifacts.values()):
            export_pair(SHAPES[args.shape], args.rank, artifacts, Path(scratch))
        settings = BenchSettings((args.prompt_tokens,), new_tokens=args.new_tokens, repeats=1, threads=args.threads)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in artifacts}
        for number in range(args.rounds):
            for name, artifact in artifacts.items():
                runs[name].append(bench(artifact, ["cpu"], settings)["results"][0])
                print(f"round {number + 1}: {name:8} {runs[name][-1]['ms_per_token']:.2f} ms/token", file=sys.stderr)
        bytes_read = {name: (artifact / "model.onnx.data").stat().st_size for name, artifact in artifacts.items()}
    report(args, runs, bytes_read)
    return 0


def export_pair(shape: dict[str, Any], rank: int, artifacts: dict[str, Path], scratch: Path) -> None:
    """Export one random model twice: with both streams, and its base stream alone."""
    from export.pipeline import export_model
    from export.settings import ExportSettings
    from imsm_core.checkpoint import CheckpointInfo

    model, tokenizer = random_siamese(random_base(shape), rank), small_tokenizer()
    info = CheckpointInfo("random", None, "random", GATE, GATE_RANK, "LORA")
    for name, artifact in artifacts.items():
        settings = ExportSettings(base_only=name == "base")
        export_model(model, tokenizer, info, artifact, settings, force=True, report=lambda line: None)
        print(f"exported {artifact}", file=sys.stderr)


def report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], bytes_read: dict[str, int]) -> None:
    """A table of medians and ratios, then the JSON document."""
    medians = {
        name: {key: float(np.median([result[key] for result in results])) for key in COMPARED}
        for name, results in runs.items()
    }
    ratios = {key: medians["siamese"][key] / medians["base"][key] for key in COMPARED}
    print(
        f"{args.shape}, fp32, {args.threads} threads, {args.rounds} alternating rounds, prompt {args.prompt_tokens}\n"
    )
    print(f"{'':14} {'base alone':>12} {'siamese':>12} {'ratio':>7}")
    for key in COMPARED:
        print(f"{key:14} {medians['base'][key]:12.2f} {medians['siamese'][key]:12.2f} {ratios[key]:7.3f}")
    rates = {name: bytes_read[name] / medians[name]["ms_per_token"] / 1e6 for name in runs}
    print(f"{'weights, GB/s':14} {rates['base']:12.2f} {rates['siamese']:12.2f}")
    document = {"machine": describe_machine(), "settings": vars(args) | {"keep": None}, "medians": medians}
    print(json.dumps(document | {"ratios": ratios, "weight_gb_per_s": rates, "runs": runs}))


if __name__ == "__main__":
    sys.exit(main())
