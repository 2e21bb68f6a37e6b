"""An exported graph run with plain NumPy arrays: slower than the runtime, and independent of it. Caches in bfloat16,
which NumPy has not, stay onnxruntime's own values from run to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from imsm_core.errors import first_line

from ..errors import VerificationError
from ..providers import open_graph
from ..virtual_tokens import VirtualCache

Array = NDArray[Any]
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(bfloat16)": np.uint16,
}
BFLOAT16 = 16  # as ONNX numbers element types


class CachedGraph:
    """Prefill, chunks and decode steps of a batch; `present` of one run is `past` of the next.

    provider: the execution provider that runs it, as `open_graph` takes it; a `session` that is open is used as it is.
    """

    def __init__(
        self,
        path: Path,
        virtual: VirtualCache,
        session: onnxruntime.InferenceSession | None = None,
        provider: str = "cpu",
    ) -> None:
        self.session = open_graph(path, provider) if session is None else session
        session = self.session
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = [value.name for value in session.get_outputs()]
        self.virtual = virtual
        self.state: dict[str, Array | onnxruntime.OrtValue] = {}
        self.lengths = np.zeros(0, np.int64)

    def prefill(self, prompts: list[list[int]]) -> dict[str, Array]:
        """A ragged batch, right-padded, with logits at every position. In the portable form, where the cache begins
        with virtual tokens, one row after the other: GroupQueryAttention then continues a single row's cache only."""
        if not self.virtual or "query_seqlens" in self.inputs:
            return self._prefill(prompts)
        outputs, states = [], []
        for prompt in prompts:
            outputs.append(self._prefill([prompt]))
            states.append({name: np.asarray(value) for name, value in self.state.items()})
        self.state = {name: _stack_padded([state[name] for state in states]) for name in states[0]}
        self.lengths = np.array([len(prompt) for prompt in prompts])
        return {name: _stack_padded([output[name] for output in outputs]) for name in outputs[0]}

    def _prefill(self, prompts: list[list[int]]) -> dict[str, Array]:
        rows, longest = len(prompts), max(map(len, prompts))
        input_ids = np.zeros((rows, longest), np.int64)
        query_mask = np.zeros((rows, longest), np.float32)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = prompt
            query_mask[row, : len(prompt)] = 1
        self._reset(rows)
        self.lengths = np.array([len(prompt) for prompt in prompts])
        return self._run(input_ids, query_mask, np.tile(np.arange(longest), (rows, 1)), self.lengths)

    def answers(self, memories: Sequence[int], query: list[int], answer: list[int], most: int) -> Iterator[Array]:
        """Logits of each of `memories`, as the graph's input `memory` has them, after the query and after each token of
        the answer, at `most` positions at a time: (memories, n, vocab). A step reads no more than it gives logits of,
        and the first one the query too."""
        self._reset(1)
        self.lengths = np.zeros(1, np.int64)
        text = [*query, *answer]
        start, first = 0, len(query) - 1
        while first < len(text):
            end = min(first + most, len(text))
            positions = np.arange(start, end)
            self.lengths = self.lengths + len(positions)
            mask = (positions < len(query))[None].astype(np.float32)
            asked = np.arange(first, end) - start
            wanted, memory = np.tile(asked, len(memories)), np.repeat(memories, len(asked))
            new = np.array([len(positions)])
            outputs = self._run(np.array([text[start:end]]), mask, positions[None], new, wanted[None], memory[None])
            logits: Array = outputs["logits"]
            yield logits.reshape(len(memories), len(asked), -1)
            start = first = end

    def decode(self, tokens: list[int]) -> dict[str, Array]:
        """One token a row."""
        input_ids = np.array(tokens)[:, None]
        self.lengths = self.lengths + 1
        ones = np.ones(len(tokens), np.int64)
        return self._run(input_ids, np.zeros(input_ids.shape, np.float32), self.lengths[:, None] - 1, ones)

    def chunks(self, chunks: list[list[int]]) -> dict[str, Array]:
        """One prompt in pieces; returns the last piece's outputs."""
        self._reset(1)
        outputs: dict[str, Array] = {}
        self.lengths = np.zeros(1, np.int64)
        for chunk in chunks:
            positions = self.lengths[:, None] + np.arange(len(chunk))[None]
            self.lengths = self.lengths + len(chunk)
            new = np.array([len(chunk)])
            outputs = self._run(np.array([chunk]), np.ones((1, len(chunk)), np.float32), positions, new)
        return outputs

    def _reset(self, batch: int) -> None:
        self.state = {}
        for name, value in self.inputs.items():
            if name.startswith("past_"):
                group, _, place = name.removeprefix("past_key_values.").partition(".")
                rows = 2 * batch if group == "both" else batch
                shape = [rows, *(0 if isinstance(size, str) else size for size in value.shape[1:])]
                first = np.zeros(shape, DTYPES[value.type])
                if self.virtual and group in ("both", "adapter"):
                    adapter = self.virtual[place][None].repeat(batch, 0).astype(first.dtype)
                    # The base stream's rows have room there and nothing in it: their lengths leave it out.
                    first = adapter if group == "adapter" else np.concatenate([np.zeros_like(adapter), adapter])
                bfloat16 = value.type == "tensor(bfloat16)"
                self.state[name] = _bfloat16_value(first) if bfloat16 else first

    def _run(
        self,
        input_ids: Array,
        query_mask: Array,
        positions: Array,
        new: Array,
        wanted: Array | None = None,
        memory: Array | None = None,
    ) -> dict[str, Array]:
        """wanted: (B, N), where outputs are; None: at every new token. memory: (B, N), of which memory; None: the
        blend."""
        rows, sequence = input_ids.shape
        wanted = np.tile(np.arange(sequence), (rows, 1)) if wanted is None else wanted
        feed = {
            "input_ids": input_ids,
            "position_ids": positions.astype(np.int64),
            "seqlens_k": (self.lengths - 1).astype(np.int32),
            # Room for the padding of every row, unless no row has any.
            "total_sequence_length": np.array((self.lengths - new).max() + sequence, np.int32),
            "query_seqlens": new.astype(np.int32),
            "logit_positions": wanted,
            "query_mask": query_mask,
            "memory_bias": np.zeros(wanted.shape, np.float32),
            "memory": np.zeros(wanted.shape, np.int64) if memory is None else memory,
            **self.state,
        }
        values = {
            name: array if isinstance(array, onnxruntime.OrtValue) else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in feed.items()
            if name in self.inputs
        }
        try:
            results = self.session.run_with_ort_values(self.outputs, values)
        except Exception as error:  # onnxruntime's own types, one for each of its status codes
            raise VerificationError(f"onnxruntime cannot run the graph: {first_line(error)}") from error
        outputs: dict[str, Any] = {
            name: value if value.data_type() == "tensor(bfloat16)" else value.numpy()
            for name, value in zip(self.outputs, results, strict=True)
        }
        for name in self.state:
            present = name.replace("past_key_values", "present").replace("past_query", "present_query")
            self.state[name] = outputs[present]
        return outputs


def _bfloat16_value(bits: Array) -> onnxruntime.OrtValue:
    """bits: uint16, those of the numbers."""
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, BFLOAT16)


def _stack_padded(arrays: list[Array]) -> Array:
    """One array of all rows, each (1, ...) padded at the end with zeros to the longest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    return np.concatenate([np.pad(a, [(0, more) for more in shape - a.shape]) for a in arrays])
