"""From a base model's name and a data file to a CHECKPOINT folder: what the `train` command does."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from ..adapters.attach import attach_adapter, peft_type
from ..adapters.methods import OPTIONS, check_options, peft_config, read_peft_config
from ..adapters.virtual_tokens import context_length
from ..backbone import fingerprint, hidden_size, load_base_model, load_tokenizer
from ..checkpoint import INFO, CheckpointInfo, save_checkpoint
from ..console import option
from ..data.dataset import load_jsonl
from ..errors import OutputExistsError, SettingsError
from ..files import refuse_existing, sha256_of_file
from ..gates import check_gate_kind, make_gate
from ..quantized_backbone import BLOCK_SIZE, check_rounding, round_backbone
from ..siamese import SiameseModel
from .loop import TrainSettings, train
from .snapshots import newest_snapshot, partial_folder

LONGEST = 1024


@dataclass(frozen=True)
class TuneSettings:
    """What is tuned on which fields. max_length: tokens of the longest row that is kept; None is the model's context,
    at most 1024. peft: a name of `methods.PEFT_METHODS`, None is lora; the adapter's options of None are the method's
    defaults. peft_config: a file with any PEFT config instead, as PEFT writes adapter_config.json. quantized_backbone:
    int4 or int8, the values that the frozen weights have in training, in blocks of `block_size` (None is 32)."""

    prompt_field: str = "prompt"
    answer_field: str = "answer"
    raw: bool = False
    max_length: int | None = None
    peft: str | None = None
    peft_config: Path | None = None
    adapter_rank: int | None = None
    adapter_alpha: int | None = None
    adapter_dropout: float | None = None
    target_modules: Sequence[str] | None = None
    virtual_tokens: int | None = None
    token_indices: Sequence[int] | None = None
    gate: str = "query_aware"
    gate_rank: int = 8
    quantized_backbone: str | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise SettingsError(
                f"{option('max_length')} is {self.max_length}; it must be at least 2, a prompt's and an answer's token"
            )
        check_gate_kind(self.gate)
        if self.quantized_backbone is not None:
            check_rounding(**self.rounding())
        elif self.block_size is not None:
            raise SettingsError(f"{option('block_size')} goes with {option('quantized_backbone')}")
        if self.peft_config is None:
            check_options(self.peft or "lora", **self._options())
        elif given := [name for name, value in (self._options() | {"peft": self.peft}).items() if value is not None]:
            raise SettingsError(
                f"{option(OPTIONS.get(given[0], given[0]))} and {option('peft_config')} exclude each other: the file "
                "says all about the adapter"
            )

    def _options(self) -> dict[str, Any]:
        return {
            "rank": self.adapter_rank,
            "alpha": self.adapter_alpha,
            "dropout": self.adapter_dropout,
            "target_modules": self.target_modules,
            "virtual_tokens": self.virtual_tokens,
            "token_indices": self.token_indices,
        }

    def rounding(self) -> dict[str, Any]:
        """What `round_backbone` takes, as a checkpoint keeps it; empty if the backbone stays as it is."""
        if self.quantized_backbone is None:
            return {}
        return {"precision": self.quantized_backbone, "block_size": self.block_size or BLOCK_SIZE}

    def adapter_for(self, model: PreTrainedModel) -> PeftConfig:
        """The config of the adapter that is trained on `model`. Raises AdapterError."""
        if self.peft_config is not None:
            return read_peft_config(self.peft_config)
        return peft_config(self.peft or "lora", **self._options(), model=model)


def tune(
    model: str,
    data: Path,
    out: Path,
    settings: TuneSettings | None = None,
    training: TrainSettings | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tune an adapter and a gate on the base model `model` (a folder or a hub id) and write `out`; returns metrics.

    data: JSONL. device: cpu, cuda, or auto. resume: go on with an interrupted run of the same call. force: replace
    `out`, and discard an interrupted run of it. Raises the errors of `imsm_core.errors`, each before the long work
    where it can be known, and `training.Interrupted` on Ctrl-C.
    """
    settings, training = settings or TuneSettings(), training or TrainSettings()
    # 1. Everything that can be refused is refused before the long work.
    if settings.peft_config is not None:
        read_peft_config(settings.peft_config)
    device = _device(device)
    target = out.resolve()
    refuse_existing(target, INFO, force)
    partial = partial_folder(target)
    if newest_snapshot(partial) is not None and not resume:
        if not force:
            raise OutputExistsError(f"{partial} holds an interrupted run; --resume goes on, --force discards it")
        shutil.rmtree(partial)

    # 2. Base model, data, adapter, gate.
    tokenizer = load_tokenizer(model, revision)
    base = load_base_model(model, revision)
    config = settings.adapter_for(base)
    training = training.with_learning_rate_for(config)
    virtual = getattr(config, "num_virtual_tokens", None) or 0
    context = (context_length(base) or LONGEST + virtual) - virtual
    if context < 2:
        raise SettingsError(f"{virtual} virtual tokens leave no room for text in the model's {context_length(base)}")
    max_length = min(settings.max_length or LONGEST, context)
    dataset = load_jsonl(data, tokenizer, settings.prompt_field, settings.answer_field, max_length, settings.raw)
    if dataset.skipped:
        print(f"{dataset.skipped} rows are longer than {max_length} tokens and are skipped", file=sys.stderr)
    base_fingerprint = fingerprint(base)
    if rounding := settings.rounding():
        round_backbone(base, **rounding)
    torch.manual_seed(training.seed)
    gate = make_gate(settings.gate, hidden_size(base), settings.gate_rank, training.gate_dropout)
    siamese = SiameseModel(attach_adapter(base, config), gate).to(device)
    siamese.check_forward()

    # 3. Train and write.
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    file = settings.peft_config and sha256_of_file(settings.peft_config)
    origin = asdict(settings) | {"base_model": base_fingerprint, "max_length": max_length, "peft_config": file}
    metrics = train(siamese, dataset, training, pad_token_id, partial, resume, progress, origin)
    info = CheckpointInfo(
        base_model=str(Path(model).resolve()) if Path(model).is_dir() else model,
        base_revision=revision,
        base_fingerprint=base_fingerprint,
        gate_kind=settings.gate,
        gate_rank=gate.rank,
        peft_type=peft_type(config),
        training=asdict(training) | {"max_length": max_length, "raw": settings.raw},
        data={"path": dataset.path, "sha256": dataset.sha256, "rows": len(dataset.examples)},
        metrics=metrics,
        quantized_backbone=rounding,
    )
    save_checkpoint(siamese, info, target, force)
    shutil.rmtree(partial, ignore_errors=True)
    return metrics


def _device(name: str) -> str:
    """The device that `name` stands for. Raises SettingsError if this machine or this PyTorch lacks it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without CUDA
        raise SettingsError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name
