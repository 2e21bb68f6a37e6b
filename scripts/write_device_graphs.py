"""Writes runtime/engine/device_graphs: what the runtime does on a device beside an artifact's graph. It runs without
the onnx package, so the graphs are files of it.

    python scripts/write_device_graphs.py [--check]

With --check nothing is written, and the exit code is 1 if a file is not what this script writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnx
from onnx import ModelProto

FOLDER = Path(__file__).resolve().parents[1] / "runtime" / "engine" / "device_graphs"
OPSET, IR_VERSION = 20, 10
"""What onnxruntime 1.20 reads."""

GRAPHS = {
    # Rows of a buffer, cut to their first `used` tokens and followed by `room` of zeros. Eight bytes are an int64 here,
    # whatever type they really have.
    "copy_rows": """
        (int64[R, H, C, W] buffer, int64[K] rows, int64[1] used, int64[4] room) => (int64[K, H, D, W] copied)
        {
            first = Constant<value_ints = [0]> ()
            tokens = Constant<value_ints = [2]> ()
            cut = Slice(buffer, first, used, tokens)
            chosen = Gather<axis = 0>(cut, rows)
            zeros = ConstantOfShape<value = int64[1] {0}>(room)
            copied = Concat<axis = 2>(chosen, zeros)
        }""",
    "join_rows": """
        (int64[P, H, C, W] first, int64[Q, H, C, W] second, int64[K] rows) => (int64[K, H, C, W] joined)
        {
            both = Concat<axis = 0>(first, second)
            joined = Gather<axis = 0>(both, rows)
        }""",
    # The logarithm of a probability is finite only if the logits are numbers, and all of them go into it, whatever an
    # operator takes for the largest of numbers and "not a number".
    "likeliest": """
        (float[N, V] logits) => (int64[N, 1] ids, float[N, 1] values, float[N, 1] logarithm)
        {
            ids = ArgMax<axis = -1, keepdims = 1>(logits)
            values = GatherElements<axis = -1>(logits, ids)
            logarithms = LogSoftmax<axis = -1>(logits)
            logarithm = GatherElements<axis = -1>(logarithms, ids)
        }""",
    "top": """
        (float[N, V] logits, int64[1] k) => (int64[N, K] ids, float[N, K] values, float[N, 1] logarithm)
        {
            values, ids = TopK<axis = -1, largest = 1, sorted = 1>(logits, k)
            likeliest = ArgMax<axis = -1, keepdims = 1>(logits)
            logarithms = LogSoftmax<axis = -1>(logits)
            logarithm = GatherElements<axis = -1>(logarithms, likeliest)
        }""",
    # ReduceLogSumExp needs cuDNN on CUDA. The difference is taken where the logit is largest, and loses least.
    "log_normalizer": """
        (float[N, V] logits) => (float[N, 1] values)
        {
            ids = ArgMax<axis = -1, keepdims = 1>(logits)
            largest = GatherElements<axis = -1>(logits, ids)
            logarithms = LogSoftmax<axis = -1>(logits)
            logarithm = GatherElements<axis = -1>(logarithms, ids)
            values = Sub(largest, logarithm)
        }""",
    "of_tokens": """
        (float[N, V] logits, int64[N, 1] ids) => (float[N, 1] values)
        {
            values = GatherElements<axis = -1>(logits, ids)
        }""",
}


def made(name: str) -> bytes:
    """The file of a graph."""
    header = f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}], producer_name: "imsm-runtime">'
    model: ModelProto = onnx.parser.parse_model(f"{header}\n{name} {GRAPHS[name].strip()}")
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the files are up to date")
    check = parser.parse_args().check
    files = {FOLDER / f"{name}.onnx": made(name) for name in GRAPHS}
    stale = [path for path, content in files.items() if not path.is_file() or path.read_bytes() != content]
    stale += sorted(set(FOLDER.glob("*")) - set(files))
    if check:
        for path in stale:
            print(f"{path} is not what {Path(__file__).name} writes; run it", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
