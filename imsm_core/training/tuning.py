"""From a base model's name and a data file to a CHECKPOINT folder: what the `train` command does."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedModel

from ..adapters.attach import attach_adapter, peft_type
from ..adapters.configs import read_peft_config
from ..adapters.methods import peft_config
from ..adapters.virtual_tokens import context_length
from ..backbone import embedded_tokens, fingerprint, hidden_size, load_base_model, load_tokenizer
from ..base_source import remembered
from ..checkpoint import INFO, CheckpointInfo, save_checkpoint
from ..claims import Place, claimed
from ..data.dataset import Dataset, load_jsonl, told
from ..disk import check_room
from ..errors import OutputExistsError, SettingsError, first_line, setting
from ..files import sha256_of_file
from ..gates import make_gate
from ..quantized_backbone import round_backbone
from ..siamese import SiameseModel
from .loop import train
from .schedule import with_learning_rate
from .settings import DEFAULT_METHOD, LONGEST, TrainSettings, TuneSettings
from .snapshots import newest_snapshot, partial_folder


def tune(
    model: str,
    data: Path | str,
    out: Path | str,
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

    data: a file of JSON objects in one of the forms of `imsm_core.data.forms`. device: cpu, cuda, or auto. resume:
    continue an interrupted run of the same call. force: replace `out`, and discard an interrupted run of it. Raises the
    errors of `imsm_core.errors`, before the long work where possible; Interrupted on Ctrl-C.
    """
    settings, training = settings or TuneSettings(), training or TrainSettings()
    # 1. Everything that can be refused is refused before the long work.
    if settings.peft_config is not None:
        read_peft_config(settings.peft_config)
    device = _device(device)
    with claimed(Path(out), INFO, force, inputs=(model, data, settings.peft_config)) as place:
        return _tune(model, Path(data), place, settings, training, revision, device, resume, force, progress)


def _tune(
    model: str,
    data: Path,
    place: Place,
    settings: TuneSettings,
    training: TrainSettings,
    revision: str | None,
    device: str,
    resume: bool,
    force: bool,
    progress: bool,
) -> dict[str, Any]:
    """As `tune`, with the output folder claimed."""
    partial = partial_folder(place)
    if newest_snapshot(partial) is None:
        if resume:
            print(f"nothing to resume in {partial}: the run starts from the beginning", file=sys.stderr)
    elif not resume:
        if not force:
            raise OutputExistsError(
                f"{partial} holds an interrupted run; {setting('resume')} continues it, {setting('force')} discards it"
            )
        shutil.rmtree(partial)

    # 2. Base model, data, adapter, gate.
    tokenizer = load_tokenizer(model, revision)
    base = load_base_model(model, revision)
    config = adapter_config(settings, base)
    training = with_learning_rate(training, config)
    max_length = min(settings.max_length or LONGEST, _room_for_text(settings, config, base))
    vocabulary = embedded_tokens(base)
    dataset = load_jsonl(
        data,
        tokenizer,
        settings.prompt_field,
        settings.answer_field,
        max_length,
        settings.raw,
        settings.skip_bad_rows,
        vocabulary,
    )
    if counts := dataset.skipped_by_reason:
        print(f"rows that are skipped: {told(counts)} (the longest may have {max_length} tokens)", file=sys.stderr)
    base_fingerprint = fingerprint(base)
    if rounding := settings.rounding():
        round_backbone(base, **rounding)
    torch.manual_seed(training.seed)
    gate = make_gate(settings.gate, hidden_size(base), settings.gate_rank, training.gate_dropout)
    siamese = SiameseModel(attach_adapter(base, config), gate).to(device)
    siamese.check_forward()
    check_room(place.home, _size_of_output(siamese, training.total_steps(len(dataset.examples)), training))

    # 3. Train and write.
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    if pad_token_id >= vocabulary:  # masked everywhere, so that any token does
        pad_token_id = 0
    file = settings.peft_config and sha256_of_file(settings.peft_config)
    origin = asdict(settings) | {"model": base_fingerprint, "max_length": max_length, "peft_config": file}
    metrics = train(siamese, dataset, training, pad_token_id, partial, resume, progress, origin)
    info = CheckpointInfo(
        base_model=remembered(model),
        base_revision=revision,
        base_fingerprint=base_fingerprint,
        gate_kind=settings.gate,
        gate_rank=gate.rank,
        peft_type=peft_type(config),
        training=asdict(training) | prompt_settings(settings, dataset) | {"max_length": max_length},
        data={
            "path": dataset.path,
            "sha256": dataset.sha256,
            "form": dataset.form,
            "rows": dataset.rows,
            "examples": len(dataset.examples),
            "skipped": dataset.skipped_by_reason,
        },
        metrics=metrics,
        quantized_backbone=rounding,
    )
    save_checkpoint(siamese, info, place.folder, force)
    shutil.rmtree(partial, ignore_errors=True)
    return metrics


def adapter_config(settings: TuneSettings, model: PreTrainedModel) -> PeftConfig:
    """The PEFT config of the adapter that is trained on `model`. Raises SettingsError or AdapterError."""
    if settings.peft_config is not None:
        return read_peft_config(settings.peft_config)
    return peft_config(settings.peft or DEFAULT_METHOD, **settings.adapter_options(), model=model)


def _size_of_output(model: SiameseModel, steps: int, training: TrainSettings) -> int:
    """Bytes of the checkpoint and of the snapshots that are on the disk beside it: two, while one replaces the other,
    with two moments for each parameter."""
    trained = sum(value.numel() * value.element_size() for value in model.trainable_parameters().values())
    return trained * (1 + 3 * min(2, steps // training.save_every))


def prompt_settings(settings: TuneSettings, dataset: Dataset) -> dict[str, Any]:
    """What shapes a prompt, as a checkpoint keeps it. Plain text trains prompts as they are, whatever the settings."""
    return {
        "prompt_field": settings.prompt_field,
        "answer_field": settings.answer_field,
        "raw": settings.raw or dataset.form == "text",
    }


def _room_for_text(settings: TuneSettings, config: PeftConfig, model: PreTrainedModel) -> int:
    """How many tokens of text fit beside the virtual ones. Raises SettingsError if that is less than two."""
    virtual = getattr(config, "num_virtual_tokens", None) or 0
    context = context_length(model)
    room = LONGEST if context is None else context - virtual
    if room < 2:
        rule = f"{virtual} virtual tokens leave no room for text in the model's context of {context}"
        if settings.peft_config is not None:
            raise SettingsError("peft_config", settings.peft_config, rule)
        raise SettingsError("virtual_tokens", settings.virtual_tokens, rule)
    return room


def _device(name: str) -> str:
    """The device that `name` stands for. Raises SettingsError if this machine or this PyTorch does not have it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch built without CUDA
        raise SettingsError("device", name, f"it cannot be used: {first_line(error)}") from error
    return name
