"""Artifacts for the tests: a tiny siamese model, its base folder, and the ARTIFACT folder exported from it.

One export takes seconds, so that artifacts are made once a session and only read; tests that damage one copy it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.pipeline import export_model
from export.settings import ExportSettings
from imsm_core.backbone import load_tokenizer
from imsm_core.siamese import SiameseModel
from tests.adapters import make_siamese_with
from tests.builders import make_base_folder, make_siamese, save_tiny_checkpoint

PROMPT = [0, 80, 104, 77, 35, 102, 114, 67, 118, 90, 61]


@dataclass(frozen=True)
class Exported:
    """A siamese model in PyTorch and the same as an artifact."""

    base: Path
    checkpoint: Path
    artifact: Path
    model: SiameseModel
    manifest: dict[str, Any]


def export_tiny(
    folder: Path,
    kind: str = "llama",
    gate_kind: str = "query_aware",
    head_dim: int = 8,
    tied: bool = False,
    target_modules: Sequence[str] | None = None,
    chat_template: str | None = None,
    zero: str = "",
    adapter: str | None = None,
    settings: ExportSettings | None = None,
) -> Exported:
    """Make and export a tiny model. zero: parameters whose names contain it are set to 0 after randomizing. adapter:
    one of `tests.adapters.ADAPTERS` instead of a LoRA on `target_modules`."""
    base = make_base_folder(folder / "base", kind, head_dim=head_dim, tied=tied, chat_template=chat_template)
    if adapter is None:
        model = make_siamese(base, gate_kind, target_modules=target_modules)
    else:
        model = make_siamese_with(base, adapter, gate_kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if zero and zero in name:
                parameter.zero_()
    info = save_tiny_checkpoint(model, base, folder / "checkpoint")
    return export_existing(folder, base, model, info, settings)


def export_existing(
    folder: Path, base: Path, model: SiameseModel, info: Any, settings: ExportSettings | None = None
) -> Exported:
    """Export a model whose checkpoint is already in `folder`."""
    target = folder / "artifact"
    manifest = export_model(
        model, load_tokenizer(str(base)), info, target, settings or ExportSettings(), report=lambda line: None
    )
    return Exported(base, folder / "checkpoint", target, model, manifest)


def copied(artifact: Path, target: Path) -> Path:
    """A copy of an artifact that a test may damage."""
    shutil.copytree(artifact, target)
    return target


def edit_manifest(artifact: Path, **changes: Any) -> None:
    """Replace top-level entries of a manifest."""
    path = artifact / "imsm_model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
