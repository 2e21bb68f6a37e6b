"""The `export` command, and the part of `verify` that needs PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from imsm_core.errors import SettingsError, setting

from .errors import ExportError
from .settings import ExportSettings

NEEDS = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "optimum", "onnxruntime")
EXTRA = "export"


def register(commands: Any) -> None:
    """Add `export` to a command line, whose runner passes `commands`. Heavy imports happen when it runs."""
    commands.provide("check_parity", _check_parity, needs=NEEDS, extra=EXTRA)
    text = "write a checkpoint, or with --adapter any PEFT adapter, as one ONNX graph that runs without PyTorch"
    parser = commands.add("export", partial(_export, commands), text, needs=NEEDS, extra=EXTRA)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", metavar="CKPT", help="a checkpoint folder, as `train` writes it")
    add("artifact", type=Path, metavar="ARTIFACT", help="the folder to write")
    add("--force", action="store_true", help="replace ARTIFACT if it exists")
    add(
        "--base",
        metavar="DIR_OR_HUB_ID",
        help="where the base model (or GGUF file) is, if not where the checkpoint says",
    )
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
    commands.add_options(parser, ExportSettings)


def _export(commands: Any, args: argparse.Namespace) -> int:
    settings = commands.read_options(ExportSettings, args)
    _check_source(args)
    with commands.loading():
        from .pipeline import export_adapter, export_checkpoint  # after the checks: a mistake is reported at once

    if args.adapter is None:
        manifest = export_checkpoint(args.checkpoint, args.artifact, settings, args.base, args.force, _to_stderr)
    else:
        manifest = export_adapter(
            args.adapter,
            args.base,
            args.artifact,
            args.gate or ("mean_logits" if args.gate_from is None else "query_aware"),
            args.gate_from,
            args.adapter_name,
            settings,
            args.force,
            _to_stderr,
        )
    size = sum(file["bytes"] for file in manifest["files"].values())
    document = {"artifact": str(args.artifact), "bytes": size, "parity": manifest["parity"]}
    print(json.dumps(document | {"quality": manifest["quality"]}))
    return 0


def _check_source(args: argparse.Namespace) -> None:
    """Raise SettingsError or ExportError unless it is either a checkpoint or an adapter with its base model."""
    if args.adapter is None:
        for name in ("adapter_name", "gate", "gate_from"):
            if getattr(args, name) is not None:
                raise SettingsError(name, getattr(args, name), "it needs {adapter}; a checkpoint has its own")
        if args.checkpoint is None:
            others = f"{setting('adapter')}, {setting('base')} and ARTIFACT"
            raise ExportError(f"give a checkpoint folder and ARTIFACT, or {others}")
    elif args.checkpoint is not None:
        raise SettingsError("adapter", args.adapter, f"give it or the checkpoint {args.checkpoint}, not both")
    elif args.base is None:
        raise SettingsError("adapter", args.adapter, "it needs {base}, the model that it was trained on")


def _check_parity(
    artifact: Path, checkpoint: Path, base_model: str | None = None, provider: str = "cpu"
) -> dict[str, Any]:
    """The new parity report, as in the manifest."""
    from .report import report_parity
    from .verification.against_checkpoint import verify_against_checkpoint

    parity = verify_against_checkpoint(artifact, checkpoint, base_model, provider)
    report_parity(parity, _to_stderr)
    return parity.as_dict()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
