"""The `train` command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from .console import HelpFormatter, run_commands

Settings = TypeVar("Settings")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line `imsm-train`."""
    return run_commands("imsm-train", "Tune siamese language models (IMSM).", register, argv)


def register(subparsers: Any) -> None:
    """Add `train` to a command line. Heavy imports happen when it runs."""
    parser = subparsers.add_parser(
        "train",
        help="tune an adapter and a gate on a base model",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_HUB_ID", help="the base model, a local folder or a hub id")
    add("--revision", metavar="REV", help="the hub revision of the base model")
    add("--data", required=True, type=Path, metavar="FILE", help="training data, one JSON object a line")
    add("--prompt-field", default="prompt", metavar="NAME", help="the field with the prompt")
    add("--answer-field", default="answer", metavar="NAME", help="the field with the answer")
    add("--raw", action="store_true", help="do not use the tokenizer's chat template")
    add("--out", required=True, type=Path, metavar="CKPT", help="the checkpoint folder to write")
    add("--force", action="store_true", help="replace CKPT, and discard an interrupted run of it")
    add("--resume", action="store_true", help="go on with an interrupted run of the same command")
    add(
        "--peft",
        metavar="NAME",
        help="the PEFT method: lora (the default), dora, adalora, ia3, rslora, vera, loha, lokr, oft, boft, hra, hira, "
        "delora, c3a, ln_tuning, fourierft, vblora, prefix_tuning, prompt_tuning, p_tuning, trainable_tokens",
    )
    add(
        "--peft-config",
        type=Path,
        metavar="FILE",
        help="any PEFT config, as PEFT writes it to adapter_config.json, instead of --peft and the options of the "
        "adapter below",
    )
    add("--adapter-rank", type=int, metavar="R", help="rank of the adapter; without it the method's own, 16 for lora")
    add(
        "--adapter-alpha",
        type=int,
        metavar="A",
        help="alpha of the adapter (scale = alpha / rank); without it the method's own, 16 for lora",
    )
    add(
        "--adapter-dropout",
        type=float,
        metavar="P",
        help="dropout of the adapter's input; without it the method's own, 0.1 for lora",
    )
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="the layers to adapt, by the end of their names; without it the method's own, for most methods all "
        "linear layers but the lm_head",
    )
    add("--virtual-tokens", type=int, metavar="N", help="virtual tokens of the methods that have them; 20 without it")
    add(
        "--token-indices", type=int, nargs="+", metavar="ID", help="the tokens whose embeddings trainable_tokens trains"
    )
    add("--gate", default="query_aware", metavar="KIND", help="query_aware, token, residual, query_mixed, mean_logits")
    add("--gate-rank", type=int, default=8, metavar="R", help="rank of the gate")
    add("--gate-dropout", type=float, default=0.1, metavar="P", help="dropout after each linear of the gate")
    add(
        "--quantized-backbone",
        metavar="NAME",
        help="int4 or int8: train against the frozen weights as an export with this --precision rounds them, so that "
        "the adapter learns to correct the error",
    )
    add("--block-size", type=int, metavar="N", help="with --quantized-backbone: weights that share a scale; 32")
    add(
        "--learning-rate",
        type=float,
        metavar="LR",
        help="of the adapter; without it the PEFT method's own, 3e-4 for lora",
    )
    add("--gate-learning-rate", type=float, default=1e-3, metavar="LR", help="of the gate")
    add("--weight-decay", type=float, default=0.01, metavar="W", help="AdamW weight decay")
    add("--warmup-ratio", type=float, default=0.1, metavar="F", help="share of the steps with a rising learning rate")
    add("--max-grad-norm", type=float, default=1.0, metavar="N", help="gradients are clipped to this norm")
    add("--epochs", type=float, default=3, metavar="N", help="passes over the data, when --steps is not given")
    add("--steps", type=int, metavar="N", help="optimizer steps")
    add("--batch-size", type=int, default=16, metavar="N", help="examples a forward pass")
    add("--gradient-accumulation", type=int, default=1, metavar="N", help="forward passes an optimizer step")
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="longer rows are skipped; without it the model's context, at most 1024",
    )
    add("--seed", type=int, default=2024, metavar="N", help="of the initial weights, the order and the dropout")
    add(
        "--save-every",
        type=int,
        default=200,
        metavar="N",
        help="steps between the snapshots that --resume goes on from",
    )
    add("--no-progress", action="store_true", help="no progress bar")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, or auto: cuda if it is there")


def _train(args: argparse.Namespace) -> int:
    from .training.loop import TrainSettings
    from .training.tuning import TuneSettings, tune

    metrics = tune(
        args.model,
        args.data,
        args.out,
        _pick(TuneSettings, args),
        _pick(TrainSettings, args),
        revision=args.revision,
        device=args.device,
        resume=args.resume,
        force=args.force,
        progress=not args.no_progress,
    )
    print(json.dumps({"checkpoint": str(args.out), **metrics}))
    return 0


def _pick(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """A settings dataclass from the options of the same names."""
    names = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(args, name) for name in names})
