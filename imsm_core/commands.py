"""The `train` command."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from .training.settings import TrainSettings, TuneSettings


def register(commands: Any) -> None:
    """Add `train` to a command line, whose runner hands in `commands`. Heavy imports happen when it runs."""
    parser = commands.add(
        "train",
        partial(_train, commands),
        "tune an adapter and a gate on a base model",
        needs=("torch", "transformers", "peft", "safetensors", "filelock", "tqdm"),
        extra="train",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="the base model: a folder, a GGUF file or a hub id")
    add("--revision", metavar="REV", help="the hub revision of the base model")
    add(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="training data: JSON objects, one a line or in an array",
    )
    add("--out", required=True, type=Path, metavar="CKPT", help="the checkpoint folder to write")
    add("--force", action="store_true", help="replace CKPT, and discard an interrupted run of it")
    add("--resume", action="store_true", help="continue an interrupted run of the same command")
    add("--no-progress", action="store_true", help="no progress bar")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, or auto: cuda if it is there")
    commands.add_options(parser, TuneSettings)
    commands.add_options(parser, TrainSettings)


def _train(commands: Any, args: argparse.Namespace) -> int:
    settings, training = commands.read_options(TuneSettings, args), commands.read_options(TrainSettings, args)
    with commands.loading():
        from .training.tuning import tune  # after the settings, so that a mistake in them is told at once

    metrics = tune(
        args.model,
        args.data,
        args.out,
        settings,
        training,
        revision=args.revision,
        device=args.device,
        resume=args.resume,
        force=args.force,
        progress=not args.no_progress,
    )
    print(json.dumps({"checkpoint": str(args.out), **metrics}))
    return 0
