"""The CHECKPOINT folder: a standard PEFT adapter folder, the gate, and imsm.json.

adapter/             adapter_config.json, adapter_model.safetensors: PEFT alone can load it
gate.safetensors     gate_down.weight (r, z), gate_up.weight (d, r), float32; empty for `mean_logits`
imsm.json            base model, its fingerprint, its rounding, gate kind and rank, PEFT type, settings, data, metrics
"""

from __future__ import annotations

import json
import os
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from safetensors.torch import load_file, save_file

from .adapters.attach import load_adapter, save_adapter
from .backbone import fingerprint, hidden_size, load_base_model
from .choices import GATE_KINDS
from .errors import BaseModelError, CheckpointError, SettingsError, first_line, setting, shown
from .files import publish_folder
from .gates import Gate, make_gate
from .quantized_backbone import round_backbone
from .siamese import SiameseModel

FORMAT_VERSION = 1
INFO = "imsm.json"
_RENAMED = {"quantised_backbone": "quantized_backbone"}  # fields as they were once called, which users' folders have


@dataclass(frozen=True)
class CheckpointInfo:
    """What imsm.json says. `base_model` is a local path or a hub id, and `base_fingerprint` is that of its weights as
    they are stored. quantized_backbone: the arguments of the `round_backbone` that ran before training, empty if none
    did."""

    base_model: str
    base_revision: str | None
    base_fingerprint: str
    gate_kind: str
    gate_rank: int
    peft_type: str
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    quantized_backbone: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def save_checkpoint(model: SiameseModel, info: CheckpointInfo, target: Path, force: bool = False) -> None:
    """Write the folder whole or not at all. Raises OutputExistsError if it exists and `force` is false,
    OutputError if it cannot be written."""
    gate = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.gate.state_dict().items()}
    with publish_folder(target, INFO, force, size=sum(tensor.nbytes for tensor in gate.values())) as draft:
        save_adapter(model.peft_model, draft / "adapter")
        save_file(gate, draft / "gate.safetensors", metadata={"kind": info.gate_kind})
        (draft / INFO).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def read_info(folder: Path) -> CheckpointInfo:
    """Parse imsm.json. Raises CheckpointError naming what is missing or unknown."""
    path = folder / INFO
    if not os.path.isdir(folder):
        raise CheckpointError(f"no checkpoint at {shown(folder)}: the folder does not exist")
    if not os.path.lexists(path):
        raise CheckpointError(f"{shown(folder)} is not a checkpoint: it has no {INFO}")
    if not os.path.isfile(path):  # opening a pipe would wait for whoever writes into it
        raise CheckpointError(f"{shown(path)} is not a regular file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise CheckpointError(f"{shown(path)} is damaged: it is nested too deeply") from error
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{shown(path)} is damaged: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(fields, dict) or "format_version" not in fields:
        raise CheckpointError(f"{shown(path)} is damaged: it has no format_version")
    version = fields["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{shown(path)} has format version {_short(version)}; this program reads {FORMAT_VERSION}"
        )
    fields = {_RENAMED.get(name, name): value for name, value in fields.items()}
    known = CheckpointInfo.__dataclass_fields__
    for name, kind in get_type_hints(CheckpointInfo).items():
        if name not in fields and known[name].default is MISSING and known[name].default_factory is MISSING:
            raise CheckpointError(f"{shown(path)} is damaged: it has no {name}")
        value = fields.get(name, {})
        wanted = dict if get_origin(kind) is dict else kind
        if name in fields and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise CheckpointError(f"{shown(path)} is damaged: {name} is {_short(value)}")
    if unknown := sorted(fields.keys() - known.keys()):
        raise CheckpointError(f"{shown(path)} is damaged: it has the unknown field {_short(unknown[0])}")
    info = CheckpointInfo(**fields)
    if info.gate_kind not in GATE_KINDS:
        rule = f"it must be one of {', '.join(GATE_KINDS)}"
        raise CheckpointError(f"{shown(path)} is damaged: gate_kind is {_short(info.gate_kind)}; {rule}")
    if not 0 <= info.gate_rank < 2**31:
        raise CheckpointError(f"{shown(path)} is damaged: gate_rank is {_short(info.gate_rank)}")
    for name, value in info.quantized_backbone.items():  # values beyond types are `round_backbone`'s business
        if name not in ("precision", "block_size") or (name == "block_size" and not _is_block_size(value)):
            raise CheckpointError(f"{shown(path)} is damaged: quantized_backbone has {_short(name)}: {_short(value)}")
    return info


def _is_block_size(value: Any) -> bool:
    """Whether it is a whole number of a size that matrices have."""
    return type(value) is int and 0 < value <= 2**20


def _short(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 50 digits"
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:60]}..."


def load_checkpoint(folder: Path, base_model: str | None = None) -> tuple[SiameseModel, CheckpointInfo]:
    """The siamese model of a CHECKPOINT folder, in float32 and eval mode, on the CPU, with the weights that it was
    trained on: a backbone that was rounded for training is rounded again.

    base_model: where the base model is now, if not where imsm.json says. Raises CheckpointError, BaseModelError (also
    if these are not the weights that were tuned) or AdapterError.
    """
    info = read_info(folder)
    _check_complete(folder)
    name = base_model or info.base_model
    if base_model is None and Path(name).is_absolute() and not Path(name).exists():
        raise BaseModelError(
            f"no base model at {name!r}, where {folder} was trained on it; {setting('base')} says where it is now"
        )
    base = load_base_model(name, info.base_revision if base_model is None else None)
    found = fingerprint(base)
    if found != info.base_fingerprint:
        raise BaseModelError(
            f"{name} is not the base model of {folder}: its fingerprint is {found[:12]}…, "
            f"the adapter was trained on {info.base_fingerprint[:12]}…"
        )
    if info.quantized_backbone:
        try:
            round_backbone(base, **info.quantized_backbone)
        except (SettingsError, TypeError) as error:
            raise CheckpointError(f"{folder / INFO} is damaged in quantized_backbone: {error}") from error
    gate = _load_gate(folder / "gate.safetensors", info, hidden_size(base))
    model = SiameseModel(load_adapter(base, folder / "adapter"), gate)
    model.requires_grad_(False)
    return model.eval(), info


def _check_complete(folder: Path) -> None:
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "gate.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {name}")


def _load_gate(path: Path, info: CheckpointInfo, width: int) -> Gate:
    try:
        tensors = load_file(path)
        gate = make_gate(info.gate_kind, width, info.gate_rank)
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise CheckpointError(f"{shown(path)} holds values that are no floating-point numbers")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise CheckpointError(f"{shown(path)} holds values that are not finite")
        gate.load_state_dict(tensors)
    except CheckpointError:
        raise
    except RuntimeError as error:  # torch lists each mismatch on its own line
        reason = " ".join(str(error).split())
        kind, rank = info.gate_kind, info.gate_rank
        raise CheckpointError(f"{shown(path)} does not fit a {kind} gate of rank {rank}: {shown(reason)}") from error
    except Exception as error:  # safetensors raises several types
        raise CheckpointError(f"{shown(path)} cannot be read: {shown(first_line(error))}") from error
    return gate
