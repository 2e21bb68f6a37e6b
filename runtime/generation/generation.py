"""From a prompt to tokens, to text, to a result: three layers, each built on the one before.

generate_step       tokens
stream_generate     text as it is completed, with timings
generate            one result
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..engine.execution import Execution
from ..engine.session import Session
from ..engine.state import DecodeState, LikeliestOutput, StepOutput
from ..errors import PromptError
from .chat_template import Message
from .sampling import RandomSampler, Sampler, greedy, likeliest_needed
from .settings import GenerationSettings
from .text import TextCodec

FinishReason = Literal["stop", "length"]


class Model:
    """A loaded artifact: a session and its text codec."""

    def __init__(self, session: Session, codec: TextCodec) -> None:
        self.session = session
        self.codec = codec


def load(folder: Path | str, execution: Execution | None = None, **changes: Any) -> Model:
    """Load an ARTIFACT folder. execution, changes: as in `Session`, such as `load(folder, threads=2)`.

    Raises ArtifactError, ProviderError or SettingsError.
    """
    session = Session(folder, execution, **changes)
    manifest = session.manifest
    return Model(
        session, TextCodec(session.folder, manifest.special_tokens, manifest.raw_prompts, manifest.eos_token_ids)
    )


class Token(NamedTuple):
    """One generated token. logits: (vocab,) float32, what it was chosen from; None where greedy or top-k sampling chose
    it from the likeliest tokens alone, with the logits in a device's memory (a sampler of one's own gets them all).
    gate_mean: the gate's mean over the hidden dimensions where it was chosen, 1 is only the base memory; None in a
    base-only artifact."""

    id: int
    logits: NDArray[np.float32] | None
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

    state: a state of one row to continue (a conversation); a token that was yielded last time and not yet fed is
    fed first. memory_bias applies to a new state. Raises PromptError before the first token.
    """
    if state is None:
        state = session.new_state(1, memory_bias)
    elif state.batch != 1:
        raise PromptError(f"generation continues a state of one row; this one has {state.batch}")
    step = _Steps(session, state, sampler)
    token = step.first(prompt_ids)
    while True:
        state.pending[0] = token.id
        yield token
        if state.lengths[0] >= session.manifest.context_length:
            return
        token = step.next(token.id)


class _Steps:
    """Steps of a state of one row and the sampler's choice after each: from all logits, or, where those would have to
    be copied from a device, from the likeliest tokens if they are enough."""

    def __init__(self, session: Session, state: DecodeState, sampler: Sampler) -> None:
        self.session, self.state, self.sampler = session, state, sampler
        self.k = likeliest_needed(sampler, session.manifest.vocab_size) if session.on_device else None

    def first(self, prompt_ids: Sequence[int]) -> Token:
        if self.k is None:
            return self._from_logits(self.session.prefill(self.state, [prompt_ids]))
        return self._from_likeliest(self.session.prefill_likeliest(self.state, [prompt_ids], self.k))

    def next(self, token: int) -> Token:
        if self.k is None:
            return self._from_logits(self.session.decode_step(self.state, [token]))
        return self._from_likeliest(self.session.decode_likeliest(self.state, [token], self.k))

    def _from_logits(self, output: StepOutput) -> Token:
        return Token(int(self.sampler(output.logits)[0]), output.logits[0], _first(output.gate_mean))

    def _from_likeliest(self, output: LikeliestOutput) -> Token:
        if isinstance(self.sampler, RandomSampler):
            chosen = int(self.sampler.choose(output.ids, output.logits)[0])
        else:
            chosen = int(output.ids[0, 0])
        return Token(chosen, None, _first(output.gate_mean))


def _first(gate_mean: NDArray[np.float32] | None) -> float | None:
    return None if gate_mean is None else float(gate_mean[0])


def stream_generate(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    sampler: Sampler | None = None,
    state: DecodeState | None = None,
    **changes: Any,
) -> Iterator[Chunk]:
    """Text as it is completed. prompt: text (a user's turn, or unchanged with `raw`), messages such as
    {"role": "user", "content": text}, or token ids. settings: `changes` override its fields or the defaults, such as
    `max_new_tokens=8`. sampler: replaces the one that the settings describe. state: as in `generate_step`; where it
    holds a conversation, text and messages continue it: the chat template's end of the last reply comes before them,
    and nothing is said again. Raw text follows as it is.

    Ends at an end token ("stop"), at max_new_tokens or at the context's end ("length"). Raises PromptError or
    SettingsError before the first chunk.
    """
    settings = replace(settings or GenerationSettings(), **changes)
    yield from _stream(model, _encoded(model, prompt, settings, state), settings, sampler, state)


def _stream(
    model: Model, prompt: _Prompt, settings: GenerationSettings, sampler: Sampler | None, state: DecodeState | None
) -> Iterator[Chunk]:
    stream = model.codec.stream()
    steps = generate_step(
        model.session,
        prompt.ids,
        sampler=sampler or settings.sampler(),
        state=state,
        memory_bias=settings.memory_bias,
    )
    if state is not None and prompt.replaces_pending:
        steps = _without_pending(steps, state)
    for count, token in enumerate(steps, 1):
        text = stream.push(token.id)
        if token.id in model.session.manifest.eos_token_ids:
            yield Chunk(text + stream.finish(), token, "stop")
            return
        if count >= settings.max_new_tokens:
            yield Chunk(text + stream.finish(), token, "length")
            return
        yield Chunk(text, token, None)
    yield Chunk(stream.finish(), None, "length")


def generate(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    sampler: Sampler | None = None,
    state: DecodeState | None = None,
    **changes: Any,
) -> Generation:
    """Run `stream_generate` to its end and collect it; arguments and errors are the same."""
    settings = replace(settings or GenerationSettings(), **changes)
    encoded = _encoded(model, prompt, settings, state)
    text: list[str] = []
    tokens: list[Token] = []
    finish_reason: FinishReason = "length"
    times = [time.perf_counter()]
    for chunk in _stream(model, encoded, settings, sampler, state):
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
        timings=_timings(len(encoded.ids), times),
    )


class _Prompt(NamedTuple):
    """replaces_pending: whether the state's pending token is not to be read, because `ids` say how the turn ends."""

    ids: list[int]
    replaces_pending: bool = False


def _encoded(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings,
    state: DecodeState | None,
) -> _Prompt:
    codec, raw = model.codec, settings.raw
    goes_on = state is not None and state.batch == 1 and (state.lengths[0] > 0 or state.pending[0] is not None)
    if isinstance(prompt, str):
        if codec.is_raw(raw):
            return _Prompt(codec.encode_raw(prompt, beginning=not goes_on))
        messages: list[Message] = [{"role": "user", "content": prompt}]
        if not prompt:
            raise PromptError("the prompt is empty")
    elif not any(isinstance(item, Mapping | str) for item in prompt):
        return _Prompt(list(prompt))  # type: ignore[arg-type]
    elif raw:
        raise PromptError("messages go through the chat template; give text to send it as it is (raw)")
    else:
        messages = list(prompt)  # type: ignore[arg-type]
    if not goes_on or state is None:
        return _Prompt(codec.encode_chat(messages, settings.control_tokens))
    ids, pending = codec.encode_continuation(messages, settings.control_tokens), state.pending[0]
    if pending is None or not (pending in model.session.manifest.eos_token_ids or codec.is_special(pending)):
        return _Prompt(ids)  # the reply was cut off
    if pending == ids[0]:
        return _Prompt(ids[1:])  # it ended as the template ends a turn
    return _Prompt(ids, replaces_pending=True)


def _without_pending(steps: Iterator[Token], state: DecodeState) -> Iterator[Token]:
    """The steps, without reading the state's pending token. If the first one fails, the state is as before."""
    pending, state.pending[0] = state.pending[0], None
    try:
        first = next(steps)
    except BaseException:
        state.pending[0] = pending
        raise
    yield first
    yield from steps


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
