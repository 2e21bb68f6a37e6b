"""Text to token ids and back. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ..errors import ArtifactError, PromptError
from .chat_template import Message, compile_template, render_chat


class TextCodec:
    """The artifact's tokenizer.json and chat template."""

    def __init__(self, folder: Path, special_tokens: dict[str, str]) -> None:
        """Raises ArtifactError if a file cannot be read."""
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ArtifactError(f"cannot read {path}: {error}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.special_tokens = special_tokens
        template = folder / "chat_template.jinja"
        self.template = compile_template(template.read_text(encoding="utf-8")) if template.is_file() else None

    def encode_prompt(self, prompt: str, raw: bool = False) -> list[int]:
        """One user turn through the chat template; as it is, with the special tokens that the tokenizer adds, if
        there is no template or `raw`. Raises PromptError if it is empty."""
        if not prompt:
            raise PromptError("the prompt is empty")
        if raw or self.template is None:
            return self._encode(prompt, special_tokens=True)
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation of {"role", "content"} messages. Raises PromptError without a chat template."""
        if self.template is None:
            raise PromptError("this artifact has no chat template; send the prompt as text")
        return self._encode(render_chat(self.template, messages, self.special_tokens), special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def _encode(self, text: str, special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special_tokens).ids
        if not ids:
            raise PromptError("the prompt has no tokens")
        return ids


class TextStream:
    """Text as tokens come in: whole characters only, however many tokens a character takes."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._stream = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._sent = ""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is incomplete."""
        self._tokens.append(token)
        text = self._stream.step(self._codec.tokenizer, token) or ""
        self._sent += text
        return text

    def finish(self) -> str:
        """What is left at the end: an incomplete character as the tokenizer writes it."""
        whole = self._codec.decode(self._tokens)
        return whole[len(self._sent) :] if whole.startswith(self._sent) else ""
