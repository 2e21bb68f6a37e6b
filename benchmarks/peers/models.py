"""Every peer's model of one shape, built from the same saved backbone; existing ones are reused."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from benchmarks.peers.catalogue import BACKBONE, BLOCK_SIZE, MODELS
from benchmarks.peers.environments import python_of, run

HERE = Path(__file__).parent
SOURCES = ("export", "imsm_core")


def model_folder(name: str, shape: str, rank: int, work: Path) -> Path:
    """WORK/models/SHAPE/name, built if missing: whole or not at all. Raises Unavailable."""
    folder, model = work / "models" / shape / name, MODELS[name]
    if folder.is_dir():
        if model.script == "build_ours.py" and folder.stat().st_mtime < newest_source():
            print(f"note: {folder} is older than export/; remove it to rebuild it", file=sys.stderr)
        return folder
    if name == BACKBONE:
        options = ["--shape", shape, "--rank", str(rank)]
    else:
        origin = model_folder(model.source or BACKBONE, shape, rank, work)
        options = [*model.options, "--backbone" if model.source is None else "--source", str(origin)]
        if model.environment in ("own", "genai"):
            options += ["--block-size", str(BLOCK_SIZE)]
    python = python_of(model.environment, work)
    print(f"building {folder}", file=sys.stderr)
    draft = folder.with_name(f".{name}.draft-{os.getpid()}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        run([str(python), str(HERE / model.script), str(draft), *options])
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def newest_source() -> float:
    """When the code that writes artifacts last changed, in seconds of the epoch."""
    return max(path.stat().st_mtime for name in SOURCES for path in (HERE.parents[1] / name).rglob("*.py"))
