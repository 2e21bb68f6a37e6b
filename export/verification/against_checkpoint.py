"""The parity check of an existing artifact against the checkpoint that it was exported from."""

from __future__ import annotations

import json
import math
from pathlib import Path

from imsm_core.checkpoint import load_checkpoint
from imsm_core.errors import CheckpointError

from ..artifact import MANIFEST
from ..settings import ExportSettings
from .parity import ParityReport, verify_graph


def verify_against_checkpoint(
    artifact: Path, checkpoint: Path, base_model: str | None = None, provider: str = "cpu"
) -> ParityReport:
    """Compare the graph in `artifact` with the model of `checkpoint` again. For a graph with quantized weights or
    caches the differences are measured but not judged: the checkpoint has other weights. The report then has `changes`.

    base_model: where the base model is now, if not where the checkpoint says. provider: the execution provider that
    runs the graph. Raises CheckpointError, BaseModelError, AdapterError, ExportError or VerificationError.
    """
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    model, info = load_checkpoint(checkpoint, base_model)
    made_from = (manifest["base_model"] or {}).get("fingerprint")
    if made_from != info.base_fingerprint:
        raise CheckpointError(
            f"{artifact} was not exported from {checkpoint}: its base model's fingerprint is {str(made_from)[:12]}…, "
            f"the checkpoint's is {info.base_fingerprint[:12]}…"
        )
    quantized = manifest["quantization"] is not None or manifest["kv_cache"] == "int8"
    tolerance = math.inf if quantized else ExportSettings(manifest["precision"]).tolerance
    streams, context = tuple(manifest["streams"]), manifest["model"]["context_length"]
    return verify_graph(artifact, model, streams, context, tolerance, quantized, provider)
