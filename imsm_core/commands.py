"""The `train` command."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .console import HelpFormatter, run_commands


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
    add("--peft", default="lora", metavar="NAME", help="the PEFT method")
    add("--adapter-rank", type=int, default=16, metavar="R", help="rank of the adapter")
    add("--adapter-alpha", type=int, default=16, metavar="A", help="alpha of the adapter (scale = alpha / rank)")
    add("--adapter-dropout", type=float, default=0.1, metavar="P", help="dropout of the adapter's input")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="the linear layers to adapt, by the end of their names; without it all but the lm_head",
    )
    add("--gate", default="query_aware", metavar="KIND", help="query_aware, token, residual, query_mixed, mean_logits")
    add("--gate-rank", type=int, default=8, metavar="R", help="rank of the gate")
    add("--gate-dropout", type=float, default=0.1, metavar="P", help="dropout after each linear of the gate")
    add("--learning-rate", type=float, default=3e-4, metavar="LR", help="of the adapter")
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
    import torch

    from .adapters import attach_adapter, peft_config, peft_type
    from .backbone import fingerprint, hidden_size, load_base_model, load_tokenizer
    from .checkpoint import INFO, CheckpointInfo, save_checkpoint
    from .data import load_jsonl
    from .errors import OutputExistsError, SettingsError
    from .files import refuse_existing
    from .gates import check_gate_kind, make_gate
    from .siamese import SiameseModel
    from .snapshots import newest_snapshot, partial_folder
    from .train import TrainSettings, train

    # 1. Everything that can be refused is refused before the long work.
    settings = TrainSettings(
        learning_rate=args.learning_rate,
        gate_learning_rate=args.gate_learning_rate,
        weight_decay=args.weight_decay,
        warmup_ratio=args.warmup_ratio,
        max_grad_norm=args.max_grad_norm,
        epochs=args.epochs,
        steps=args.steps,
        batch_size=args.batch_size,
        gradient_accumulation=args.gradient_accumulation,
        gate_dropout=args.gate_dropout,
        seed=args.seed,
        save_every=args.save_every,
    )
    config = peft_config(args.peft, args.adapter_rank, args.adapter_alpha, args.adapter_dropout, args.target_modules)
    if args.max_length is not None and args.max_length < 2:
        raise SettingsError(f"max_length is {args.max_length}; it must be at least 2, a prompt's and an answer's token")
    check_gate_kind(args.gate)
    device = _device(args.device)
    out = args.out.resolve()
    refuse_existing(out, INFO, args.force)
    partial = partial_folder(out)
    if newest_snapshot(partial) is not None and not args.resume:
        if not args.force:
            raise OutputExistsError(f"{partial} holds an interrupted run; --resume goes on, --force discards it")
        shutil.rmtree(partial)

    # 2. Base model, data, adapter, gate.
    tokenizer = load_tokenizer(args.model, args.revision)
    base = load_base_model(args.model, args.revision)
    context = getattr(base.config, "max_position_embeddings", None) or 1024
    max_length = min(args.max_length or 1024, context)
    dataset = load_jsonl(args.data, tokenizer, args.prompt_field, args.answer_field, max_length, args.raw)
    if dataset.skipped:
        print(f"{dataset.skipped} rows are longer than {max_length} tokens and are skipped", file=sys.stderr)
    base_fingerprint = fingerprint(base)
    torch.manual_seed(args.seed)
    gate = make_gate(args.gate, hidden_size(base), args.gate_rank, args.gate_dropout)
    model = SiameseModel(attach_adapter(base, config), gate).to(device)

    # 3. Train and write.
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    origin = {
        "base_model": base_fingerprint,
        "prompt_field": args.prompt_field,
        "answer_field": args.answer_field,
        "raw": args.raw,
        "max_length": max_length,
        "peft": args.peft,
        "adapter_rank": args.adapter_rank,
        "adapter_alpha": args.adapter_alpha,
        "adapter_dropout": args.adapter_dropout,
        "target_modules": args.target_modules,
        "gate": args.gate,
        "gate_rank": gate.rank,
    }
    metrics = train(model, dataset, settings, pad_token_id, partial, args.resume, not args.no_progress, origin)
    info = CheckpointInfo(
        base_model=str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        base_revision=args.revision,
        base_fingerprint=base_fingerprint,
        gate_kind=args.gate,
        gate_rank=gate.rank,
        peft_type=peft_type(config),
        training=asdict(settings) | {"max_length": max_length, "raw": args.raw},
        data={"path": dataset.path, "sha256": dataset.sha256, "rows": len(dataset.examples)},
        metrics=metrics,
    )
    save_checkpoint(model, info, out, args.force)
    shutil.rmtree(partial, ignore_errors=True)
    print(json.dumps({"checkpoint": str(args.out), **metrics}))
    return 0


def _device(name: str) -> str:
    """The device that `name` stands for. Raises SettingsError if this machine or this PyTorch lacks it."""
    import torch

    from .errors import SettingsError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without CUDA
        raise SettingsError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name
