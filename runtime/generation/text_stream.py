"""A tokenizer's decoder, one token at a time: what is given out stays, and all of it is what decoding at once gives.

Every step of the decoder becomes a stage that lets text through as soon as no later token can change it. Work and
memory are constant per token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import Decoder
from tokenizers.pre_tokenizers import ByteLevel

_ANCHOR = "x"  # stands where a token has a neighbour: decoders treat first and last tokens differently


class Stage(Protocol):
    """A step of the decoder. Gets pieces one by one, gives those that are final."""

    def push(self, piece: str) -> Sequence[str]: ...

    def finish(self) -> Sequence[str]: ...


def final_pieces(tokenizer: Tokenizer) -> list[Stage] | None:
    """The stages of a tokenizer's decoder; None where only all tokens together tell the text (CTC, a regular expression
    over the whole text, ends that are stripped)."""
    if tokenizer.decoder is None:
        return [_Spaced()]
    stages: list[Stage] = []
    fused = False  # whether pieces are parts of one text, or tokens
    for config in _flat(json.loads(tokenizer.decoder.__getstate__())):
        kind = config["type"]
        if kind == "Fuse":
            fused = True
            continue
        stage = _fused_stage(config) if fused else _token_stage(config)
        if stage is None:
            return None
        stages.append(stage)
        fused = fused or kind == "ByteLevel"
    return stages


def push_through(stages: Sequence[Stage], pieces: Sequence[str]) -> str:
    """What `pieces` let out at the end of all stages."""
    for stage in stages:
        pieces = [out for piece in pieces for out in stage.push(piece)]
    return "".join(pieces)


def finish_all(stages: Sequence[Stage]) -> str:
    """What the stages still hold when no token follows."""
    return "".join(push_through(stages[index + 1 :], stage.finish()) for index, stage in enumerate(stages))


def _flat(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if config["type"] == "Sequence":
        for part in config["decoders"]:
            yield from _flat(part)
    else:
        yield config


def _token_stage(config: dict[str, Any]) -> Stage | None:
    """A stage of tokens."""
    kind = config["type"]
    if kind == "ByteLevel":
        return _Bytes()
    if kind == "ByteFallback":
        return _ByteRuns(_decoder(config))
    if kind == "Replace" or (kind == "Strip" and not config["stop"]):
        return _EachAlike(_decoder(config))
    if kind in ("Metaspace", "WordPiece"):
        return _FirstApart(_decoder(config))
    if kind == "BPEDecoder":
        return _LastApart(_decoder(config))
    return None


def _fused_stage(config: dict[str, Any]) -> Stage | None:
    """A stage of a text that comes in parts."""
    if config["type"] == "Strip" and not config["stop"]:
        return _Beginning(config["content"], config["start"])
    if config["type"] == "Replace" and config["pattern"].get("String"):
        return _Replaced(config["pattern"]["String"], config["content"])
    return None


def _decoder(config: dict[str, Any]) -> Decoder:
    """One step of a decoder as an object of the library."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    decoder: Decoder = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "decoder": config})).decoder
    return decoder


class _Stateless:
    def finish(self) -> Sequence[str]:
        return ()


class _Spaced(_Stateless):
    """No decoder: tokens with spaces between them."""

    def __init__(self) -> None:
        self._between = ""

    def push(self, piece: str) -> Sequence[str]:
        out, self._between = self._between + piece, " "
        return (out,)


class _EachAlike(_Stateless):
    """A step that treats every token alike."""

    def __init__(self, decoder: Decoder) -> None:
        self._decode = decoder.decode

    def push(self, piece: str) -> Sequence[str]:
        return (self._decode([piece]),)


class _FirstApart(_Stateless):
    """A step that treats the first token differently."""

    def __init__(self, decoder: Decoder) -> None:
        self._decode = decoder.decode
        self._first = True
        self._skip = len(self._decode([_ANCHOR]))

    def push(self, piece: str) -> Sequence[str]:
        if self._first:
            self._first = False
            return (self._decode([piece]),)
        return (self._decode([_ANCHOR, piece])[self._skip :],)


class _LastApart:
    """A step that treats the last token differently."""

    def __init__(self, decoder: Decoder) -> None:
        self._decode = decoder.decode
        self._held: str | None = None
        self._skip = len(self._decode([_ANCHOR]))

    def push(self, piece: str) -> Sequence[str]:
        held, self._held = self._held, piece
        if held is None:
            return ()
        text = self._decode([held, _ANCHOR])
        return (text[: len(text) - self._skip],)

    def finish(self) -> Sequence[str]:
        return () if self._held is None else (self._decode([self._held]),)


class _Bytes:
    """Byte-level tokens. Whole characters go out, and U+FFFD as soon as bytes can no longer become one."""

    def __init__(self) -> None:
        self._byte_of = _bytes_of_characters()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> Sequence[str]:
        try:
            data = bytes(self._byte_of[char] for char in piece)
        except KeyError:  # an added token, which is text
            data = piece.encode()
        return (self._decoder.decode(data),)

    def finish(self) -> Sequence[str]:
        return (self._decoder.decode(b"", final=True),)


class _ByteRuns:
    """Tokens such as <0x0A>. A run of them is text if all of it is UTF-8, and one U+FFFD a byte if not: it goes out
    when it is over."""

    def __init__(self, decoder: Decoder) -> None:
        self._decode = decoder.decode
        self._run: list[str] = []

    def push(self, piece: str) -> Sequence[str]:
        if self._decode([piece]) != piece:
            self._run.append(piece)
            return ()
        return (*self.finish(), piece)

    def finish(self) -> Sequence[str]:
        run, self._run = self._run, []
        if not run:
            return ()
        text = self._decode(run)
        return tuple(text) if text == "\ufffd" * len(run) else (text,)


class _Beginning(_Stateless):
    """At most `count` times `char` is left out at the beginning."""

    def __init__(self, char: str, count: int) -> None:
        self._char, self._left = char, count

    def push(self, piece: str) -> Sequence[str]:
        while self._left and piece:
            if piece[0] != self._char:
                self._left = 0
            else:
                piece, self._left = piece[1:], self._left - 1
        return (piece,)


class _Replaced:
    """Every `old` becomes `new`; an end that may be the beginning of one waits."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new, self._held = old, new, ""

    def push(self, piece: str) -> Sequence[str]:
        *parts, rest = (self._held + piece).split(self._old)
        waits = next(size for size in range(min(len(rest), len(self._old) - 1), -1, -1) if self._may_begin(rest, size))
        self._held = rest[len(rest) - waits :]
        return (self._new.join([*parts, rest[: len(rest) - waits]]),)

    def finish(self) -> Sequence[str]:
        return (self._held,)

    def _may_begin(self, rest: str, size: int) -> bool:
        return rest.endswith(self._old[:size])


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for. Printable characters of Latin-1 stand for
    themselves, the library's other characters, in their order, for the other bytes."""
    alphabet = set(ByteLevel.alphabet())
    own = {char for char in alphabet if ord(char) < 256}
    others = (byte for byte in range(256) if chr(byte) not in own)
    return {char: ord(char) for char in own} | dict(zip(sorted(alphabet - own), others, strict=True))
