"""A siamese model from an adapter and a gate that were trained elsewhere.

The adapter is any standard PEFT folder. The gate comes from a gate.safetensors, or from the method's released code,
which saves its two linear layers as pickled modules: those are read by PyTorch's restricted loader, which builds
tensors and plain layers, names and refuses everything else, and runs no code from the file.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .adapter_tokenizer import FoundTokenizer
from .adapters.attach import peft_type, put_on
from .adapters.configs import warnings_unless_refused
from .adapters.saved import read_adapter
from .adapters.text_names import for_text_part
from .adapters.vocabulary import fit_vocabulary
from .backbone import fingerprint, hidden_size, load_base_model
from .base_source import remembered
from .checkpoint import CheckpointInfo
from .choices import check_gate_kind
from .errors import AdapterError, CheckpointError, SettingsError, first_line
from .gates import Gate, make_gate
from .siamese import SiameseModel

_DOWN_FILE = re.compile(r"(?:(\d+)_)?linear_A\.pth")
_PLAIN_LAYERS = (nn.Sequential, nn.Linear, nn.Dropout)


@warnings_unless_refused()
def assemble(
    adapter: Path,
    base_model: str,
    gate_kind: str,
    gate_from: Path | None = None,
    adapter_name: str | None = None,
    tokenizer: FoundTokenizer | None = None,
) -> tuple[SiameseModel, CheckpointInfo]:
    """The siamese model of a PEFT folder and a gate, in float32 and eval mode, on the CPU, and its info.

    base_model: a folder or hub id. gate_from: a gate.safetensors, a folder that holds one or the released code's
    linear_A.pth and linear_B.pth (with or without an epoch's number in front), or one of its linear_A files; not for
    mean_logits, which has no weights. adapter_name: which of several adapters in the folder. tokenizer: the texts', if
    tokens were added to it (`adapters.vocabulary`); the fingerprint is then that of the model with their rows. Raises
    SettingsError, AdapterError, BaseModelError or CheckpointError (the gate).
    """
    check_gate_kind(gate_kind)
    has_weights = gate_kind != "mean_logits"
    if has_weights and gate_from is None:
        raise SettingsError("gate_from", None, f"it must say where the trained weights of the {gate_kind} gate are")
    if not has_weights and gate_from is not None:
        raise SettingsError("gate_from", gate_from, "a mean_logits gate has no weights; leave it out")
    saved = read_adapter(find_adapter(adapter, adapter_name))
    base = load_base_model(base_model)
    width = hidden_size(base)
    gate = load_gate(gate_from, gate_kind, width) if gate_from is not None else make_gate(gate_kind, width)
    own = tokenizer is not None and tokenizer.folder is not None
    saved = for_text_part(base, saved)
    saved, rows = fit_vocabulary(base, saved, None if tokenizer is None else tokenizer.tokenizer, own)
    base_fingerprint = fingerprint(base)
    peft_model = put_on(base, saved)
    model = SiameseModel(peft_model, gate)
    model.requires_grad_(False)
    info = CheckpointInfo(
        base_model=remembered(base_model),
        base_revision=None,
        base_fingerprint=base_fingerprint,
        gate_kind=gate_kind,
        gate_rank=gate.rank,
        peft_type=peft_type(peft_model.peft_config[peft_model.active_adapter]),
        training={
            "adapter": str(saved.folder),
            "gate": str(gate_from) if gate_from is not None else None,
            "tokenizer": str(tokenizer.folder) if tokenizer is not None and own else None,
            "added_rows": asdict(rows),
        },
    )
    return model.eval(), info


def find_adapter(folder: Path, name: str | None = None) -> Path:
    """The folder of one adapter. PEFT keeps the one called `default` at the root and each other in a folder of its
    name. Raises AdapterError if there is none, SettingsError listing the names if `name` is not among them or there are
    several and it is not given.
    """
    if not folder.is_dir():
        raise AdapterError(f"no adapter at {folder}: the folder does not exist")
    places = {"default": folder} if (folder / "adapter_config.json").is_file() else {}
    places |= {path.parent.name: path.parent for path in sorted(folder.glob("*/adapter_config.json"))}
    if not places:
        raise AdapterError(f"{folder} is not a PEFT adapter: neither it nor a folder in it has an adapter_config.json")
    if name is not None and name not in places:
        raise SettingsError("adapter_name", name, f"{folder} has {', '.join(places)}")
    if name is None and len(places) > 1:
        raise SettingsError("adapter_name", None, f"{folder} has several adapters; choose one of {', '.join(places)}")
    return places[name] if name is not None else next(iter(places.values()))


def load_gate(source: Path, kind: str, width: int) -> Gate:
    """The gate of `kind` for d = width from `source` (see `assemble`). Raises CheckpointError naming both numbers where
    a size does not fit."""
    down, up, names = _gate_weights(source)
    inputs = 4 * width if kind == "query_aware" else 2 * width
    for name, weight in zip(names, (down, up), strict=True):
        if weight.dim() != 2 or not weight.is_floating_point():
            raise CheckpointError(f"{source}: {name} is not a matrix of floating-point numbers")
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{source}: {name} holds values that are not finite")
    if down.shape[1] != inputs:
        raise CheckpointError(
            f"{source}: {names[0]} reads {down.shape[1]} values; a {kind} gate on this base model reads {inputs}"
        )
    if up.shape[0] != width:
        raise CheckpointError(f"{source}: {names[1]} gives {up.shape[0]} values; the base model's states have {width}")
    if up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"{source}: {names[0]} has rank {down.shape[0]} and {names[1]} rank {up.shape[1]}; they must be equal"
        )
    gate = make_gate(kind, width, down.shape[0])
    gate.load_state_dict({"gate_down.weight": down.float(), "gate_up.weight": up.float()})
    return gate


def _gate_weights(source: Path) -> tuple[Tensor, Tensor, tuple[str, str]]:
    """gate_down (r, z), gate_up (d, r), and what the source calls them."""
    if not source.exists():
        raise CheckpointError(f"no gate at {source}: it does not exist")
    file = source / "gate.safetensors" if source.is_dir() else source
    if file.is_file() and file.suffix == ".safetensors":
        names = ("gate_down.weight", "gate_up.weight")
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors raises several types
            raise CheckpointError(f"{file} cannot be read: {first_line(error)}") from error
        if set(tensors) != set(names):
            raise CheckpointError(f"{file} must hold {names[0]} and {names[1]} and nothing else")
        return tensors[names[0]], tensors[names[1]], names
    down = _down_file(source)
    up = down.with_name(down.name.replace("linear_A", "linear_B"))
    if not up.is_file():
        raise CheckpointError(f"{down} has no {up.name} beside it")
    return read_linear(down), read_linear(up), (down.name, up.name)


def _down_file(source: Path) -> Path:
    if source.is_file():
        if not _DOWN_FILE.fullmatch(source.name):
            raise CheckpointError(f"{source} is not a gate; give a .safetensors file or a linear_A.pth")
        return source
    found = sorted(path for path in source.iterdir() if _DOWN_FILE.fullmatch(path.name))
    if not found:
        raise CheckpointError(f"{source} holds no gate: it has neither gate.safetensors nor linear_A.pth")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise CheckpointError(f"{source} holds several gates; give the path of one of {names}")
    return found[0]


def read_linear(path: Path) -> Tensor:
    """The weight of the released code's pickled `nn.Sequential(nn.Linear(bias=False), nn.Dropout)`, or of a linear
    layer, a state dict or a tensor. Raises CheckpointError naming the first class that is none of these."""
    try:
        with torch.serialization.safe_globals(list(_PLAIN_LAYERS)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; whatever matters is refused
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted loader's own error, or any that a damaged file causes
        if foreign := re.search(r"(?:GLOBAL|of type|class) ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} is refused: it holds {foreign[1]}, but a gate may only hold tensors and plain linear layers "
                "(no code in the file was run)"
            ) from error
        if "persistent_load" in str(error):  # whole layers in PyTorch's format before 1.6 carry their source code
            raise CheckpointError(f"{path} is refused: its format carries code; save the layer's state dict") from error
        reason = "it is damaged, or torch.save did not write it"
        raise CheckpointError(f"{path} cannot be read: {reason} ({type(error).__name__})") from error
    tensors = _tensors(loaded)
    if len(tensors) != 1:
        raise CheckpointError(f"{path} holds {len(tensors)} tensors; a gate's linear layer has one, its weight")
    return tensors[0].detach()


def _tensors(loaded: Any) -> list[Tensor]:
    """Every tensor of plain layers, a state dict or a tensor, read from their attributes: no method runs."""
    if isinstance(loaded, Tensor):
        return [loaded]
    if isinstance(loaded, dict):
        return [value for value in loaded.values() if isinstance(value, Tensor)]
    if type(loaded) in _PLAIN_LAYERS:
        own = [value for value in vars(loaded).get("_parameters", {}).values() if isinstance(value, Tensor)]
        return own + [tensor for part in vars(loaded).get("_modules", {}).values() for tensor in _tensors(part)]
    return []
