"""The bound form of one decode step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from .state import DecodeState, StepOutput

if TYPE_CHECKING:
    from .session import Session

Array = NDArray[Any]


class DecodeBinding:
    """One decode step, bound once: small inputs and outputs are written in place, nothing is allocated per step."""

    def __init__(self, session: Session, state: DecodeState) -> None:
        self.session = session
        self.state = state
        batch, width = state.batch, session.manifest.hidden_size
        self.binding = session.onnx.io_binding()
        self.inputs: dict[str, Array] = {
            "input_ids": np.zeros((batch, 1), np.int64),
            "position_ids": np.zeros((batch, 1), np.int64),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "query_seqlens": np.ones(batch, np.int32),
            "logit_positions": np.zeros((batch, 1), np.int64),
            "query_mask": np.zeros((batch, 1), np.float32),
            "past_query_sum": state.query_sum,
            "past_query_count": state.query_count,
            "memory_bias": state.memory_bias,
        }
        self.outputs: dict[str, Array] = {"logits": np.zeros((batch, 1, session.manifest.vocab_size), np.float32)}
        if session.siamese:
            self.outputs["gate_mean"] = np.zeros((batch, 1), np.float32)
            self.outputs["hidden_base"] = np.zeros((batch, 1, width), np.float32)
            self.outputs["hidden_adapter"] = np.zeros((batch, 1, width), np.float32)
        for name, array in self.inputs.items():
            if name in session.input_names:
                self.binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, array in self.outputs.items():
            self.binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        session.bind_caches(self.binding, state, None)

    def step(self, tokens: Array) -> StepOutput:
        """Feed one token per row."""
        state, inputs = self.state, self.inputs
        inputs["input_ids"][:, 0] = tokens
        inputs["position_ids"][:, 0] = state.lengths
        inputs["seqlens_k"][:] = state.lengths
        inputs["total_sequence_length"][...] = state.lengths.max() + 1
        self.session.onnx.run_with_iobinding(self.binding)
        state.lengths += 1
        logits = self.outputs["logits"][:, 0].copy()
        if not self.session.siamese:
            return StepOutput(logits, None)
        state.reply_sum[:, 0] += self.outputs["hidden_base"][:, 0]
        state.reply_sum[:, 1] += self.outputs["hidden_adapter"][:, 0]
        state.reply_count += 1
        return StepOutput(logits, self.outputs["gate_mean"][:, 0].copy())
