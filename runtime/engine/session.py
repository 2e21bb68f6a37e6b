"""A loaded artifact: token ids go in, logits come out. Knows nothing about text or sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..checks import instance, is_sequence, typed, whole_number
from ..errors import PromptError, SettingsError, shown
from .execution import Execution
from .loaded_graph import LoadedGraph
from .marks import MOST_TOKENS
from .memories import MEMORIES
from .picks import BLEND, EachMemory, Likeliest, LogProbabilities, Picks, TokenScores, Whole
from .place import HostLogits
from .prefill import read
from .prompt_logprobs import PromptLogprobs, read_with_logprobs
from .scoring import score_continuation
from .state import DecodeState, LikeliestOutput, StepOutput, StepsOutput
from .step import DecodeBinding, DeviceDecodeBinding
from .steps import feed

Array = NDArray[Any]
Output = TypeVar("Output")
CPU_PREFILL_ROWS = 256
"""Tokens of all streams and texts that one prefill step reads on the CPU: with more, a product's activations leave the
core's cache (1,024 rows took 7 % longer a token at the Qwen2.5-0.5B shape)."""
PREFILL_ROWS = 1024
"""... on other providers."""


class Session(LoadedGraph):
    """One loaded artifact. Safe to share between states; a state belongs to one caller at a time.

    After an exception in a step, Ctrl-C too, the step's state is as it was before.
    """

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
        if execution is not None:
            instance("execution", execution, Execution)
        execution = replace(execution or Execution(), **changes)
        super().__init__(folder, execution, typed("profile", profile, Path | None))
        self.prefill_rows = CPU_PREFILL_ROWS if execution.provider == "cpu" else PREFILL_ROWS
        self._bindings: WeakKeyDictionary[DecodeState, DecodeBinding] = WeakKeyDictionary()

    def prefill(
        self, state: DecodeState, prompts: Sequence[Sequence[int]], chunk: int | None = None, by_memory: bool = False
    ) -> StepOutput:
        """Read one prompt per row, on top of what the state already holds, and return the logits that follow.

        prompts: B sequences of token ids, of any lengths. Generated tokens since the last prefill, and a pending one,
        join the query: a continued conversation equals a fresh run over the whole of it. chunk: the most tokens of a
        text that are read at once; None: what suits the provider (on the CPU 256 rows: 128 tokens of one text in two
        streams). by_memory: whether to give each memory's own logits beside the blend's; no `memory_bias` changes them.

        Raises PromptError for an empty or too long prompt, for what is no token id of the vocabulary, and for a state
        of another artifact or in another thread's step; ArtifactError for logits that are not finite (-inf is allowed
        where it masks some tokens); ProviderError where onnxruntime cannot run the graph; and SettingsError for the
        chunk, and where an artifact of one stream, or of format 5 or 6, is asked `by_memory`.
        """
        return self._prefill(state, prompts, chunk, self._whole(by_memory))

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
        return self._prefill(state, prompts, chunk, self._likeliest(k, probabilities))

    def decode_step(self, state: DecodeState, tokens: Sequence[int] | Array, by_memory: bool = False) -> StepOutput:
        """Feed one chosen token per row, (B,) whole numbers; returns the logits that follow. Raises PromptError at the
        context's end, and for a row that has no prompt yet; otherwise as `prefill`."""
        return self._decode(state, tokens, self._whole(by_memory))

    def decode_likeliest(
        self, state: DecodeState, tokens: Sequence[int] | Array, k: int = 1, probabilities: bool = False
    ) -> LikeliestOutput:
        """`decode_step`, which returns what `prefill_likeliest` returns."""
        return self._decode(state, tokens, self._likeliest(k, probabilities))

    def continue_step(self, state: DecodeState, tokens: Sequence[int] | Array, by_memory: bool = False) -> StepsOutput:
        """Feed several chosen tokens of the reply of a state of one row, (S,), in one run: equal to S decode steps up
        to rounding. `state.trim` takes back any of them. Raises PromptError for no token, for more than
        `marks.MOST_TOKENS`, and for another number of rows; otherwise as `decode_step`."""
        self.check_state(state)
        chosen = self.token_ids(tokens)
        if state.batch != 1:
            raise PromptError(f"several tokens continue a state of one row; this one has {state.batch}")
        if not 1 <= len(chosen) <= MOST_TOKENS:
            raise PromptError(f"{len(chosen)} tokens are fed at once; it must be 1 to {MOST_TOKENS}")
        picks = self._whole(by_memory)
        return self._fed(state, len(chosen), lambda: feed(self, state, chosen, picks))

    def binding_of(self, state: DecodeState, memories: tuple[int, ...] = BLEND) -> DecodeBinding:
        """The bound decode step of a state that gives these memories' logits, rebuilt when the state's arrays or caches
        were replaced, or others are asked for."""
        binding = self._bindings.get(state)
        if binding is None or not binding.fits(state, memories):
            make = DeviceDecodeBinding if self.on_device else DecodeBinding
            binding = make(self, state, memories)
            self._bindings[state] = binding
        return binding

    def score(self, prompt: Sequence[int], continuation: Sequence[int], memory_bias: float = 0.0) -> Array:
        """Log-probabilities (nats) of each token of `continuation` after `prompt`: (len(continuation),) float64. Raises
        as `prefill`."""
        begin, rest = self.token_ids(prompt), self.token_ids(continuation)
        state = self.new_state(1, memory_bias)
        self.check_lengths(state, [[*begin, *rest]])
        self.reserve(state, len(begin) + len(rest))
        if not rest:
            self.prefill_likeliest(state, [begin])
            return np.zeros(0)
        first = self._prefill(state, [begin], None, LogProbabilities(rest[:1]))
        return score_continuation(self, state, first, rest, self._chunk(1)).logprobs

    def score_each(
        self,
        prompt: Sequence[int],
        continuations: Sequence[Sequence[int]],
        memory_bias: float = 0.0,
        memory: str = "blend",
    ) -> list[TokenScores]:
        """How likely each of several `continuations` of one prompt is, which is read once. memory: whose logits are
        judged, one of `MEMORIES`. Raises PromptError for an empty continuation, and otherwise as `prefill` and
        `check_memory`."""
        if not (is_sequence(continuations) or (isinstance(continuations, np.ndarray) and continuations.ndim)):
            raise PromptError(f"continuations are {shown(continuations)}, not a sequence of continuations")
        begin, rests = self.token_ids(prompt), [self.token_ids(rest) for rest in continuations]
        self.check_memory(memory)
        state = self.new_state(1, memory_bias)
        for rest in rests:
            if not rest:
                raise PromptError("a continuation has no tokens")
            self.check_lengths(state, [[*begin, *rest]])
        index, found = MEMORIES.index(memory), []
        output = self._prefill(state, [begin], None, EachMemory() if index else Whole())
        logits = output.logits if output.memory_logits is None else output.memory_logits[:, index - 1]
        for rest in rests:
            first, _ = LogProbabilities(rest[:1]).pick(HostLogits(logits))
            rows = state.take([0])
            found.append(score_continuation(self, rows, TokenScores(*first), rest, self._chunk(1), index))
        return found

    def check_memory(self, memory: str) -> None:
        """Raise SettingsError for what is none of `MEMORIES`, and for a memory alone where `by_memory` is refused."""
        if typed("memory", memory, str) not in MEMORIES:
            raise SettingsError("memory", memory, f"it must be one of {', '.join(MEMORIES)}")
        if memory != "blend":
            self.check_by_memory("memory", memory)

    def prompt_logprobs(
        self, prompt: Sequence[int], memory_bias: float = 0.0, k: int = 0, state: DecodeState | None = None
    ) -> PromptLogprobs:
        """Log-probabilities of the tokens of a prompt, given those before them, and with k > 0 the k likeliest tokens
        in their places: what "echo" shows. The gate's query is the whole prompt, as it is when the answer is generated,
        so that a prompt of more than one chunk is read twice where the gate reads the query, and once otherwise.
        Generation goes on from the result's state and logits: a new one with this bias, or `state`, which must be an
        empty one of one row. Raises as `prefill`, and SettingsError for k."""
        k = whole_number("k", k, 0, self.manifest.vocab_size)
        state = self.new_state(1, memory_bias) if state is None else state
        self.check_state(state)
        if state.batch != 1 or state.lengths[0] or state.pending[0] is not None:
            raise PromptError("a prompt's log-probabilities need a state of one row that has read nothing")
        (text,) = self._texts(state, [prompt])
        self.reserve(state, len(text))
        return read_with_logprobs(self, state, text, self._chunk(1), k)

    def _prefill(
        self, state: DecodeState, prompts: Sequence[Sequence[int]], chunk: int | None, picks: Picks[Output]
    ) -> Output:
        self.check_state(state)
        texts = self._texts(state, prompts)
        chunk = self._chunk(state.batch) if chunk is None else whole_number("chunk", chunk, 1)
        try:
            state.begin()
            state.ask()
            # Once for all chunks: growing copies the caches.
            self.reserve(state, max(int(length) + len(text) for length, text in zip(state.lengths, texts, strict=True)))
            output = read(self, state, texts, chunk, picks)
            state.pending = [None] * state.batch
            state.note = None
            return output
        except BaseException:
            state.undo()
            raise

    def _decode(self, state: DecodeState, tokens: Sequence[int] | Array, picks: Picks[Output]) -> Output:
        self.check_state(state)
        chosen = self.token_ids(tokens)
        if len(chosen) != state.batch:
            raise PromptError(f"{len(chosen)} tokens for {state.batch} rows")
        return self._fed(
            state, 1, lambda: self.binding_of(state, picks.memories).step(self, state, np.array(chosen), picks)
        )

    def _fed(self, state: DecodeState, count: int, step: Callable[[], Output]) -> Output:
        """What a step returns that feeds `count` tokens to every row."""
        if not state.lengths.all():
            raise PromptError("a row has no prompt yet; read one by prefill before decoding")
        longest = int(state.lengths.max()) + count
        if longest > self.manifest.context_length:
            raise PromptError(f"the text has reached the model's context of {self.manifest.context_length} tokens")
        try:
            state.begin()
            self.reserve(state, longest)
            output = step()
            state.pending = [None] * state.batch
            state.note = None
            return output
        except BaseException:
            state.undo()
            raise

    def _texts(self, state: DecodeState, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """What every row reads: its pending token and its prompt. Raises PromptError for what cannot be read."""
        if not (is_sequence(prompts) or (isinstance(prompts, np.ndarray) and prompts.ndim)):
            raise PromptError(f"prompts are {shown(prompts)}, not a sequence of prompts")
        if len(prompts) != state.batch:
            raise PromptError(f"{len(prompts)} prompts for {state.batch} rows")
        texts = [self.token_ids(prompt) for prompt in prompts]
        for index, text in enumerate(texts, 1):
            if not text:
                raise PromptError(f"prompt {index} of {state.batch} is empty")
        pending = [self.token_ids([] if token is None else [token]) for token in state.pending]
        texts = [[*before, *text] for before, text in zip(pending, texts, strict=True)]
        self.check_lengths(state, texts)
        return texts

    def check_by_memory(self, name: str, value: object) -> None:
        """Raise SettingsError, with the name and the value of a setting that asks for it, where the artifact cannot
        give each memory's own logits."""
        if not self.siamese:
            raise SettingsError(name, value, "this artifact has the base memory alone")
        if not self.manifest.by_memory:
            version = self.manifest.raw["format_version"]
            rule = f"this artifact is of format {version}, which gives the logits of the blend alone; export it again"
            raise SettingsError(name, value, rule)

    def _whole(self, by_memory: bool) -> Whole | EachMemory:
        if not typed("by_memory", by_memory, bool):
            return Whole()
        self.check_by_memory("by_memory", by_memory)
        return EachMemory()

    def _likeliest(self, k: int, probabilities: bool) -> Likeliest:
        number = whole_number("k", k, 1, self.manifest.vocab_size)
        return Likeliest(number, typed("probabilities", probabilities, bool))

    def _chunk(self, batch: int) -> int:
        """Tokens of each of `batch` texts to read in one step."""
        return max(1, self.prefill_rows // (len(self.manifest.streams) * batch))
