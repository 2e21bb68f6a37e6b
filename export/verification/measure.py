"""The quality of a written graph on held-out texts, against the siamese model in PyTorch's float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imsm_core.siamese import SiameseModel

from ..artifact import GRAPH
from ..virtual_tokens import load_virtual_cache
from .parity import expected_outputs
from .plain_run import Array, CachedGraph
from .quality import QualityReport, measure_quality, query_length


def evaluate(
    folder: Path, model: SiameseModel, streams: tuple[str, ...], texts: Sequence[list[int]], provider: str = "cpu"
) -> QualityReport:
    """Compare the graph in `folder`, run by `provider`, with `model`, which has its original weights. Raises
    VerificationError."""
    graph = CachedGraph(folder / GRAPH, load_virtual_cache(folder), provider=provider)

    def reference(text: list[int]) -> Array:
        return expected_outputs(model, text, query_length(text), streams)["logits"]

    def found(text: list[int]) -> Array:
        logits: Array = graph.whole(text, query_length(text))["logits"][0]
        return logits

    return measure_quality(reference, found, texts)
