"""What an interrupted training run needs to continue exactly where it was: OUT.partial/snapshot-NNNNNNNN/, or
OUT/imsm.partial/... where drafts lie in the folder.

state.safetensors    parameters, AdamW moments, the random generator's state, and what the method adds
state.json           step, losses, seconds, and what the run was started with
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..claims import Place
from ..errors import CheckpointError, SettingsError, setting, shown
from ..files import publish_folder

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_PARAMETER, _OTHER = "parameter/", "other/"


def partial_folder(place: Place) -> Path:
    """Where the snapshots of a run that writes to `place` are kept."""
    return place.home / f"{place.prefix}.partial"


def save_snapshot(
    partial: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    others: dict[str, Tensor],
) -> None:
    """Write a snapshot whole, then remove the older ones. others: further tensors that `restore_snapshot` returns."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    tensors |= {f"{_OTHER}{name}": tensor.contiguous() for name, tensor in others.items()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"{_PARAMETER}{name}"] = parameter.detach().cpu().contiguous()
        for moment in MOMENTS:
            if parameter in optimizer.state:  # a parameter that no gradient has reached yet has none
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    partial.mkdir(parents=True, exist_ok=True)
    target = partial / f"snapshot-{step:08d}"
    size = sum(tensor.nbytes for tensor in tensors.values())
    with publish_folder(target, "state.json", force=True, size=size) as draft:
        save_file(tensors, draft / "state.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
    for other in _snapshots(partial):
        if other != target:
            shutil.rmtree(other)


def newest_snapshot(partial: Path) -> Path | None:
    """The snapshot to resume from, or None."""
    found = _snapshots(partial)
    return found[-1] if found else None


def restore_snapshot(
    snapshot: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, started_with: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put parameters, optimizer and random generators back; returns state.json and the other tensors.

    Raises SettingsError naming the first setting that differs from how the run was started, CheckpointError if the
    snapshot is damaged or holds other parameters.
    """
    try:
        state: dict[str, Any] = json.loads((snapshot / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(snapshot / "state.safetensors")
        before = {key: state["started_with"].get(key) for key in started_with}
        step, losses, _ = state["step"], state["losses"], state["seconds"]
        if len(losses) != step:
            raise ValueError(f"{len(losses)} losses at step {step}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{snapshot} is damaged ({error}); start over with {setting('force')}") from error
    for key, value in started_with.items():
        if before[key] != value:
            rule = f"the interrupted run had {shown(before[key])}, and {{resume}} needs the same; {{force}} starts over"
            raise SettingsError(key, value, rule)
    if "rng" not in tensors:
        raise CheckpointError(f"{snapshot} is damaged (it has no rng); start over with {setting('force')}")
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(_PARAMETER)}
    if found != {f"{_PARAMETER}{name}": parameter.shape for name, parameter in parameters.items()}:
        raise CheckpointError(
            f"{snapshot} holds other parameters than this run trains; start over with {setting('force')}"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"{_PARAMETER}{name}"])
        if f"step/{name}" in tensors:
            optimizer.state[parameter] = {
                moment: tensors[f"{moment}/{name}"].to("cpu" if moment == "step" else parameter.device)
                for moment in MOMENTS
            }
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    return state, {name.removeprefix(_OTHER): tensor for name, tensor in tensors.items() if name.startswith(_OTHER)}


def _snapshots(partial: Path) -> list[Path]:
    if not partial.is_dir():
        return []
    return sorted(path for path in partial.iterdir() if re.fullmatch(r"snapshot-\d{8}", path.name))
