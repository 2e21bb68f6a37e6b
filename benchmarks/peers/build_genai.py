"""onnxruntime-genai's folder from the shared backbone: its own builder, with the options that matter.

Runs in onnxruntime-genai's environment.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from_transformers = AutoConfig.from_pretrained


def read_config(*args: Any, **options: Any) -> Any:
    """Gemma 3's rotations as the builder of 0.18 reads them: as transformers named them before version 5."""
    config = from_transformers(*args, **options)
    rotations = getattr(config, "rope_parameters", None)
    if isinstance(rotations, dict) and "full_attention" in rotations:
        config.rope_local_base_freq = rotations["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(rotations["full_attention"])
    return config


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
        sys.argv = ["builder", "-i", str(args.backbone / "base"), "-o", str(args.out), "-p", args.precision]
        sys.argv += ["-e", args.provider, "-c", cache, "--extra_options", *options]
        AutoConfig.from_pretrained = read_config  # type: ignore[method-assign]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


if __name__ == "__main__":
    main()
