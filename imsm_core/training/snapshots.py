"""What an interrupted training run needs to go on exactly where it was: OUT.partial/snapshot-NNNNNNNN/.

state.safetensors    parameters, AdamW moments, the random generator's state, and what else the method keeps
state.json           step, learning-rate schedule, losses, and what the run was started with
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

from ..errors import CheckpointError, SettingsError
from ..files import publish_folder

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_OTHER = "other/"


def partial_folder(out: Path) -> Path:
    """Where the snapshots of a run that will write `out` are kept."""
    return out.with_name(out.name + ".partial")


def save_snapshot(
    partial: Path,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    others: dict[str, Tensor],
) -> None:
    """Write a snapshot whole, then remove the older ones. others: further tensors to give back."""
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    tensors |= {f"{_OTHER}{name}": tensor.contiguous() for name, tensor in others.items()}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach().cpu().contiguous()
        for moment in MOMENTS:
            if parameter in optimizer.state:  # not one that no gradient has reached yet
                tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    partial.mkdir(parents=True, exist_ok=True)
    target = partial / f"snapshot-{step:08d}"
    with publish_folder(target, "state.json", force=True) as draft:
        save_file(tensors, draft / "state.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, **state}) + "\n", encoding="utf-8")
    for other in _snapshots(partial):
        if other != target:
            shutil.rmtree(other)


def newest_snapshot(partial: Path) -> Path | None:
    """The snapshot to go on from, or None."""
    found = _snapshots(partial)
    return found[-1] if found else None


def restore_snapshot(
    snapshot: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, started_with: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put parameters, optimizer and random generators back; returns state.json and the other tensors.

    Raises SettingsError naming the first thing that differs from how the run was started, CheckpointError if the
    snapshot is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((snapshot / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(snapshot / "state.safetensors")
        before = {key: state["started_with"].get(key) for key in started_with}
        step, losses, _ = state["step"], state["losses"], state["seconds"]
        if len(losses) != step:
            raise ValueError(f"{len(losses)} losses at step {step}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{snapshot} is damaged ({error}); start anew with --force") from error
    for key, value in started_with.items():
        if before[key] != value:
            raise SettingsError(f"cannot resume: {key} was {before[key]!r} and is now {value!r}; --force starts anew")
    wanted = {"rng"} | {f"parameter/{name}" for name in parameters}
    if missing := sorted(wanted - tensors.keys()):
        raise CheckpointError(f"{snapshot} is damaged (it lacks {missing[0]}); start anew with --force")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"parameter/{name}"])
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
