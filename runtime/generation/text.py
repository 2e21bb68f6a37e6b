"""Text to token ids and back. Knows nothing about models."""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import ArtifactError, PromptError
from .borders import border
from .chat_template import Clock, Message, check_messages, compile_template, render_chat
from .control_tokens import (
    FILLER,
    Span,
    content_spans,
    controls_outside,
    encode_content_as_text,
    mark,
    without_control_tokens,
    without_words,
)
from .text_stream import Stage, final_pieces, finish_all, push_through

_PROBES = (
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "tool", "user"),
    ("system", "user", "assistant", "tool", "assistant", "user"),
    ("developer", "user"),
)
"""Turns that show what a template writes around them."""
_REPLY = "imsmreply"  # a word that templates have no reason to change


class TextCodec:
    """The artifact's tokenizer.json and chat template."""

    def __init__(
        self,
        folder: Path,
        special_tokens: dict[str, str],
        raw: bool = False,
        eos_token_ids: Sequence[int] = (),
        clock: Clock = datetime.datetime.now,
    ) -> None:
        """special_tokens: by the names that templates know. raw: whether prompts are sent as they are unless told
        otherwise. eos_token_ids: tokens that end a text. clock: what templates are told about the time. Raises
        ArtifactError if a file cannot be read."""
        path = folder / "tokenizer.json"
        with border(ArtifactError, f"cannot read {path}"):
            self.tokenizer = Tokenizer.from_file(str(path))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            added = self.tokenizer.get_added_tokens_decoder()
        self._unseen = {token.content for token in added.values() if token.special}
        self.eos_token_ids = frozenset(eos_token_ids)
        self.special_tokens = special_tokens
        self.raw = raw
        template = folder / "chat_template.jinja"
        with border(ArtifactError, f"cannot read {template}"):
            source = template.read_text(encoding="utf-8") if template.is_file() else None
        self.template = None if source is None else compile_template(source, clock)

    def encode_prompt(self, prompt: str, raw: bool | None = None, control_tokens: bool = False) -> list[int]:
        """One user turn through the chat template; as it is, with the special tokens that the tokenizer adds, if
        there is no template or `raw` (None: as the model was tuned). control_tokens: as in `encode_chat`. Raises
        PromptError if it is empty or cannot be encoded."""
        if self.is_raw(raw):
            return self.encode_raw(prompt)
        if not prompt:
            raise PromptError("the prompt is empty")
        return self.encode_chat([{"role": "user", "content": prompt}], control_tokens)

    def encode_chat(self, messages: Sequence[Message], control_tokens: bool = False) -> list[int]:
        """A conversation of {"role", "content"} messages. control_tokens: whether a control token that a content spells
        is one, as in transformers; else it is the text that it is.

        Raises PromptError without a chat template, for what is no message, if the template refuses them, and where a
        content spells a control token that cannot be written as text."""
        check_messages(messages)
        rendered = self._render(messages)
        return self._encode_rendered(rendered, () if control_tokens else self._content_spans(messages, rendered))

    def encode_raw(self, text: str, beginning: bool = True) -> list[int]:
        """Text as it is, at the beginning with the special tokens that the tokenizer adds. Raises PromptError if it is
        empty or cannot be encoded."""
        if not text:
            raise PromptError("the prompt is empty")
        return self._encode(text, special_tokens=beginning)

    def encode_plain(self, text: str, special: bool = True) -> list[int]:
        """Text as it is, but what it spells of control tokens stays text. special: with the special tokens that the
        tokenizer adds. Raises PromptError as `encode_raw`, and where the tokenizer cannot write it so."""
        if not text or not self._controls(text):
            return self.encode_raw(text, beginning=special)
        ids = self._encode_rendered(text, [(0, len(text))])
        if not special:
            return ids
        bare, whole = (self._encode("a", special_tokens=added) for added in (False, True))
        starts = range(len(whole) - len(bare) + 1)
        start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
        if start is None:
            raise PromptError("the text spells a control token, which this tokenizer cannot write as text; take it out")
        return [*whole[:start], *ids, *whole[start + len(bare) :]]

    def encode_pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Text as it is and a text that follows it, each as tokens. Both are encoded together, and the continuation
        begins where the tokens of the prompt end; whitespace at the prompt's end belongs to the continuation, as
        tokenizers put it into the word that follows (what lm-evaluation-harness does). Where a token would span the
        border, the continuation is encoded apart. An empty prompt is the special tokens that the tokenizer begins with.
        Raises PromptError if one of the two has no tokens, or cannot be encoded."""
        begin = prompt.rstrip()
        rest = prompt[len(begin) :] + continuation
        ids = self._encode(begin, special_tokens=True)
        whole = self._encode(begin + rest, special_tokens=True)
        return ids, _after(ids, whole) or self._encode(rest, special_tokens=False)

    def encode_chat_pair(
        self, messages: Sequence[Message], continuation: str, control_tokens: bool = False
    ) -> tuple[list[int], list[int]]:
        """`encode_chat`, and the tokens of a reply to it, encoded together as in `encode_pair`; the prompt keeps its
        whitespace, which is the template's. control_tokens: of the reply too."""
        check_messages(messages)
        rendered = self._render(messages)
        spans = () if control_tokens else self._content_spans(messages, rendered)
        own = () if control_tokens else [(0, len(continuation))]
        after = [(len(rendered) + begin, len(rendered) + end) for begin, end in own]
        ids = self._encode_rendered(rendered, spans)
        whole = self._encode_rendered(rendered + continuation, [*spans, *after])
        return ids, _after(ids, whole) or self._encode_rendered(continuation, own)

    def encode_continuation(
        self, messages: Sequence[Message], control_tokens: bool = False, rest: str = ""
    ) -> list[int]:
        """What follows the text of a reply when a conversation goes on with `messages`: the end of the reply's turn,
        the messages, and the beginning of the next reply. control_tokens: as in `encode_chat`. rest: an end of the
        reply's text that comes before all that. Raises PromptError as `encode_chat`, and if the template does not show
        where a reply ends."""
        check_messages(messages)
        reply = _REPLY
        while any(reply in str(message) for message in messages):
            reply += "x"
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": reply}, *messages]
        text = self._render(turns)
        if text.count(reply) != 1:
            raise PromptError(
                "the chat template does not show where a reply ends, so that no conversation can go on in a state; "
                "give the whole conversation as messages, without a state"
            )
        spans = () if control_tokens else self._content_spans(turns, text)
        end, more = text.index(reply) + len(reply), len(rest)
        text = text[:end] + rest + text[end:]
        spans = [(first + more * (first >= end), last + more * (last >= end)) for first, last in spans]

        def encoded_from(start: int) -> list[int]:
            shifted = [(max(begin - start, 0), end - start) for begin, end in spans if end > start]
            return self._encode_rendered(text[start:], shifted)

        begin = text.index(reply)
        whole, before = encoded_from(begin), self._encode(reply, special_tokens=False)
        if whole[: len(before)] == before:  # not at a beginning, where some tokenizers put a space
            return whole[len(before) :]
        return encoded_from(end)

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as the chat template writes it. Raises PromptError as `encode_chat`."""
        check_messages(messages)
        return self._render(messages)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens and those that the tokenizer does not know. Raises PromptError for
        what are no token ids, and ArtifactError if the tokenizer fails."""
        ids = list(tokens)
        if not all(0 <= token < 2**32 for token in ids):
            raise PromptError("token ids are whole numbers from 0")
        with border(ArtifactError, "tokenizer.json cannot decode these tokens"):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """One token's text as it is within a text, special tokens as they are spelt; U+FFFD for parts of characters.
        Raises as `decode`."""
        if self.is_special(token):
            return str(self.tokenizer.id_to_token(token))
        return self.decode([token, token])[len(self.decode([token])) :]  # at a beginning some leave out a space

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def piece(self, token: int) -> str | None:
        """What the tokenizer's decoder gets for a token; None for special and unknown ones."""
        piece = self.tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        return None if piece in self._unseen else piece

    def drops_first_space(self) -> bool:
        """Whether a text is shown without the space that its first token begins with, as SentencePiece has it."""
        with border(ArtifactError, "tokenizer.json cannot decode"):
            return self.tokenizer.decoder is not None and bool(self.tokenizer.decoder.decode(["▁a"]) == "a")

    def decoder_stages(self) -> list[Stage] | None:
        """The decoder, for one text: see `text_stream.final_pieces`."""
        return final_pieces(self.tokenizer)

    def is_special(self, token: int) -> bool:
        """Whether a token is a special one of the tokenizer, which is no text."""
        return self.tokenizer.id_to_token(token) in self._unseen

    def is_raw(self, raw: bool | None) -> bool:
        """Whether text is sent as it is, if this is what was asked for."""
        return self.template is None or (self.raw if raw is None else raw)

    def _render(self, messages: Sequence[Message]) -> str:
        if self.template is None:
            raise PromptError("this artifact has no chat template; send the prompt as text")
        return render_chat(self.template, messages, self.special_tokens)

    def _content_spans(self, messages: Sequence[Message], rendered: str) -> Sequence[Span]:
        """Where in the rendered conversation the messages' own texts are. Raises PromptError if that cannot be told and
        they make control tokens."""
        marked = mark(messages)
        if any(self._controls(word) for word in set(marked.unmarked) if word):
            raise PromptError(
                "a role, a key or a type of a message spells a control token (or one of a very long list of texts); "
                "take it out, or allow control tokens (control_tokens)"
            )
        spans: list[Span] | None = None
        with contextlib.suppress(PromptError):  # a template may refuse the marks
            spans = content_spans(rendered, self._render(marked.messages), marked.texts)
        spelt = any(map(self._controls, marked.texts))
        if spans is not None and not spelt:
            return spans
        # What the template writes of its own must be there without the texts too: no more, no other.
        outside: list[int] | None = None
        with contextlib.suppress(PromptError):
            outside = self._controls(self._render(without_words(messages)))
        if spans is None:
            spelt = spelt or (outside is not None and self._controls(rendered) != outside)
        else:
            spelt = self._controls(rendered, spans) != outside
        if spelt:
            raise PromptError(
                "a message spells a control token, and the chat template does not show where its text goes; take it "
                "out, or allow control tokens (control_tokens)"
            )
        return spans or ()

    def _controls(self, text: str, spans: Sequence[Span] = ()) -> list[int]:
        """The control tokens in a text, outside of `spans`."""
        with border(PromptError, "tokenizer.json cannot encode the prompt"):
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return controls_outside(encoding, spans, self._control_tokens)

    def _encode_rendered(self, text: str, spans: Sequence[Span]) -> list[int]:
        with border(PromptError, "tokenizer.json cannot encode the prompt"):
            ids = encode_content_as_text(self.tokenizer, self._plain, text, spans, self._control_tokens)
        return _some(ids)

    @functools.cached_property
    def _control_tokens(self) -> frozenset[int]:
        """Special tokens but the unknown one, end tokens, and added tokens that the template writes around turns."""
        added = self.tokenizer.get_added_tokens_decoder()
        found = {number for number, token in added.items() if token.special}
        named = (self.tokenizer.token_to_id(word) for word in self.special_tokens.values())
        found |= {number for number in named if number is not None}
        for roles in _PROBES:
            with contextlib.suppress(PromptError):  # a template may refuse these
                turns = [{"role": role, "content": "Hello"} for role in roles]
                written = set(self._encode(self._render(turns), special_tokens=False))
                found |= {number for number in written if number in added and not added[number].content.isspace()}
        with contextlib.suppress(PromptError):
            found -= set(self._encode(FILLER, special_tokens=False))  # what stands for unknown characters
        return frozenset(found | self.eos_token_ids)

    def _plain(self) -> Tokenizer:
        return self._plain_tokenizer

    @functools.cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        return without_control_tokens(self.tokenizer, self._control_tokens)

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = f"character {error.start + 1} is {text[error.start]!r}"
            raise PromptError(f"the prompt is not text: {what}, which UTF-8 does not have") from error
        with border(PromptError, "tokenizer.json cannot encode the prompt"):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return _some(ids)


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise PromptError("the prompt has no tokens")
    return ids


def _after(ids: list[int], whole: list[int]) -> list[int]:
    """What follows `ids` in `whole`; nothing where that begins otherwise."""
    return whole[len(ids) :] if whole[: len(ids)] == ids else []


class TextStream:
    """Text as tokens come in, never to be taken back: whole characters only, however many tokens a character takes.
    All of it is what `TextCodec.decode` gives for all tokens."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._stages = codec.decoder_stages()
        self._tokens: list[int] = []
        self._sent = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete, or bytes may still become one. Raises
        nothing."""
        self._tokens.append(token)
        text = ""
        if self._stages is not None and (piece := self._codec.piece(token)) is not None:
            try:
                text = push_through(self._stages, [piece])
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # the library's, panics too; `finish` then says what is wrong
                self._stages = None
        self._sent += len(text)
        return text

    def finish(self) -> str:
        """What is left at the end: an incomplete character as the tokenizer writes it. Raises ArtifactError if the
        tokenizer cannot decode the tokens."""
        if self._stages is not None:
            return finish_all(self._stages)
        return self._codec.decode(self._tokens)[self._sent :]
