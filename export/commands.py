"""The `export` command, and the part of `verify` that needs PyTorch."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imsm_core.console import HelpFormatter, run_commands

from .errors import ExportError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line `imsm-export`."""
    return run_commands("imsm-export", "Export siamese language models (IMSM) to ONNX.", register, argv)


def register(subparsers: Any) -> None:
    """Add `export` to a command line. Heavy imports happen when it runs."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint as one ONNX graph that runs without PyTorch",
        description="Write a checkpoint, or a PEFT adapter and a gate from elsewhere (--adapter), as one ONNX graph.",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CKPT", help="a checkpoint folder, as `train` writes it")
    add("artifact", type=Path, metavar="ARTIFACT", help="the folder to write")
    add(
        "--precision",
        default="fp32",
        metavar="NAME",
        help="fp32, fp16, bf16, or int8 or int4 weights of the backbone (adapter and gate stay in floating point)",
    )
    add("--block-size", type=int, default=32, metavar="N", help="weights that share a scale in int8 and int4")
    add("--asymmetric", action="store_true", help="a zero point for every block in int8 and int4")
    add(
        "--activations",
        metavar="NAME",
        help="what int8 and int4 models compute in: fp32 (the default), or fp16 or bf16 for a GPU",
    )
    add("--calibrate", type=Path, metavar="FILE", help="quantize with GPTQ on these texts (JSONL), not by rounding")
    add(
        "--kv-cache",
        default="float",
        metavar="NAME",
        help="float, or int8: caches of a quarter of the size; --calibrate gives its scales texts",
    )
    add("--eval-data", type=Path, metavar="FILE", help="measure the quality against fp32 on held-out texts (JSONL)")
    add("--eval-texts", type=int, default=64, metavar="N", help="how many texts of --eval-data")
    add(
        "--max-perplexity-change",
        type=float,
        default=0.02,
        metavar="X",
        help="warn if the perplexity on --eval-data rises by more than this share",
    )
    add(
        "--portable",
        action="store_true",
        default=None,
        help="for onnxruntime 1.20 to 1.31 and providers other than cpu; fp16 and bf16 are always in this form",
    )
    add("--base", metavar="DIR_OR_HUB_ID", help="where the base model is, if not where the checkpoint says")
    add(
        "--adapter", type=Path, metavar="DIR", help="instead of CKPT: a PEFT adapter on --base, wherever it was trained"
    )
    add("--adapter-name", metavar="NAME", help="which of several adapters in --adapter")
    add(
        "--gate",
        metavar="KIND",
        help="with --adapter: mean_logits, which needs no training, or the kind of --gate-from; "
        "without it mean_logits, or query_aware with --gate-from",
    )
    add(
        "--gate-from",
        type=Path,
        metavar="PATH",
        help="with --adapter: a gate.safetensors, or the released code's linear_A.pth with linear_B.pth beside it, "
        "or the folder that holds them",
    )
    add("--context-length", type=int, metavar="N", help="a shorter context than the model's, for smaller tables")
    add("--base-only", action="store_true", help="export the base stream alone, to compare with")
    add(
        "--max-delta-mb",
        type=float,
        metavar="MB",
        help="refuse an adapter whose changes, stored as whole matrices, would take more than this",
    )
    add("--force", action="store_true", help="replace ARTIFACT if it exists")


def _export(args: argparse.Namespace) -> int:
    from .pipeline import ExportSettings, export_adapter, export_checkpoint

    settings = ExportSettings(
        precision=args.precision,
        activations=args.activations,
        block_size=args.block_size,
        symmetric=not args.asymmetric,
        calibrate=args.calibrate,
        kv_cache=args.kv_cache,
        eval_data=args.eval_data,
        eval_texts=args.eval_texts,
        max_perplexity_change=args.max_perplexity_change,
        portable=args.portable,
        context_length=args.context_length,
        base_only=args.base_only,
        max_delta_mb=args.max_delta_mb,
    )
    if args.adapter is not None:
        if args.checkpoint is not None:
            raise ExportError(f"give the checkpoint {args.checkpoint} or --adapter {args.adapter}, not both")
        if args.base is None:
            raise ExportError("--adapter needs --base, the model that it was trained on")
        gate = args.gate or ("mean_logits" if args.gate_from is None else "query_aware")
        manifest = export_adapter(
            args.adapter,
            args.base,
            args.artifact,
            gate,
            args.gate_from,
            args.adapter_name,
            settings,
            args.force,
            _to_stderr,
        )
    else:
        for option in ("adapter_name", "gate", "gate_from"):
            if getattr(args, option) is not None:
                raise ExportError(f"--{option.replace('_', '-')} goes with --adapter; a checkpoint has its own")
        if args.checkpoint is None:
            raise ExportError("give a checkpoint folder and ARTIFACT, or --adapter, --base and ARTIFACT")
        manifest = export_checkpoint(args.checkpoint, args.artifact, settings, args.base, args.force, _to_stderr)
    size = sum(file["bytes"] for file in manifest["files"].values())
    document = {"artifact": str(args.artifact), "bytes": size, "parity": manifest["parity"]}
    print(json.dumps(document | {"quality": manifest["quality"]}))
    return 0


def verify_against_checkpoint(artifact: Path, checkpoint: Path, base_model: str | None = None) -> dict[str, Any]:
    """Run the parity check of an existing artifact again; returns the new report. What was quantized is reported and
    not judged: the checkpoint has other weights. Raises as `export_checkpoint`."""
    from imsm_core.checkpoint import load_checkpoint

    from .pipeline import ExportSettings, report_parity
    from .verification.parity import verify_graph

    manifest = json.loads((artifact / "imsm_model.json").read_text(encoding="utf-8"))
    model, _ = load_checkpoint(checkpoint, base_model)
    quantized = manifest["quantization"] is not None or manifest["kv_cache"] == "int8"
    tolerance = math.inf if quantized else ExportSettings(manifest["precision"]).tolerance
    parity = verify_graph(artifact, model, tuple(manifest["streams"]), manifest["model"]["context_length"], tolerance)
    report_parity(parity, _to_stderr)
    return parity.as_dict()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
