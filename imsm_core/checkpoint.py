"""The CHECKPOINT folder: a standard PEFT adapter folder, the gate, and imsm.json.

adapter/             adapter_config.json, adapter_model.safetensors: PEFT alone can load it
gate.safetensors     gate_down.weight (r, z), gate_up.weight (d, r), float32; empty for `mean_logits`
imsm.json            base model, its fingerprint, its rounding, gate kind and rank, PEFT type, settings, data, metrics
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .adapters.attach import load_adapter, save_adapter
from .backbone import fingerprint, hidden_size, load_base_model
from .errors import BaseModelError, CheckpointError, SettingsError, setting
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
    """Write the folder whole or not at all. Raises OutputExistsError if it exists and `force` is false."""
    with publish_folder(target, INFO, force) as draft:
        save_adapter(model.peft_model, draft / "adapter")
        gate = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.gate.state_dict().items()}
        save_file(gate, draft / "gate.safetensors", metadata={"kind": info.gate_kind})
        (draft / INFO).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def read_info(folder: Path) -> CheckpointInfo:
    """Parse imsm.json. Raises CheckpointError naming what is missing or unknown."""
    path = folder / INFO
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: the folder does not exist")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no imsm.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; this program reads {FORMAT_VERSION}")
    try:
        info = CheckpointInfo(**{_RENAMED.get(name, name): value for name, value in fields.items()})
    except TypeError as error:
        raise CheckpointError(f"{path} has missing or unknown fields: {str(error).split('() ')[-1]}") from error
    for name, kind in get_type_hints(CheckpointInfo).items():
        if not isinstance(getattr(info, name), dict if get_origin(kind) is dict else kind):
            raise CheckpointError(f"{path} is damaged: {name} is {getattr(info, name)!r}")
    return info


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
        gate.load_state_dict(tensors)
    except (SafetensorError, SettingsError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except RuntimeError as error:  # torch lists each mismatch on its own line
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not fit a {info.gate_kind} gate of rank {info.gate_rank}: {reason}"
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CheckpointError(f"{path} holds values that are not finite")
    return gate
