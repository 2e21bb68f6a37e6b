"""What generation gives: tokens, text as it comes, and a whole result."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .logprobs import Candidate, Trace

FinishReason = Literal["stop", "length"]


class Token(NamedTuple):
    """One generated token.

    logits: (vocab,) float32, the model's; None where greedy or top-k sampling chose it from the likeliest tokens alone,
    with the logits in a device's memory, and in a `Generation`. gate_mean: the gate's mean over the hidden dimensions
    where it was chosen, 1 is only the base memory; None in a base-only artifact. logprob, top_logprobs: its own and the
    likeliest ones, if asked for. trace: if asked for.
    """

    id: int
    logits: NDArray[np.float32] | None
    gate_mean: float | None
    logprob: float | None = None
    top_logprobs: tuple[Candidate, ...] | None = None
    trace: Trace | None = None


class Chunk(NamedTuple):
    """Text that one token completed (it may be empty), that token, and on the last chunk why generation ended, and the
    stop string or the token that ended it, if one did. prompt: on the first chunk, the prompt's tokens with their
    log-probabilities (the first one has none), if asked for."""

    text: str
    token: Token | None
    finish_reason: FinishReason | None
    stopped_by: str | int | None = None
    prompt: tuple[Token, ...] | None = None


@dataclass(frozen=True)
class Timings:
    """Milliseconds and rates. ttft_ms: from the prompt's tokens to the first new one. ms_per_token: median over the
    tokens after the first; 0 if there are none. tokens_per_s: their mean rate. With `speculate`, tokens come several at
    once, so that the rate says more than the median; drafted, accepted: how many tokens were guessed and chosen;
    passes: how many runs fed guesses."""

    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    ms_per_token: float
    tokens_per_s: float
    drafted: int = 0
    accepted: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Generation:
    """A result. tokens: as chosen, with those of a stop string and the end token, without their logits. stopped_by: the
    stop string or the token that ended it; None at a length. prompt: as a `Chunk` has it."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    stopped_by: str | int | None
    timings: Timings
    prompt: tuple[Token, ...] | None = None

    @property
    def token_ids(self) -> list[int]:
        """Of `tokens`."""
        return [token.id for token in self.tokens]

    @property
    def gate_means(self) -> list[float] | None:
        """One per token; None in a base-only artifact."""
        return _all([token.gate_mean for token in self.tokens])

    @property
    def logprobs(self) -> list[float] | None:
        """One per token, if asked for."""
        return _all([token.logprob for token in self.tokens])


def facts_of_tokens(result: Generation, token_text: Callable[[int], str]) -> dict[str, Any]:
    """What was asked to be told of each token, log-probabilities and traces, as JSON has it."""

    def listed(found: Sequence[Candidate]) -> list[dict[str, Any]]:
        return [{"id": each.id, "text": token_text(each.id), "logprob": each.logprob} for each in found]

    told: dict[str, Any] = {}
    if result.logprobs is not None:
        told["logprobs"] = result.logprobs
        told["top_logprobs"] = [listed(token.top_logprobs or ()) for token in result.tokens]
    if result.prompt is not None:
        told["prompt"] = [
            {
                "id": token.id,
                "text": token_text(token.id),
                "logprob": token.logprob,
                "top_logprobs": listed(token.top_logprobs or ()),
            }
            for token in result.prompt
        ]
    if result.tokens[0].trace is not None:
        told["trace"] = [
            {name: listed(memory) for name, memory in token.trace._asdict().items()}
            for token in result.tokens
            if token.trace is not None
        ]
    return told


class Gathering:
    """The chunks of one text as they come, and when; it begins when the prompt is there."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._chunks: list[Chunk] = []
        self._times = [time.perf_counter()]

    def take(self, chunk: Chunk) -> bool:
        """Take the next chunk; whether it was the last one."""
        if chunk.token is not None:
            self._times.append(time.perf_counter())
        self._chunks.append(without_logits(chunk))
        return chunk.finish_reason is not None

    def result(self, **counts: int) -> Generation:
        """What the chunks make, after the last one. counts: of guesses, as `Timings` names them."""
        last = self._chunks[-1]
        assert last.finish_reason is not None
        return Generation(
            text="".join(chunk.text for chunk in self._chunks),
            tokens=tuple(chunk.token for chunk in self._chunks if chunk.token is not None),
            finish_reason=last.finish_reason,
            stopped_by=last.stopped_by,
            timings=replace(timings(self._prompt_tokens, self._times), **counts),
            prompt=self._chunks[0].prompt,
        )


def without_logits(chunk: Chunk) -> Chunk:
    """A chunk whose token does not keep a whole vocabulary's numbers in memory."""
    return chunk if chunk.token is None else chunk._replace(token=chunk.token._replace(logits=None))


def timings(prompt_tokens: int, times: Sequence[float]) -> Timings:
    """Of a run whose prompt was there at times[0] and whose tokens came at the others, in seconds."""
    steps = np.diff(times) * 1e3
    decode = steps[1:]
    return Timings(
        prompt_tokens=prompt_tokens,
        new_tokens=len(steps),
        ttft_ms=round(float(steps[0]), 3),
        ms_per_token=round(float(np.median(decode)), 3) if len(decode) else 0.0,
        tokens_per_s=round(float(len(decode) / (decode.sum() / 1e3)), 3) if len(decode) else 0.0,
    )


def _all(values: Sequence[float | None]) -> list[float] | None:
    found = [value for value in values if value is not None]
    return found if found else None
