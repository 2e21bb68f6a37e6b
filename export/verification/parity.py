"""Comparing an exported graph with PyTorch, by value, before anyone relies on it.

Ways of computing the same text are compared with two plain PyTorch passes over it: a whole prefill of a ragged batch, a
chunked prefill, cached decode steps that take the graph's own greedy tokens, and a prefill of each memory alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer

from imsm_core.backbone import apply_head, last_hidden_state
from imsm_core.gates import Memories
from imsm_core.siamese import SiameseModel, masked_mean

from ..artifact import GRAPH
from ..errors import VerificationError
from ..two_stream import ADAPTER, BASE
from ..virtual_tokens import load_virtual_cache
from .plain_run import CachedGraph

Array = NDArray[Any]
COMPARED = ("hidden_base", "hidden_adapter", "gate", "hidden_fused", "logits")
ALONE = {"logits_base": BASE, "logits_adapter": ADAPTER}
"""The logits of one memory alone, by the names that they have here, as the graph's input `memory` asks for them."""
DECODE_STEPS = 32
FP32_TOLERANCE, FP32_TOLERANCE_DEEP, DEEP_LAYERS = 1e-4, 1e-3, 16
ROUNDING_FACTOR = 4  # of PyTorch's own distance from float64


LIMIT_OF_ROUNDING = 0.5
"""Of a position's root mean square: how much of it int8 arithmetic or caches may change at the middle one of all
positions. Single positions may be far off, where attention is sharp or another expert is chosen; a wrong tensor changes
all of them, and unrelated values are off by more than the size of the expected ones."""


class Failure(NamedTuple):
    """One difference past its limit."""

    way: str
    name: str
    difference: float
    limit: float


@dataclass
class ParityReport:
    """Largest absolute differences from PyTorch, by way of computing and by output.

    tolerance: both the absolute one and the one relative to an output's largest value. rounded: the graph rounds to
    int8 as it computes, so that LIMIT_OF_ROUNDING judges, in `judge_positions`. rounding: how far PyTorch's own float32
    is from its float64, by output; only where a difference is past the tolerance. provider: what ran the graph; None:
    nothing did. changes: where `rounded`, by way and output, how much the middle position changes, relative to its root
    mean square.
    """

    tolerance: float
    rounded: bool = False
    provider: str | None = None
    differences: dict[str, dict[str, float]] = field(default_factory=dict)
    changes: dict[str, dict[str, float]] = field(default_factory=dict)
    decode_steps: int = 0
    greedy_tokens_equal: int = 0
    rounding: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    _positions: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def compare(self, way: str, name: str, found: Array, expected: Array) -> None:
        """Note the differences at some positions, (..., values), and a failure where one is past the tolerance or not a
        number."""
        differences = found.astype(np.float64) - expected
        difference = float(np.abs(differences).max())
        worst = self.differences.setdefault(way, {})
        worst[name] = max(worst.get(name, 0.0), difference)
        if self.rounded:
            sizes = np.sqrt((expected.astype(np.float64) ** 2).mean(-1))
            changes = np.sqrt((differences**2).mean(-1)) / np.maximum(sizes, np.finfo(np.float32).tiny)
            of_way = self._positions.setdefault(way, {})
            of_way.setdefault(name, []).extend(np.atleast_1d(changes).tolist())
            return
        limit = self.tolerance * (1 + float(np.abs(expected).max()))
        if not difference <= limit:
            self.failures.append(Failure(way, name, difference, limit))

    def judge_positions(self) -> None:
        """Fill in `changes`, and note a failure for every output that rounding alone does not explain; with an
        infinite tolerance only for what is not a number."""
        for way, outputs in self._positions.items():
            self.changes[way] = {name: float(np.median(changes)) for name, changes in outputs.items()}
        for name in {name: None for outputs in self._positions.values() for name in outputs}:
            everywhere = [change for outputs in self._positions.values() for change in outputs.get(name, [])]
            middle = float(np.median(everywhere))
            limit = LIMIT_OF_ROUNDING if math.isfinite(self.tolerance) else math.inf
            if not middle <= limit:
                self.failures.append(Failure("most positions", name, middle, limit))

    def add(self, other: ParityReport, suffix: str) -> None:
        """Take in the differences of another form of the graph; its ways get `suffix`."""
        self.differences |= {way + suffix: found for way, found in other.differences.items()}
        self.changes |= {way + suffix: found for way, found in other.changes.items()}

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "provider": self.provider,
            "tolerance": self.tolerance,
            "max_abs_difference": self.differences,
            "middle_change": self.changes or None,
            "decode_steps": self.decode_steps,
            "greedy_tokens_equal": self.greedy_tokens_equal,
            "pytorch_rounding": self.rounding or None,
        }


def verify_graph(
    folder: Path,
    model: SiameseModel,
    streams: tuple[str, ...],
    context_length: int,
    tolerance: float | None = None,
    rounded: bool = False,
    provider: str = "cpu",
) -> ParityReport:
    """Compare the graph in `folder` with `model` (on the CPU, float32, eval mode, the weights that the file has).

    tolerance: None is float32's. rounded: as in `ParityReport`. provider: the execution provider that runs the graph.
    Raises VerificationError, or ExportError if the provider does not start.
    """
    virtual = load_virtual_cache(folder)
    cached = CachedGraph(folder / GRAPH, virtual, provider=provider)
    layers = 1 + max(int(name.split(".")[2]) for name in cached.inputs if name.startswith("past_key_values."))
    if tolerance is None:
        tolerance = FP32_TOLERANCE_DEEP if layers > DEEP_LAYERS else FP32_TOLERANCE
    report = ParityReport(tolerance, rounded, provider)
    vocabulary = next(value.shape[-1] for value in cached.session.get_outputs() if value.name == "logits")
    generator = np.random.default_rng(0)
    # Texts as long as the context allows, and no longer than needed to cover ragged rows and chunks.
    steps = min(DECODE_STEPS, max(1, context_length // 2))
    long = max(2, min(12, context_length - steps))
    lengths = (long, max(1, long * 7 // 12))
    prompts = [[int(token) for token in generator.integers(0, vocabulary, length)] for length in lengths]
    for place, token in enumerate(_trained_tokens(model.peft_model)[: long // 2]):
        prompts[0][2 * place] = token  # random text hardly ever contains them

    # 1. The graph: prefill of the ragged batch, then greedy decode steps.
    prefill = cached.prefill(prompts)
    texts, stepped = [list(prompt) for prompt in prompts], []
    tokens = [int(prefill["logits"][row, length - 1].argmax()) for row, length in enumerate(lengths)]
    for _ in range(steps):
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        stepped.append(cached.decode(tokens))
        tokens = [int(row.argmax()) for row in stepped[-1]["logits"][:, 0]]
    # 2. The graph again, in two chunks of the first prompt.
    pieces = [prompts[0][: long // 2], prompts[0][long // 2 :]]
    chunked = CachedGraph(folder / GRAPH, virtual, cached.session).chunks(pieces)

    # 3. The graph once more, for each memory alone.
    alone: dict[str, Array] = {}
    if len(streams) > 1:
        apart = CachedGraph(folder / GRAPH, virtual, cached.session)
        memories = apart.answers([*ALONE.values()], prompts[0][:1], prompts[0][1:], len(prompts[0]))
        alone = dict(zip(ALONE, next(memories), strict=True))

    # 4. PyTorch: one plain pass per stream over each whole text. It is causal, so that every position is a step.
    expected = [expected_outputs(model, text, length, streams) for text, length in zip(texts, lengths, strict=True)]

    # 5. Compare.
    shared = [name for name in expected[0] if name not in ALONE]
    for row, (length, wanted) in enumerate(zip(lengths, expected, strict=True)):
        for name in shared:
            report.compare("prefill", name, prefill[name][row, :length], wanted[name][:length])
            for step, outputs in enumerate(stepped):
                report.compare("decode", name, outputs[name][row, 0], wanted[name][length + step])
        greedy = wanted["logits"][length - 1 : -1].argmax(-1)
        report.greedy_tokens_equal += int((greedy == texts[row][length:]).sum())
        report.decode_steps += steps
    last = len(prompts[0]) - 1
    for name in shared:  # a chunk's gate sees the query so far: only the last chunk's last position sees it whole
        report.compare("chunked prefill", name, chunked[name][0, -1], expected[0][name][last])
    for name, logits in alone.items():
        report.compare("one memory", name, logits, expected[0][name][: lengths[0]])
    report.judge_positions()
    if report.failures:
        _judge_failures(report, model, texts, lengths, streams, expected)
    return report


def _judge_failures(
    report: ParityReport,
    model: SiameseModel,
    texts: Sequence[list[int]],
    lengths: Sequence[int],
    streams: tuple[str, ...],
    expected: list[dict[str, Array]],
) -> None:
    """Raise VerificationError, unless PyTorch's own float32 is as far from float64 as the graph is from PyTorch: an
    ill-conditioned model, whose rounding depends on the order of sums."""
    with contextlib.suppress(RuntimeError, TypeError), _in_float64(model):  # code that insists on float32
        for text, length, rounded in zip(texts, lengths, expected, strict=True):
            for name, exact in expected_outputs(model, text, length, streams).items():
                difference = float(np.abs(rounded[name] - exact).max())
                report.rounding[name] = max(report.rounding.get(name, 0.0), difference)
    for failure in report.failures:
        if not failure.difference <= ROUNDING_FACTOR * report.rounding.get(failure.name, 0.0):
            raise VerificationError(
                f"the graph does not compute what PyTorch computes: {failure.name} in {failure.way} is off by "
                f"{failure.difference:.2e}, more than {failure.limit:.2e}"
            )


@contextlib.contextmanager
def _in_float64(model: SiameseModel) -> Iterator[None]:
    """Inside the block both streams compute in float64, the gate in float32 as always; the values are the same before,
    inside and after."""
    try:
        model.peft_model.double()
        yield
    finally:
        model.peft_model.float()


def _trained_tokens(peft_model: PeftModel) -> list[int]:
    """The tokens whose embeddings the adapter trained."""
    layers = [module for module in peft_model.modules() if isinstance(module, TrainableTokensLayer)]
    return [int(token) for layer in layers for token in layer.token_indices.get(peft_model.active_adapter, [])]


@torch.no_grad()
def expected_outputs(
    model: SiameseModel, text: list[int], prompt_length: int, streams: tuple[str, ...]
) -> dict[str, Array]:
    """The compared outputs at every position of one text, each (S, ...)."""
    input_ids = torch.tensor([text])
    if len(streams) == 1:
        with model.peft_model.disable_adapter():
            hidden = last_hidden_state(model.causal_lm, input_ids=input_ids)
        return {"hidden_base": hidden[0].numpy(), "logits": apply_head(model.causal_lm, hidden)[0].numpy()}
    states = model.stream_states(input_ids)
    query_mask = torch.zeros_like(input_ids)
    query_mask[:, :prompt_length] = 1
    query_base, query_adapter = (masked_mean(state, query_mask)[:, None] for state in states)
    gated = model.gate(Memories(states.base, states.adapter, query_base, query_adapter))
    logits = apply_head(model.causal_lm, gated.fused)
    alone = [apply_head(model.causal_lm, state) for state in states]
    found = (states.base, states.adapter, gated.gate, gated.fused, logits, *alone)
    return {name: tensor[0].numpy() for name, tensor in zip((*COMPARED, *ALONE), found, strict=True)}
