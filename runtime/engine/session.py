"""A loaded artifact: token ids go in, logits come out. Knows nothing about text or sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..errors import PromptError, SettingsError
from .execution import Execution
from .loaded_graph import LoadedGraph
from .place import Logits
from .prefill import Pick, read
from .scoring import log_probabilities, score_continuation
from .state import DecodeState, LikeliestOutput, StepOutput
from .step import DecodeBinding, DeviceDecodeBinding

Array = NDArray[Any]
CPU_PREFILL_ROWS = 256
"""Tokens of all streams and texts that one prefill step reads on the CPU: with more, a product's activations leave the
core's cache (1,024 rows took 7 % longer a token at the Qwen2.5-0.5B shape)."""
PREFILL_ROWS = 1024
"""... on other providers."""


class Session(LoadedGraph):
    """One loaded artifact. Safe to share between states; a state belongs to one caller at a time."""

    def __init__(
        self,
        folder: Path | str,
        execution: Execution | None = None,
        *,
        profile: Path | None = None,
        **changes: Any,
    ) -> None:
        """Load the artifact in `folder`. execution: how it runs; `changes` override its fields or the defaults, such as
        `threads=1`. profile: the prefix of the path that onnxruntime's profile is written to. Raises ArtifactError,
        ProviderError or SettingsError."""
        execution = replace(execution or Execution(), **changes)
        super().__init__(folder, execution, profile)
        self.prefill_rows = CPU_PREFILL_ROWS if execution.provider == "cpu" else PREFILL_ROWS
        self._bindings: WeakKeyDictionary[DecodeState, DecodeBinding] = WeakKeyDictionary()

    def prefill(self, state: DecodeState, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> StepOutput:
        """Read one prompt per row, on top of what the state already holds, and return the logits that follow.

        prompts: B sequences of token ids, of any lengths. Generated tokens since the last prefill, and a pending one,
        join the query: a continued conversation equals a fresh run over the whole of it. chunk: the most tokens of a
        text that are read at once; None: what suits the provider (on the CPU 256 rows: 128 tokens of one text in two
        streams). Raises PromptError for an empty or too long prompt, or a token outside the vocabulary, and
        SettingsError for the chunk. After an exception the state is as it was before.
        """
        (logits,), gates = self._prefill(state, prompts, chunk, _whole)
        return StepOutput(logits, gates)

    def prefill_likeliest(
        self,
        state: DecodeState,
        prompts: Sequence[Sequence[int]],
        k: int = 1,
        chunk: int | None = None,
        probabilities: bool = False,
    ) -> LikeliestOutput:
        """`prefill`, which returns the k likeliest next tokens of each row instead of all logits: where the provider
        has its own memory, the others stay there. probabilities: whether to give the normalizer. Raises SettingsError
        for k too."""
        picked, gates = self._prefill(state, prompts, chunk, self._likeliest(k, probabilities))
        return _likeliest_output(picked, gates)

    def decode_step(self, state: DecodeState, tokens: Sequence[int] | Array) -> StepOutput:
        """Feed one chosen token per row; returns the logits that follow. Raises PromptError at the context's end, and
        for a row that has no prompt yet. After an exception the state is as it was before."""
        (logits,), gates = self._decode(state, tokens, _whole)
        return StepOutput(logits, gates)

    def decode_likeliest(
        self, state: DecodeState, tokens: Sequence[int] | Array, k: int = 1, probabilities: bool = False
    ) -> LikeliestOutput:
        """`decode_step`, which returns what `prefill_likeliest` returns."""
        picked, gates = self._decode(state, tokens, self._likeliest(k, probabilities))
        return _likeliest_output(picked, gates)

    def binding_of(self, state: DecodeState) -> DecodeBinding:
        """The bound decode step of a state, rebuilt when its arrays or caches were replaced."""
        binding = self._bindings.get(state)
        if binding is None or not binding.fits(state):
            make = DeviceDecodeBinding if self.on_device else DecodeBinding
            binding = make(self, state)
            self._bindings[state] = binding
        return binding

    def score(self, prompt: Sequence[int], continuation: Sequence[int], memory_bias: float = 0.0) -> Array:
        """Log-probabilities (nats) of each token of `continuation` after `prompt`: (len(continuation),) float64."""
        state = self.new_state(1, memory_bias)
        self.check_lengths(state, [[*prompt, *continuation]])
        self.check_tokens(np.asarray(continuation, np.int64))
        self.reserve(state, len(prompt) + len(continuation))
        if not len(continuation):
            self.prefill_likeliest(state, [prompt])
            return np.zeros(0)

        def first_token(logits: Logits) -> tuple[Array, ...]:
            return (log_probabilities(logits, continuation[:1]),)

        (first,), _ = self._prefill(state, [prompt], None, first_token)
        return score_continuation(self, state, first, continuation, self._chunk(1))

    def _prefill(
        self, state: DecodeState, prompts: Sequence[Sequence[int]], chunk: int | None, pick: Pick
    ) -> tuple[tuple[Array, ...], Array | None]:
        self.check_state(state)
        if len(prompts) != state.batch:
            raise PromptError(f"{len(prompts)} prompts for {state.batch} rows")
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise PromptError(f"prompt {index + 1} of {state.batch} is empty")
            self.check_tokens(np.asarray(prompt))
        texts = [
            [*([] if pending is None else [pending]), *prompt]
            for pending, prompt in zip(state.pending, prompts, strict=True)
        ]
        self.check_lengths(state, texts)
        if chunk is None:
            chunk = self._chunk(state.batch)
        if chunk < 1:
            raise SettingsError("chunk", chunk, "it must be at least 1")
        with state.unchanged_on_error():
            state.query_sum += state.reply_sum
            state.query_count += state.reply_count
            state.reply_sum[:] = 0
            state.reply_count[:] = 0
            # Once for all chunks: growing copies the caches.
            self.reserve(state, max(int(length) + len(text) for length, text in zip(state.lengths, texts, strict=True)))
            found = read(self, state, texts, chunk, pick)
            state.pending = [None] * state.batch
        return found

    def _decode(
        self, state: DecodeState, tokens: Sequence[int] | Array, pick: Pick
    ) -> tuple[tuple[Array, ...], Array | None]:
        chosen = np.asarray(tokens, np.int64).reshape(-1)
        self.check_state(state)
        if len(chosen) != state.batch:
            raise PromptError(f"{len(chosen)} tokens for {state.batch} rows")
        self.check_tokens(chosen)
        if not state.lengths.all():
            raise PromptError("a row has no prompt yet; read one by prefill before decoding")
        longest = int(state.lengths.max()) + 1
        if longest > self.manifest.context_length:
            raise PromptError(f"the text has reached the model's context of {self.manifest.context_length} tokens")
        self.reserve(state, longest)
        with state.unchanged_on_error():
            found = self.binding_of(state).step(state, chosen, pick)
            state.pending = [None] * state.batch
        return found

    def _likeliest(self, k: int, probabilities: bool) -> Pick:
        whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
        if not whole or not 1 <= k <= self.manifest.vocab_size:
            raise SettingsError("k", k, f"it must be 1 to {self.manifest.vocab_size}, the vocabulary")

        def pick(logits: Logits) -> tuple[Array, ...]:
            return (*logits.likeliest(k), *([logits.log_normalizer()] if probabilities else []))

        return pick

    def _chunk(self, batch: int) -> int:
        """Tokens of each of `batch` texts to read in one step."""
        return max(1, self.prefill_rows // (len(self.manifest.streams) * batch))


def _whole(logits: Logits) -> tuple[Array, ...]:
    return (logits.whole(),)


def _likeliest_output(picked: tuple[Array, ...], gates: Array | None) -> LikeliestOutput:
    ids, logits, *normalizer = picked
    return LikeliestOutput(ids, logits, normalizer[0] if normalizer else None, gates)
