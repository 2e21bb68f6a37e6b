"""From a prompt to tokens, to text, to a result: three layers, each built on the one before.

generate_step       tokens
stream_generate     text as it is completed, with timings
generate            one result
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checks import instance
from ..engine.execution import Execution
from ..engine.journal import Note
from ..engine.prompt_logprobs import PromptLogprobs
from ..engine.session import Session
from ..engine.state import DecodeState
from ..errors import PromptError
from .ahead import Passes
from .chat_template import Message
from .choice import Chooser, functions
from .constraints import constraints_of
from .logprobs import Candidate
from .processors import Processor, make_processors
from .prompts import Prompt, encoded
from .results import Chunk, FinishReason, Gathering, Generation, Token
from .sampling import Sampler, greedy
from .settings import GenerationSettings
from .speculation import Speculation
from .stopping import StopStrings
from .text import TextCodec


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


def generate_step(
    session: Session,
    prompt_ids: Sequence[int],
    *,
    sampler: Sampler = greedy,
    processors: Sequence[Processor] = (),
    state: DecodeState | None = None,
    memory_bias: float = 0.0,
    logprobs: int | None = None,
    trace: int | None = None,
    speculation: Speculation | None = None,
    echo: Callable[[PromptLogprobs], object] | None = None,
    held: Sequence[int] = (),
) -> Iterator[Token]:
    """Tokens after `prompt_ids`, without end: the caller stops. Ends by itself where the context is full.

    state: a state of one row to continue (a conversation); a token that was yielded last time and not yet fed is
    fed first. memory_bias applies to a new state. sampler: from logits (1, vocab) to a token id (1,). processors: see
    `processors`. logprobs, trace: as in `GenerationSettings`. speculation: guesses tokens, which are then the same,
    sooner. held: tokens of the prompt that the state holds already, as a `PrefixCache` gives it: processors and guesses
    go by them too. echo: called before the first token with the log-probabilities of the
    prompt's tokens and `logprobs` likeliest ones with them; the state must be empty.

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
    steps = _Steps(session, state, sampler, processors, logprobs, trace, speculation, echo, session.token_ids(held))
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
    """Steps of a state of one row and the choice after each: from all logits, or, where those would have to be copied
    from a device, from the likeliest tokens if they are enough."""

    def __init__(
        self,
        session: Session,
        state: DecodeState,
        sampler: Sampler,
        processors: Sequence[Processor],
        logprobs: int | None,
        trace: int | None,
        speculation: Speculation | None,
        echo: Callable[[PromptLogprobs], object] | None,
        held: list[int],
    ) -> None:
        self.session, self.state, self.echo, self.held = session, state, echo, held
        self.chooser = Chooser(session.manifest.vocab_size, sampler, processors, logprobs, trace)
        self.k = self.chooser.likeliest_needed if session.on_device and speculation is None else None
        self.by_memory = trace is not None
        if self.by_memory:
            session.check_by_memory("trace", trace)
        self.passes: Passes | None = None
        if speculation is not None:
            instance("speculation", speculation, Speculation)
            self.passes = Passes(session, state, speculation, self.by_memory)

    def first(self, prompt_ids: Sequence[int]) -> Token:
        if self.echo is not None:
            found = self.session.prompt_logprobs(prompt_ids, k=self.chooser.logprobs or 0, state=self.state)
            self.chooser.begin(self.session.token_ids(prompt_ids))
            self.echo(found)
            return self.chooser.choose(found.output)
        if self.k is not None:
            told = self.chooser.logprobs is not None
            output = self.session.prefill_likeliest(self.state, [prompt_ids], self.k, probabilities=told)
            return self.chooser.choose_likeliest(output)
        whole = self.session.prefill(self.state, [prompt_ids], by_memory=self.by_memory)
        self.chooser.begin([*self.held, *self.session.token_ids(prompt_ids)])
        return self.chooser.choose(whole)

    def next(self, token: int) -> Token:
        if self.k is not None:
            told = self.chooser.logprobs is not None
            return self.chooser.choose_likeliest(self.session.decode_likeliest(self.state, [token], self.k, told))
        if self.passes is not None:
            return self.chooser.choose(self.passes.after(token, self.chooser.history.ids))
        return self.chooser.choose(self.session.decode_step(self.state, [token], by_memory=self.by_memory))


def stream_generate(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    sampler: Sampler | None = None,
    processors: Sequence[Processor] = (),
    state: DecodeState | None = None,
    **changes: Any,
) -> Iterator[Chunk]:
    """Text as it is completed. prompt: text (a user's turn, or unchanged with `raw`), messages such as
    {"role": "user", "content": text}, or token ids. settings: `changes` override its fields or the defaults, such as
    `max_new_tokens=8`. sampler: replaces the one that the settings describe. processors: after those that the settings
    describe. state: as in `generate_step`; where it holds a conversation, text and messages continue it: the chat
    template's end of the last reply comes before them, and nothing is said again. Raw text follows as it is.

    Ends at an end token or a stop string ("stop"), at max_new_tokens or at the context's end ("length"). As in
    `generate_step`, the state holds the prompt and the tokens of the chunks that were yielded, and errors are raised.
    """
    settings = checked(model, settings, changes)
    if state is None:
        state = model.session.new_state(1, settings.memory_bias)
    ids = encoded(model, prompt, settings, state)
    yield from _stream(model, ids, settings, sampler, processors, state, _speculation(settings))


def _stream(
    model: Model,
    prompt: Prompt,
    settings: GenerationSettings,
    sampler: Sampler | None,
    processors: Sequence[Processor],
    state: DecodeState,
    speculation: Speculation | None,
) -> Iterator[Chunk]:
    text = TextOfTokens(model, settings)
    told: list[PromptLogprobs] = []
    steps = generate_step(
        model.session,
        prompt.ids,
        sampler=settings.sampler() if sampler is None else sampler,
        processors=[*own_processors(model, settings), *functions(processors)],
        state=state,
        logprobs=settings.logprobs,
        trace=settings.trace,
        speculation=speculation,
        echo=told.append if settings.echo else None,
    )
    before, token, given = state.noted(), None, None
    try:
        if prompt.replaces_pending:
            state.pending[0] = None
        for token in steps:
            chunk = text.push(token)
            if told:
                chunk = chunk._replace(prompt=prompt_tokens(prompt.ids, told.pop()))
            given = token
            yield chunk
            if chunk.finish_reason is not None:
                return
        yield text.end()
    except BaseException:
        _take_back(state, before, token, given)
        raise


def own_processors(model: Model, settings: GenerationSettings) -> list[Processor]:
    """The processors that settings describe for a model."""
    manifest = model.session.manifest
    ends = (*manifest.eos_token_ids, *settings.stop_token_ids)
    return [*make_processors(settings, ends, manifest.vocab_size), *constraints_of(settings, model.codec)]


class TextOfTokens:
    """One row's tokens as chunks of text, and where they end."""

    def __init__(self, model: Model, settings: GenerationSettings) -> None:
        self._stream = model.codec.stream()
        self._stops = StopStrings(settings.stop)
        self._ends = {*model.session.manifest.eos_token_ids, *settings.stop_token_ids}
        self._left = settings.max_new_tokens

    def push(self, token: Token) -> Chunk:
        """The chunk of a token; with a finish reason it is the last one."""
        self._left -= 1
        if token.id in self._ends:
            return self._last("", token, "stop", token.id)
        text = self._stops.push(self._stream.push(token.id))
        if self._stops.matched is not None:
            return Chunk(text, token, "stop", self._stops.matched)
        return Chunk(text, token, None) if self._left else self._last(text, token, "length")

    def end(self) -> Chunk:
        """The last chunk of a text that the context ends."""
        return self._last("", None, "length")

    def _last(self, text: str, token: Token | None, reason: FinishReason, stopped_by: int | None = None) -> Chunk:
        text += self._stops.push(self._stream.finish())
        if self._stops.matched is not None:
            return Chunk(text, token, "stop", self._stops.matched)
        return Chunk(text + self._stops.finish(), token, reason, stopped_by)


def generate(
    model: Model,
    prompt: str | Sequence[Message] | Sequence[int],
    settings: GenerationSettings | None = None,
    *,
    sampler: Sampler | None = None,
    processors: Sequence[Processor] = (),
    state: DecodeState | None = None,
    **changes: Any,
) -> Generation:
    """Run `stream_generate` to its end and collect it; arguments and errors are the same. After an exception, Ctrl-C
    too, the state is as it was before."""
    settings = checked(model, settings, changes)
    if state is None:
        state = model.session.new_state(1, settings.memory_bias)
    prompt_of_state = encoded(model, prompt, settings, state)
    before = state.noted()
    try:
        return _collected(model, prompt_of_state, settings, sampler, processors, state)
    except BaseException:
        state.restore(before)
        raise


def _collected(
    model: Model,
    prompt: Prompt,
    settings: GenerationSettings,
    sampler: Sampler | None,
    processors: Sequence[Processor],
    state: DecodeState,
) -> Generation:
    speculation = _speculation(settings)
    found = Gathering(len(prompt.ids))
    for chunk in _stream(model, prompt, settings, sampler, processors, state, speculation):
        found.take(chunk)
    if speculation is None:
        return found.result()
    return found.result(drafted=speculation.drafted, accepted=speculation.accepted, passes=speculation.passes)


def prompt_tokens(ids: Sequence[int], found: PromptLogprobs) -> tuple[Token, ...]:
    """A prompt's tokens with what `Session.prompt_logprobs` found; of the first one nothing is known."""
    each = zip(found.logprobs.tolist(), found.ids.tolist(), found.id_logprobs.tolist(), strict=True)
    gates = [None] * len(found.logprobs) if found.gate_mean is None else found.gate_mean.tolist()
    rest = [
        Token(token, None, gate, logprob, tuple(map(Candidate, likeliest, theirs)))
        for token, gate, (logprob, likeliest, theirs) in zip(ids[1:], gates, each, strict=True)
    ]
    return (Token(ids[0], None, None), *rest)


def _speculation(settings: GenerationSettings) -> Speculation | None:
    return Speculation(settings.speculate) if settings.speculate else None


def checked(model: Model, settings: GenerationSettings | None, changes: dict[str, Any]) -> GenerationSettings:
    """The settings with their changes."""
    instance("model", model, Model)
    if settings is not None:
        instance("settings", settings, GenerationSettings)
    return replace(settings or GenerationSettings(), **changes)
