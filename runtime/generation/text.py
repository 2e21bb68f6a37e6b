"""Text to token ids and back. Knows nothing about models."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import ArtifactError, PromptError
from .borders import border
from .chat_template import Clock, Message, check_messages, compile_template, render_chat
from .text_stream import Stage, final_pieces, finish_all, push_through

_REPLY = "imsmreply"  # a word that templates have no reason to change


class TextCodec:
    """The artifact's tokenizer.json and chat template."""

    def __init__(
        self,
        folder: Path,
        special_tokens: dict[str, str],
        raw: bool = False,
        clock: Clock = datetime.datetime.now,
    ) -> None:
        """raw: whether prompts are sent as they are unless told otherwise. clock: what templates are told about the
        time. Raises ArtifactError if a file cannot be read."""
        path = folder / "tokenizer.json"
        with border(ArtifactError, f"cannot read {path}"):
            self.tokenizer = Tokenizer.from_file(str(path))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            added = self.tokenizer.get_added_tokens_decoder().values()
        self._unseen = {token.content for token in added if token.special}
        self.special_tokens = special_tokens
        self.raw = raw
        template = folder / "chat_template.jinja"
        with border(ArtifactError, f"cannot read {template}"):
            source = template.read_text(encoding="utf-8") if template.is_file() else None
        self.template = None if source is None else compile_template(source, clock)

    def encode_prompt(self, prompt: str, raw: bool | None = None) -> list[int]:
        """One user turn through the chat template; as it is, with the special tokens that the tokenizer adds, if
        there is no template or `raw` (None: as the model was tuned). Raises PromptError if it is empty or cannot be
        encoded."""
        if self.is_raw(raw):
            return self.encode_raw(prompt)
        if not prompt:
            raise PromptError("the prompt is empty")
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation of {"role", "content"} messages. Raises PromptError without a chat template, for what is no
        message, and if the template refuses them."""
        return self._encode(self._render(messages), special_tokens=False)

    def encode_raw(self, text: str, beginning: bool = True) -> list[int]:
        """Text as it is, at the beginning with the special tokens that the tokenizer adds. Raises PromptError if it is
        empty or cannot be encoded."""
        if not text:
            raise PromptError("the prompt is empty")
        return self._encode(text, special_tokens=beginning)

    def encode_continuation(self, messages: Sequence[Message]) -> list[int]:
        """What follows the text of a reply when a conversation goes on with `messages`: the end of the reply's turn,
        the messages, and the beginning of the next reply. Raises PromptError as `encode_chat` does, and if the template
        does not show where a reply ends."""
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
        after = text.partition(reply)[2]
        whole, before = self._encode(reply + after, special_tokens=False), self._encode(reply, special_tokens=False)
        if whole[: len(before)] == before:  # not at a beginning, where some tokenizers put a space
            return whole[len(before) :]
        return self._encode(after, special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens and those that the tokenizer does not know. Raises PromptError for
        what are no token ids, and ArtifactError if the tokenizer fails."""
        ids = list(tokens)
        if not all(0 <= token < 2**32 for token in ids):
            raise PromptError("token ids are whole numbers from 0")
        with border(ArtifactError, "tokenizer.json cannot decode these tokens"):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def piece(self, token: int) -> str | None:
        """What the tokenizer's decoder gets for a token; None for special and unknown ones."""
        piece = self.tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
        return None if piece in self._unseen else piece

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
        check_messages(messages)
        return render_chat(self.template, messages, self.special_tokens)

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        with border(PromptError, "tokenizer.json cannot encode the prompt"):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        if not ids:
            raise PromptError("the prompt has no tokens")
        return ids


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
