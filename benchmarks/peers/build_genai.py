"""onnxruntime-genai's folder from the shared backbone: its own builder, with the options that matter.

Runs in onnxruntime-genai's environment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--block-size", type=int, required=True)
    parser.add_argument("--lora", action="store_true", help="keep the adapter as nodes of the graph")
    parser.add_argument("--prune-lm-head", action="store_true", help="logits of the last prompt position alone")
    parser.add_argument("--algorithm", help="how weights are rounded: rtn, rtn_last, k_quant, k_quant_mixed")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cuda-graph", action="store_true", help="decode steps can be captured")
    args = parser.parse_args()
    # The builder ignores `int4_block_size`; `block_size` is the option that it reads.
    options = [f"block_size={args.block_size}", "hf_token=false"]
    if args.provider == "cpu":
        options.append("int4_accuracy_level=4")
    if args.cuda_graph:
        options.append("enable_cuda_graph=true")
    if args.algorithm:
        options.append(f"algo_config={args.algorithm}")
    if args.lora:
        options.append(f"adapter_path={args.backbone / 'checkpoint' / 'adapter'}")
    if args.prune_lm_head:
        options.append("prune_lm_head=true")
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(args.backbone / "base")]
        builder += ["-o", str(args.out), "-p", args.precision, "-e", args.provider, "-c", cache]
        builder += ["--extra_options", *options]
        code = subprocess.run(builder).returncode
    sys.exit(code)  # the builder's last line says why


if __name__ == "__main__":
    main()
