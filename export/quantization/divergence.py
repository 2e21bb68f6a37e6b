"""How far rounded weights take a model's predictions, without a graph: its layers compute with the rounded values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imsm_core.backbone import apply_head
from imsm_core.data.dataset import Example
from imsm_core.evaluate import Stream, states_by_stream
from imsm_core.head_loss import pieces
from imsm_core.siamese import SiameseModel

from .layers import backbone_layers, expert_weights, head_layer
from .precision import rounded_experts, rounded_weights
from .weight_format import QuantizedWeight

ACTIVATION_BLOCK = 32
"""Activations that are rounded to int8 together, as the runtime's kernels do."""


@dataclass(frozen=True)
class Divergence:
    """Mean KL(float32 || rounded) of the answers' tokens, nats a token."""

    base: float
    blend: float

    @property
    def worst(self) -> float:
        """The larger one."""
        return max(self.base, self.blend)


class Reference:
    """A model's predictions in float32. judged: texts, whose prompts are the gate's query. base_only: whether there is
    no blend to judge."""

    def __init__(self, model: SiameseModel, judged: Sequence[Example], base_only: bool) -> None:
        self.model, self.judged = model, judged
        self.streams: tuple[Stream, ...] = ("base",) if base_only else ("base", "fused")
        self._head = head_layer(model)[1].get_parameter("weight")
        self._states = [self._read(text) for text in judged]

    @torch.no_grad()
    def divergence(
        self,
        weights: Mapping[str, QuantizedWeight],
        round_activations: bool,
        experts: tuple[int, int, bool] | None = None,
    ) -> Divergence:
        """Of the model with these weights, by their layers' names. round_activations: to int8, as the products of a
        finished graph do. experts: the bits, block size and symmetry to which those are rounded; None leaves them."""
        head, sums, tokens = self._head.data, dict.fromkeys(self.streams, 0.0), 0
        with ExitStack() as stack:
            if round_activations:
                stack.enter_context(_rounded_inputs(self.model))
            traced = {f"model.{name}.weight": weight for name, weight in weights.items()}
            stack.enter_context(rounded_weights(self.model.causal_lm, traced))
            if experts is not None:
                stack.enter_context(rounded_experts(self.model.causal_lm, expert_weights(self.model), *experts))
            rounded_head = self._head.data
            for text, expected in zip(self.judged, self._states, strict=True):
                found = self._read(text)
                tokens += len(text.answer_ids)
                for stream in self.streams:
                    for part in pieces(self.model.causal_lm, len(text.answer_ids)):
                        actual = self._log_probabilities(found[stream][part])
                        self._head.data = head
                        wanted = self._log_probabilities(expected[stream][part])
                        self._head.data = rounded_head
                        sums[stream] += float((wanted.exp() * (wanted - actual)).sum(dtype=torch.float64))
        means = [sums[stream] / tokens for stream in self.streams]
        return Divergence(means[0], means[-1])

    def _read(self, text: Example) -> dict[Stream, Tensor]:
        """By stream: the last hidden states (N, d) that predict the answer."""
        with torch.no_grad():
            return states_by_stream(self.model, [text], self.streams, pad_token_id=0)[0]

    def _log_probabilities(self, states: Tensor) -> Tensor:
        logits: Tensor = apply_head(self.model.causal_lm, states[None])[0].float()
        return logits.log_softmax(-1)


@contextmanager
def _rounded_inputs(model: SiameseModel) -> Iterator[None]:
    """Inside the block layers read activations that are rounded as the runtime's kernels round them."""

    def round_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return rounded_activations(args[0]), *args[1:]

    with ExitStack() as stack:
        for layer in (*backbone_layers(model).values(), head_layer(model)[1]):
            stack.callback(layer.register_forward_pre_hook(round_input).remove)
        yield


def rounded_activations(values: Tensor) -> Tensor:
    """(..., K): to int8 in blocks of ACTIVATION_BLOCK, the largest of each is met."""
    width = values.shape[-1]
    blocks = functional.pad(values, (0, -width % ACTIVATION_BLOCK)).unflatten(-1, (-1, ACTIVATION_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks / torch.where(scale == 0, 1.0, scale)).round()
    rounded: Tensor = (codes * scale).flatten(-2)[..., :width]
    return rounded
