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

from ..checks import instance
from ..engine.execution import Execution
from ..engine.journal import Note
from ..engine.session import Session
from ..engine.state import DecodeState, LikeliestOutput, StepOutput
from ..errors import PromptError, SettingsError, shown
from .chat_template import Message
from .sampling import RandomSampler, Sampler, greedy, likeliest_needed
from .settings import GenerationSettings
from .text import TextCodec

FinishReason = Literal["stop", "length"]


class Model:
    """A loaded artifact: a session and its text codec. Raises SettingsError for anything else."""

    def __init__(self, session: Session, codec: TextCodec) -> None:
        instance("session", session, Session)
        instance("codec", codec, TextCodec)
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
    fed first. memory_bias applies to a new state. sampler: from logits (1, vocab) to a token id (1,).

    Whenever it ends, by an exception or Ctrl-C too, the state holds the prompt and the tokens that were yielded, and
    can go on; before the first one it is as it was. Raises before the first token what `Session.prefill` raises, and
    SettingsError for arguments of another type and for what a sampler must not return; PromptError where the state
    was used by others between two tokens.
    """
    instance("session", session, Session)
    if state is None:
        state = session.new_state(1, memory_bias)
    instance("state", state, DecodeState)
    if state.batch != 1:
        raise PromptError(f"generation continues a state of one row; this one has {state.batch}")
    steps = _Steps(session, state, sampler)
    before, token, given = state.noted(), None, None
    try:
        token = steps.first(prompt_ids)
        while True:
            read = state.lengths[0]
            state.pending[0] = token.id
            given = token
            yield token
            if state.batch != 1 or state.lengths[0] != read or state.pending[0] != token.id:
                raise PromptError("the state was used by others since the last token; continue it by a new call")
            if read >= session.manifest.context_length:
                return
            token = steps.next(token.id)
    except BaseException:
        _take_back(state, before, token, given)
        raise


def _take_back(state: DecodeState, before: Note, chosen: Token | None, given: Token | None) -> None:
    """After an exception: a token that was chosen and not given out has not been, nor a prompt without any token.
    before: what the state was then. chosen, given: the last ones that were."""
    if given is None:
        state.restore(before)
    elif given is not chosen:
        state.pending[0] = None


class _Steps:
    """Steps of a state of one row and the sampler's choice after each: from all logits, or, where those would have to
    be copied from a device, from the likeliest tokens if they are enough."""

    def __init__(self, session: Session, state: DecodeState, sampler: Sampler) -> None:
        if not callable(sampler):
            raise SettingsError("sampler", sampler, "it must be a function from logits to token ids")
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
        return Token(self._checked(self.sampler(output.logits)), output.logits[0], _first(output.gate_mean))

    def _from_likeliest(self, output: LikeliestOutput) -> Token:
        if isinstance(self.sampler, RandomSampler):
            chosen = int(self.sampler.choose(output.ids, output.logits)[0])
        else:
            chosen = int(output.ids[0, 0])
        return Token(chosen, None, _first(output.gate_mean))

    def _checked(self, chosen: Any) -> int:
        """The token id of a sampler that may be of one's own."""
        try:
            (token,) = self.session.token_ids(chosen)
        except (PromptError, ValueError):
            vocab = self.session.manifest.vocab_size
            rule = f"it returned {shown(chosen)} and must return a token id for each row, (1,), below {vocab}"
            raise SettingsError("sampler", self.sampler, rule) from None
        return token


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

    Ends at an end token ("stop"), at max_new_tokens or at the context's end ("length"). As in `generate_step`, the
    state holds the prompt and the tokens of the chunks that were yielded, and errors are raised.
    """
    settings = _checked(model, settings, changes)
    if state is None:
        state = model.session.new_state(1, settings.memory_bias)
    yield from _stream(model, _encoded(model, prompt, settings, state), settings, sampler, state)


def _stream(
    model: Model, prompt: _Prompt, settings: GenerationSettings, sampler: Sampler | None, state: DecodeState
) -> Iterator[Chunk]:
    stream = model.codec.stream()
    sampler = settings.sampler() if sampler is None else sampler
    steps = generate_step(model.session, prompt.ids, sampler=sampler, state=state)
    before, token, given = state.noted(), None, None
    try:
        if prompt.replaces_pending:
            state.pending[0] = None
        for count, token in enumerate(steps, 1):
            text, reason = stream.push(token.id), _finish_reason(model, settings, token, count)
            chunk = Chunk(text if reason is None else text + stream.finish(), token, reason)
            given = token
            yield chunk
            if reason is not None:
                return
        yield Chunk(stream.finish(), None, "length")
    except BaseException:
        _take_back(state, before, token, given)
        raise


def _finish_reason(model: Model, settings: GenerationSettings, token: Token, count: int) -> FinishReason | None:
    if token.id in model.session.manifest.eos_token_ids:
        return "stop"
    return "length" if count >= settings.max_new_tokens else None


def generate(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    sampler: Sampler | None = None,
    state: DecodeState | None = None,
    **changes: Any,
) -> Generation:
    """Run `stream_generate` to its end and collect it; arguments and errors are the same. After an exception, Ctrl-C
    too, the state is as it was before."""
    settings = _checked(model, settings, changes)
    if state is None:
        state = model.session.new_state(1, settings.memory_bias)
    encoded = _encoded(model, prompt, settings, state)
    before = state.noted()
    try:
        return _collected(model, encoded, settings, sampler, state)
    except BaseException:
        state.restore(before)
        raise


def _collected(
    model: Model, prompt: _Prompt, settings: GenerationSettings, sampler: Sampler | None, state: DecodeState
) -> Generation:
    text: list[str] = []
    tokens: list[Token] = []
    finish_reason: FinishReason = "length"
    times = [time.perf_counter()]
    for chunk in _stream(model, prompt, settings, sampler, state):
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
        timings=_timings(len(prompt.ids), times),
    )


def _checked(model: Model, settings: GenerationSettings | None, changes: dict[str, Any]) -> GenerationSettings:
    """The settings with their changes."""
    instance("model", model, Model)
    if settings is not None:
        instance("settings", settings, GenerationSettings)
    return replace(settings or GenerationSettings(), **changes)


class _Prompt(NamedTuple):
    """replaces_pending: whether the state's pending token is not to be read, because `ids` say how the turn ends."""

    ids: list[int]
    replaces_pending: bool = False


def _encoded(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings,
    state: DecodeState,
) -> _Prompt:
    """The prompt's tokens, after what the state holds."""
    instance("state", state, DecodeState)
    codec, raw = model.codec, settings.raw
    goes_on = state.batch == 1 and (state.lengths[0] > 0 or state.pending[0] is not None)
    messages: list[Message]
    if isinstance(prompt, str):
        if codec.is_raw(raw):
            return _Prompt(codec.encode_raw(prompt, beginning=not goes_on))
        messages = [{"role": "user", "content": prompt}]
        if not prompt:
            raise PromptError("the prompt is empty")
    elif not _are_messages(prompt):
        return _Prompt(model.session.token_ids(prompt))  # type: ignore[arg-type]
    elif raw:
        raise PromptError("messages go through the chat template; give text to send it as it is (raw)")
    else:
        messages = list(prompt)  # type: ignore[arg-type]
    if not goes_on:
        return _Prompt(codec.encode_chat(messages, settings.control_tokens))
    ids, pending = codec.encode_continuation(messages, settings.control_tokens), state.pending[0]
    ends = pending is not None and pending in model.session.manifest.eos_token_ids
    if pending is not None and pending == ids[0] and (ends or codec.is_special(pending)):
        return _Prompt(ids[1:])  # the reply ended as the template ends a turn
    return _Prompt(ids, replaces_pending=ends)  # as another end token says, or it was cut off


def _are_messages(prompt: Any) -> bool:
    return isinstance(prompt, list | tuple) and any(isinstance(item, Mapping | str) for item in prompt)


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
