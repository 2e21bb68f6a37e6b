"""The siamese model: one frozen backbone in memory, run as two streams, and a gate.

Source: IMSM (arXiv 2412.17383). Knows nothing about data, optimizers or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters.attach import adapted_layers, causal_lm, check_adapter, free_lm_head, known_warnings_ignored
from .adapters.biases import original_biases
from .adapters.virtual_tokens import adapter_hidden_state, context_length, virtual_tokens
from .backbone import apply_head, last_hidden_state
from .errors import AdapterError, first_line
from .gates import Gate, Gated, Memories


class StreamStates(NamedTuple):
    """Last hidden states of the base stream and of the adapter stream, each (B, S, d)."""

    base: Tensor
    adapter: Tensor


class SiameseModel(nn.Module):
    """A PEFT model and a gate. The base stream is the same module with the adapter disabled.

    peft_model: with one adapter active; others may be loaded beside it. Raises AdapterError if IMSM cannot use the
    adapter.
    """

    def __init__(self, peft_model: PeftModel, gate: Gate) -> None:
        super().__init__()
        free_lm_head(peft_model)
        check_adapter(peft_model)
        self.peft_model = peft_model
        self.gate = gate.to(next(peft_model.parameters()).device)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face causal LM inside the PEFT model, with the adapter's layers in place."""
        return causal_lm(self.peft_model)

    def train(self, mode: bool = True) -> SiameseModel:
        """Training mode, but only for the adapter and the gate: the frozen backbone never applies dropout, so that
        the base stream stays the pre-trained model."""
        super().train(mode)
        self.causal_lm.eval()
        for layer in adapted_layers(self.peft_model):
            layer.tuner.train(mode)
            layer.frozen.eval()
        return self

    def stream_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> StreamStates:
        """input_ids: (B, S) int64, right-padded; attention_mask: (B, S), 0 at padding. No gradient enters the base
        stream. Raises DataError if the text and the adapter's virtual tokens together exceed the model's context."""
        with torch.no_grad(), self.adapter_disabled():
            base = last_hidden_state(self.causal_lm, input_ids=input_ids, attention_mask=attention_mask)
        return StreamStates(base, adapter_hidden_state(self.peft_model, input_ids, attention_mask))

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside the block the causal LM is the base stream. PEFT's own context leaves the adapter trainable when it
        ends, even one that was frozen."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.peft_model.parameters()]
        try:
            with known_warnings_ignored(), self.peft_model.disable_adapter(), original_biases(self.peft_model):
                yield
        finally:
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)

    @torch.no_grad()
    def check_forward(self) -> None:
        """Run both streams on a few tokens, in eval mode. Raises AdapterError if the adapter does not
        run on this model, although its config and values fit, or a stream's states are not finite."""
        mode, model = self.training, self.causal_lm
        device = next(model.parameters()).device
        context = context_length(model)
        room = 3 if context is None else context - virtual_tokens(self.peft_model)
        length = min(3, int(model.config.get_text_config().vocab_size), max(1, room))
        self.eval()
        try:
            with known_warnings_ignored():
                states = self.stream_states(torch.arange(length, device=device)[None])
        except Exception as error:  # whatever a layer raises for shapes or indices that do not fit
            raise AdapterError(f"the adapter does not run on this model: {first_line(error)}") from error
        finally:
            self.train(mode)
        for stream, state in states._asdict().items():
            if not bool(torch.isfinite(state).all()):
                raise AdapterError(f"the {stream} stream gives values that are not finite")

    def fused_states(
        self, states: StreamStates, query_mask: Tensor, rows: Tensor, positions: Tensor, memory_bias: float = 0.0
    ) -> Gated:
        """The gate's results (M, d) at chosen positions only.

        query_mask: (B, S), 1 at the prompt's tokens. rows, positions: (M,) int64, the wanted (row, position) pairs.
        """
        query_base, query_adapter = (masked_mean(state, query_mask) for state in states)
        memories = Memories(
            states.base[rows, positions], states.adapter[rows, positions], query_base[rows], query_adapter[rows]
        )
        bias = torch.tensor(memory_bias, device=query_base.device) if memory_bias else None
        gated: Gated = self.gate(memories, bias)
        return gated

    def fused_logits(
        self, states: StreamStates, query_mask: Tensor, rows: Tensor, positions: Tensor, memory_bias: float = 0.0
    ) -> tuple[Tensor, Gated]:
        """Logits (M, vocab) and the gate's results (M, d) at chosen positions only, as `fused_states`."""
        gated = self.fused_states(states, query_mask, rows, positions, memory_bias)
        return apply_head(self.causal_lm, gated.fused[None])[0], gated

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's and the gate's parameters by name; nothing else is trained."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(B, d) float32: the mean of states (B, S, d) over the positions where mask (B, S) is 1."""
    weights = mask.to(torch.float32)[..., None]
    return (states.float() * weights).sum(1) / weights.sum(1)
