"""From a prompt to tokens, to text, to a result: three layers, each made of the one below.

generate_step       tokens
stream_generate     text as it is complete, with timings
generate            one result
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..engine.session import Session
from ..engine.state import DecodeState
from ..errors import PromptError, SettingsError
from .sampling import Sampler, greedy
from .text import TextCodec

FinishReason = Literal["stop", "length"]


class Model:
    """A loaded artifact: a session and its text codec."""

    def __init__(self, session: Session, codec: TextCodec) -> None:
        self.session = session
        self.codec = codec


def load(
    folder: Path | str,
    provider: str = "cpu",
    threads: int | None = None,
    spin: bool = True,
    allow_fallback: bool = False,
    kernels: bool = True,
    cuda_graph: bool = False,
) -> Model:
    """Load an ARTIFACT folder. provider: a key of PROVIDERS; threads: None is the usable physical cores; the other
    arguments are those of `open_session`.

    Raises ArtifactError or ProviderError.
    """
    session = Session(folder, provider, threads, spin, allow_fallback, kernels, cuda_graph)
    return Model(session, TextCodec(session.folder, session.manifest.special_tokens))


class Token(NamedTuple):
    """One generated token. logits: (vocab,) float32, what it was chosen from. gate_mean: the gate's mean over the
    hidden dimensions where it was chosen, 1 is only the base memory; None in a base-only artifact."""

    id: int
    logits: NDArray[np.float32]
    gate_mean: float | None


class Chunk(NamedTuple):
    """Text that one token completed (it may be empty), that token, and on the last chunk why generation ended."""

    text: str
    token: Token | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Timings:
    """Milliseconds and rates. ttft_ms: from the prompt's tokens to the first new one. ms_per_token: median over the
    tokens after the first; 0 if there are none."""

    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    ms_per_token: float
    tokens_per_s: float


@dataclass(frozen=True)
class Generation:
    """A result. token_ids: as chosen, with the end token if one was. gate_means: one per token."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    gate_means: list[float] | None
    timings: Timings


def generate_step(
    session: Session,
    prompt_ids: Sequence[int],
    *,
    sampler: Sampler = greedy,
    state: DecodeState | None = None,
    memory_bias: float = 0.0,
) -> Iterator[Token]:
    """Tokens after `prompt_ids`, without end: the caller stops. Ends by itself where the context is full.

    state: a state of one row to go on with (a conversation); a token that was yielded last time and not yet fed is
    fed first. memory_bias applies to a new state. Raises PromptError before the first token.
    """
    if state is None:
        state = session.new_state(1, memory_bias)
    elif state.batch != 1:
        raise PromptError(f"generation goes on with a state of one row; this one has {state.batch}")
    output = session.prefill(state, [prompt_ids])
    while True:
        token = int(sampler(output.logits)[0])
        state.pending[0] = token
        yield Token(token, output.logits[0], None if output.gate_mean is None else float(output.gate_mean[0]))
        if state.lengths[0] >= session.manifest.context_length:
            return
        output = session.decode_step(state, [token])


def stream_generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int = 256,
    sampler: Sampler = greedy,
    raw: bool = False,
    state: DecodeState | None = None,
    memory_bias: float = 0.0,
) -> Iterator[Chunk]:
    """Text as it is complete. prompt: text (a user's turn, or as it is with `raw`), or token ids.

    Ends at an end token ("stop"), at max_new_tokens or at the context's end ("length"). Raises PromptError or
    SettingsError before the first chunk.
    """
    if max_new_tokens < 1:
        raise SettingsError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    prompt_ids = model.codec.encode_prompt(prompt, raw) if isinstance(prompt, str) else list(prompt)
    stream = model.codec.stream()
    steps = generate_step(model.session, prompt_ids, sampler=sampler, state=state, memory_bias=memory_bias)
    for count, token in enumerate(steps, 1):
        text = stream.push(token.id)
        if token.id in model.session.manifest.eos_token_ids:
            yield Chunk(text + stream.finish(), token, "stop")
            return
        if count == max_new_tokens:
            yield Chunk(text + stream.finish(), token, "length")
            return
        yield Chunk(text, token, None)
    yield Chunk(stream.finish(), None, "length")


def generate(model: Model, prompt: str | Sequence[int], **settings: Any) -> Generation:
    """Run `stream_generate` to its end and collect it. Settings and errors are its."""
    prompt_ids = (
        model.codec.encode_prompt(prompt, settings.pop("raw", False)) if isinstance(prompt, str) else list(prompt)
    )
    text: list[str] = []
    tokens: list[Token] = []
    finish_reason: FinishReason = "length"
    times = [time.perf_counter()]
    for chunk in stream_generate(model, prompt_ids, **settings):
        text.append(chunk.text)
        if chunk.token is not None:
            tokens.append(chunk.token)
            times.append(time.perf_counter())
        finish_reason = chunk.finish_reason or finish_reason
    gates = [token.gate_mean for token in tokens if token.gate_mean is not None]
    return Generation(
        text="".join(text),
        token_ids=[token.id for token in tokens],
        finish_reason=finish_reason,
        gate_means=gates if model.session.siamese else None,
        timings=_timings(len(prompt_ids), times),
    )


def _timings(prompt_tokens: int, times: list[float]) -> Timings:
    steps = np.diff(times) * 1e3
    decode = steps[1:]
    return Timings(
        prompt_tokens=prompt_tokens,
        new_tokens=len(steps),
        ttft_ms=round(float(steps[0]), 3),
        ms_per_token=round(float(np.median(decode)), 3) if len(decode) else 0.0,
        tokens_per_s=round(float(len(decode) / (decode.sum() / 1e3)), 3) if len(decode) else 0.0,
    )
