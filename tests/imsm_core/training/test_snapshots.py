"""Snapshots: only a whole one of the same run is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from imsm_core.errors import CheckpointError, Interrupted, SettingsError
from imsm_core.training.loop import train
from imsm_core.training.settings import TrainSettings
from imsm_core.training.snapshots import newest_snapshot
from tests.builders import PAD, make_siamese
from tests.imsm_core.training.runs import DATASET, SETTINGS, interrupt_after, run, trained


@pytest.fixture
def snapshot(base_folder: Path, tmp_path: Path) -> Path:
    """A snapshot after step 4 of 6."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted):
            run(make_siamese(base_folder), partial=tmp_path / "partial", origin={"adapter_alpha": 8})
    found = newest_snapshot(tmp_path / "partial")
    assert found is not None
    return found


def resume(base_folder: Path, snapshot: Path, settings: TrainSettings = SETTINGS, **options: Any) -> dict[str, Any]:
    options = {"origin": {"adapter_alpha": 8}, "partial": snapshot.parent, "resume": True} | options
    return run(make_siamese(base_folder), settings, **options)


def test_resuming_with_another_setting_or_origin_is_refused_by_name(base_folder: Path, snapshot: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"^learning_rate is 0\.02; the interrupted run had 0\.01, and resume needs the same"
    ):
        resume(base_folder, snapshot, replace(SETTINGS, learning_rate=0.02))
    with pytest.raises(SettingsError, match=r"^adapter_alpha is 16; the interrupted run had 8"):
        resume(base_folder, snapshot, origin={"adapter_alpha": 16})
    other = replace(DATASET, sha256="1" * 64)
    with pytest.raises(SettingsError, match=r"^data is 1{64}; the interrupted run had 0{64}"):
        train(make_siamese(base_folder), other, SETTINGS, PAD, snapshot.parent, True, False, {"adapter_alpha": 8})
    smaller = make_siamese(base_folder, rank=2)
    with pytest.raises(CheckpointError, match="holds other parameters than this run trains; start over with force"):
        run(smaller, partial=snapshot.parent, resume=True, origin={"adapter_alpha": 8})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.safetensors", b""),
        ("state.safetensors", None),
        ("state.safetensors", b"half"),
        ("state.json", b""),
        ("state.json", b"[]"),
        ("state.json", b"{}"),
        ("state.json", b'{"started_with": null}'),
    ],
)
def test_damaged_snapshot_is_refused(base_folder: Path, snapshot: Path, name: str, content: bytes | None) -> None:
    file = snapshot / name
    match content:
        case None:
            file.unlink()
        case b"half":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case _:
            file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged .*start over with force"):
        resume(base_folder, snapshot)


def test_snapshot_whose_losses_do_not_fit_its_step_is_refused(base_folder: Path, snapshot: Path) -> None:
    state = json.loads((snapshot / "state.json").read_text())
    (snapshot / "state.json").write_text(json.dumps(state | {"losses": state["losses"][:-1]}))
    with pytest.raises(CheckpointError, match="3 losses at step 4"):
        resume(base_folder, snapshot)


def test_newer_looking_snapshot_of_an_older_run_is_removed(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "partial" / "snapshot-00000900").mkdir(parents=True)
    run(make_siamese(base_folder), partial=tmp_path / "partial")
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["snapshot-00000006"]


def test_parameter_that_no_gradient_has_reached_does_not_stop_a_snapshot(base_folder: Path, tmp_path: Path) -> None:
    """As the adapter of an expert that no token was routed to."""
    models = [make_siamese(base_folder) for _ in range(2)]
    for model in models:
        model.gate.unused = torch.nn.Parameter(torch.ones(3))
    run(models[0], partial=tmp_path / "partial")
    run(models[1], partial=tmp_path / "partial", resume=True)
    assert all(torch.equal(trained(models[0])[name], value) for name, value in trained(models[1]).items())
