"""The quality of a written graph on held-out texts, against the siamese model in PyTorch's float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from imsm_core.backbone import apply_head
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream, states_by_stream
from imsm_core.siamese import SiameseModel

from ..artifact import GRAPH
from ..virtual_tokens import load_virtual_cache
from .plain_run import Array, CachedGraph
from .quality import QualityReport, Rows, measure_quality


def evaluate(
    folder: Path,
    model: SiameseModel,
    streams: tuple[str, ...],
    texts: Sequence[Example],
    provider: str,
    report: Callable[[str], None],
) -> QualityReport:
    """Compare the graph in `folder`, run by `provider`, with `model`, which has its original weights: the blend and
    both memories alone, or the one stream that the graph has. Each side's backbone reads a text once. report: gets
    lines about the progress. Raises VerificationError."""
    graph = CachedGraph(folder / GRAPH, load_virtual_cache(folder), provider=provider)
    names = ("blend", "base", "adapter") if len(streams) > 1 else ("base",)

    def found(text: Example) -> Mapping[str, Rows]:
        query = len(text.prompt_ids)
        logits = graph.logits_of(range(len(names)), text.token_ids[:-1], query, first=query - 1)
        return {name: rows.__getitem__ for name, rows in zip(names, logits, strict=True)}

    return measure_quality(partial(_reference, model), found, texts, report)


@torch.no_grad()
def _reference(model: SiameseModel, text: Example) -> Mapping[str, Rows]:
    """PyTorch's side."""
    states, _, _ = states_by_stream(model, [text], get_args(Stream), pad_token_id=0)
    return {"blend" if name == "fused" else name: partial(_logits, model, chosen) for name, chosen in states.items()}


@torch.no_grad()
def _logits(model: SiameseModel, states: Tensor, part: slice) -> Array:
    logits: Array = apply_head(model.causal_lm, states[part][None])[0].numpy()
    return logits
