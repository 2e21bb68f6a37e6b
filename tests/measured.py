"""The quality gate of an artifact whose model is at hand, held against other ways to the same numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from export.verification.measure import evaluate
from imsm_core.backbone import apply_head
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream
from imsm_core.evaluate import evaluate as loss_of
from imsm_core.reference import reference_generate
from runtime import Session
from tests.builders import VOCABULARY
from tests.exported import PROMPT, Exported

STREAMS: dict[str, Stream] = {"blend": "fused", "base": "base", "adapter": "adapter"}
FORCED = {"base": 1e4, "adapter": -1e4}
UNFORCED = {"residual": {"adapter"}, "query_mixed": {"base", "adapter"}}
"""Memories that no bias brings a kind of gate to."""
PAD = 2


def check_memories_apart(exported: Exported) -> None:
    """The report's reference is the loss of each stream in PyTorch. What it compares is the runtime's, with the dial at
    an end for each memory where a dial brings it there."""
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


def check_each_memory(exported: Exported) -> None:
    """The logits of each memory alone, of a few steps: PyTorch's lm_head of each stream's state."""
    session = Session(exported.artifact, threads=1)
    state = session.new_state(1)
    output = session.prefill(state, [PROMPT], by_memory=True)
    for step in reference_generate(exported.model, PROMPT, 4):
        with torch.no_grad():
            states = torch.stack([step.hidden_base, step.hidden_adapter])
            expected = apply_head(exported.model.causal_lm, states[None])[0].numpy()
        assert output.memory_logits is not None
        np.testing.assert_allclose(output.memory_logits[0], expected, atol=1e-4)
        output = session.decode_step(state, [step.token], by_memory=True)
