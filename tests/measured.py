"""The quality gate of an artifact whose model is at hand, held against other ways to the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from export.verification.head import GraphHead
from export.verification.measure import evaluate
from imsm_core.backbone import apply_head
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream
from imsm_core.evaluate import evaluate as loss_of
from runtime import Session
from tests.builders import VOCABULARY
from tests.exported import Exported

STREAMS: dict[str, Stream] = {"blend": "fused", "base": "base", "adapter": "adapter"}
FORCED = {"base": 1e4, "adapter": -1e4}
UNFORCED = {"residual": {"adapter"}, "query_mixed": {"base", "adapter"}}
"""Memories that no bias brings a kind of gate to."""
PAD = 2


def check_memories_apart(exported: Exported) -> None:
    """The report's reference is the loss of each stream in PyTorch. What it compares is the runtime's, with the dial at
    an end for each memory; and the graph's head gives one memory's logits where no dial does, too."""
    exact = exported.manifest["precision"] == "fp32"
    longest = min(90, exported.manifest["model"]["context_length"])
    generator = np.random.default_rng(3)
    texts = [
        Example(*(generator.integers(3, VOCABULARY, size).tolist() for size in sizes))
        for sizes in ((9, longest - 9), (2, 20), (30, 1))
    ]
    streams = tuple(exported.manifest["streams"])
    report = evaluate(exported.artifact, exported.model, streams, texts, "cpu", report=lambda line: None)
    assert [*report.measured] == ([*STREAMS] if len(streams) > 1 else ["base"])
    assert report.tokens == longest + 12
    assert len({round(found.perplexity_reference, 3) for found in report.measured.values()}) == len(report.measured)
    session = Session(exported.artifact, threads=1, kernels=False)
    forced = FORCED if len(streams) > 1 else {}
    for name, found in report.measured.items():
        loss = loss_of(exported.model, texts, STREAMS[name], PAD).loss
        assert math.log(found.perplexity_reference) == pytest.approx(loss, rel=1e-5)
        assert (0 <= found.mean_kl < 1e-8) if exact else found.mean_kl > 0
        if exported.manifest["gate"] is None or name not in UNFORCED.get(exported.manifest["gate"]["kind"], ()):
            bias = forced.get(name, 0.0)
            scores = [session.score(text.prompt_ids, text.answer_ids, memory_bias=bias) for text in texts]
            assert math.log(found.perplexity) == pytest.approx(-np.concatenate(scores).mean(), abs=1e-3)
    if len(streams) > 1:
        states = torch.randn((5, exported.manifest["model"]["hidden_size"]), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = apply_head(exported.model.causal_lm, states[None])[0].numpy()
        head = GraphHead(exported.artifact / "model.onnx")
        difference = np.abs(head(states.numpy()) - logits).max()
        assert difference < (1e-5 if exact else 0.2) * np.abs(logits).max()
