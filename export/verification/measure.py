"""The quality of a written graph on held-out texts, against the siamese model in PyTorch's float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from imsm_core.backbone import apply_head
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream, answer_states
from imsm_core.siamese import SiameseModel

from ..artifact import GRAPH
from ..virtual_tokens import load_virtual_cache
from .plain_run import Array, CachedGraph
from .quality import QualityReport, measure_quality


def evaluate(
    folder: Path,
    model: SiameseModel,
    streams: tuple[str, ...],
    texts: Sequence[Example],
    provider: str,
    report: Callable[[str], None],
) -> QualityReport:
    """Compare the graph in `folder`, run by `provider`, with `model`, which has its original weights. report: gets
    lines about the progress. Raises VerificationError."""
    graph = CachedGraph(folder / GRAPH, load_virtual_cache(folder), provider=provider)

    stream: Stream = "fused" if len(streams) > 1 else "base"

    @torch.no_grad()
    def reference(text: Example) -> Array:
        states, _, _ = answer_states(model, [text], stream, pad_token_id=0)
        logits: Array = apply_head(model.causal_lm, states[None])[0].numpy()
        return logits

    def found(text: Example) -> Array:
        logits: Array = graph.whole(text.token_ids, len(text.prompt_ids))["logits"][0]
        return logits

    return measure_quality(reference, found, texts, report)
