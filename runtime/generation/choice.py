"""One row's choice of its next token: its history, processors and sampler, and what is told about the choice.

Knows nothing about graphs: it is given what a step of one gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import integers, is_sequence, whole_number
from ..engine.state import LikeliestOutput, StepOutput
from ..errors import PromptError, SettingsError, shown
from .history import History
from .logprobs import Candidate, Trace, candidates, log_normalizer
from .processors import Processor
from .results import Token
from .sampling import RandomSampler, Sampler, likeliest_needed

Logits = NDArray[np.float32]


class Chooser:
    """Chooses tokens one after the other and keeps the history.

    sampler: from logits (1, vocab) to a token id (1,). processors: work on the logits before it, in this order. vocab:
    how many tokens there are. logprobs, trace: as in `GenerationSettings`.
    """

    def __init__(
        self,
        vocab: int,
        sampler: Sampler,
        processors: Sequence[Processor] = (),
        logprobs: int | None = None,
        trace: int | None = None,
    ) -> None:
        if not callable(sampler):
            raise SettingsError("sampler", sampler, "it must be a function from logits to token ids")
        self.history = History(())
        self.vocab = vocab
        self.sampler = sampler
        self.processors = functions(processors)
        self.logprobs = None if logprobs is None else whole_number("logprobs", logprobs, 0)
        self.trace = None if trace is None else whole_number("trace", trace, 1)

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Begin after a prompt."""
        self.history = History(prompt_ids)

    @property
    def likeliest_needed(self) -> int | None:
        """How many of the likeliest tokens are enough to choose from; None if it takes all logits."""
        needed = likeliest_needed(self.sampler, self.vocab)
        if needed is None or self.processors or self.trace is not None:
            return None
        return min(max(needed, self.logprobs or 0), self.vocab)

    def choose(self, output: StepOutput, row: int = 0) -> Token:
        """The next token after a row of a step's output, which has `memory_logits` if a trace is told. Raises
        SettingsError for what a sampler or a processor must not return, and PromptError where no token is allowed."""
        logits = output.logits[row]
        gate_mean = None if output.gate_mean is None else float(output.gate_mean[row])
        memory_logits = None if output.memory_logits is None else output.memory_logits[row]
        changed = logits
        if self.processors:
            changed = logits.copy()
            for processor in self.processors:
                changed = self._changed(processor, changed)
            if changed.max() == -np.inf:
                count = len(self.history.new)
                raise PromptError(f"after {count} new tokens no token is allowed: biases, penalties or constraints")
        chosen = self._checked(self.sampler(changed[None]))
        self.history.append(chosen)
        if self.logprobs is None and self.trace is None:
            return Token(chosen, logits, gate_mean)
        normalizer = log_normalizer(logits)
        logprob = None if self.logprobs is None else float(logits[chosen]) - normalizer
        top = None if self.logprobs is None else candidates(logits, self.logprobs, normalizer)
        return Token(chosen, logits, gate_mean, logprob, top, self._traced(logits, normalizer, memory_logits))

    def choose_likeliest(self, output: LikeliestOutput) -> Token:
        """The next token, from `likeliest_needed` tokens (1, k), with the normalizer if log-probabilities are told."""
        ids, logits = output.ids, output.logits
        if isinstance(self.sampler, RandomSampler):
            enough = likeliest_needed(self.sampler, self.vocab)
            chosen = int(self.sampler.choose(ids[:, :enough], logits[:, :enough])[0])
        else:
            chosen = int(ids[0, 0])
        self.history.append(chosen)
        gate = None if output.gate_mean is None else float(output.gate_mean[0])
        if self.logprobs is None or output.log_normalizer is None:
            return Token(chosen, None, gate)
        found = (logits[0].astype(np.float64) - float(output.log_normalizer[0])).tolist()
        told = [Candidate(token, value) for token, value in zip(ids[0].tolist(), found, strict=True)]
        logprob = next(candidate.logprob for candidate in told if candidate.id == chosen)
        return Token(chosen, None, gate, logprob, tuple(told[: self.logprobs]))

    def _traced(self, logits: Logits, normalizer: float, memory_logits: Logits | None) -> Trace | None:
        if self.trace is None or memory_logits is None:
            return None
        base, adapter = (candidates(memory, self.trace) for memory in memory_logits)
        return Trace(candidates(logits, self.trace, normalizer), base, adapter)

    def _changed(self, processor: Callable[[History, Logits], Any], logits: Logits) -> Logits:
        changed = processor(self.history, logits)
        if not isinstance(changed, np.ndarray) or changed.shape != logits.shape or changed.dtype.kind != "f":
            rule = f"it returned {shown(changed)} and must return logits, ({self.vocab},)"
            raise SettingsError("processors", processor, rule)
        return changed

    def _checked(self, chosen: Any) -> int:
        """The token id of a sampler that may be of one's own."""
        try:
            (token,) = integers(chosen, "token id")
            if 0 <= token < self.vocab:
                return token
        except (PromptError, ValueError):
            pass
        rule = f"it returned {shown(chosen)} and must return a token id for each row, (1,), below {self.vocab}"
        raise SettingsError("sampler", self.sampler, rule)


def functions(processors: Sequence[Processor]) -> list[Processor]:
    """Processors of one's own. Raises SettingsError for what is no sequence of functions."""
    if not is_sequence(processors) or not all(map(callable, processors)):
        raise SettingsError(
            "processors", processors, "they must be a sequence of functions from (history, logits) to logits"
        )
    return list(processors)
