"""The quality of a written graph on held-out texts, against the siamese model in PyTorch's float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from imsm_core.backbone import apply_head
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream, states_by_stream
from imsm_core.siamese import SiameseModel

from ..artifact import GRAPH
from ..virtual_tokens import load_virtual_cache
from .plain_run import Array, CachedGraph
from .quality import POSITIONS, QualityReport, measure_quality


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

    def found(text: Example) -> Iterator[Mapping[str, Array]]:
        for logits in graph.answers(range(len(names)), text.prompt_ids, text.answer_ids[:-1], POSITIONS):
            yield dict(zip(names, logits, strict=True))

    return measure_quality(partial(_reference, model), found, texts, report)


@torch.no_grad()
def _reference(model: SiameseModel, text: Example) -> Iterator[Mapping[str, Array]]:
    """PyTorch's side."""
    states, _, _ = states_by_stream(model, [text], get_args(Stream), pad_token_id=0)
    for start in range(0, len(text.answer_ids), POSITIONS):
        yield {
            "blend" if name == "fused" else name: apply_head(model.causal_lm, rows[None, start : start + POSITIONS])[
                0
            ].numpy()
            for name, rows in states.items()
        }
