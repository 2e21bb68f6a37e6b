"""Control tokens that the content of messages spells: a user must not end his own turn by writing how it ends.

The template's control tokens stay what they are; those that stem from content are encoded as the text that they are. To
tell them apart, messages are rendered a second time with invisible marks around their contents.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from ..errors import PromptError
from .chat_template import Message

_FIRST_MARK = 0x100000  # a plane for private use, which is in no text
_MOST_MARKS = 0x7FFF
_MARK = re.compile("[\U00100000-\U0010ffff]")
FILLER = "\ue000"
"""A character that no text has."""
_KEPT = ("role", "type")  # what templates compare with words of their own
Span = tuple[int, int]


class Marked(NamedTuple):
    """Messages with marks around the texts in them, and those texts, stripped, in the order of their marks. unmarked:
    the words that got none: keys, roles and types, and texts beyond the number of marks."""

    messages: list[Message]
    texts: list[str]
    unmarked: list[str]


def mark(messages: Sequence[Message]) -> Marked:
    """Put marks around the texts of messages, inside the white space at their ends, which templates may strip."""
    texts: list[str] = []
    unmarked: list[str] = []

    def marked(value: str) -> str:
        text = value.strip()
        if not text:
            return value
        if len(texts) >= _MOST_MARKS:
            unmarked.append(text)
            return value
        begin, end = _marks(len(texts))
        texts.append(text)
        before, _, after = value.partition(text)
        return f"{before}{begin}{text}{end}{after}"

    found = [_with_texts(message, marked) for message in messages]
    return Marked(found, texts, [*unmarked, *_kept_words(messages)])


def without_words(messages: Sequence[Message]) -> list[Message]:
    """Messages of the same form that say nothing."""
    return [_with_texts(message, lambda text: re.sub(r"\S", "x", text)) for message in messages]


def content_spans(rendered: str, marked: str, texts: Sequence[str]) -> list[Span] | None:
    """Where in `rendered` the texts of the messages are: begin and end. marked: the same rendered with marks. None if
    the marks changed what the template writes, so that it cannot be told."""
    plain, spans, begun, last = "", [], {}, 0
    for found in _MARK.finditer(marked):
        number = ord(found[0]) - _FIRST_MARK
        plain += marked[last : found.start()]
        last = found.end()
        if number >= 2 * len(texts):
            return None
        if number % 2 == 0:
            begun[number // 2] = len(plain)
        elif number // 2 in begun:
            spans.append((begun.pop(number // 2), len(plain)))
        else:  # the template cut the beginning off
            spans.append((len(plain) - _common_end(plain, texts[number // 2]), len(plain)))
    if plain + marked[last:] != rendered:
        return None
    for number, begin in begun.items():  # the template cut the end off
        spans.append((begin, begin + _common_beginning(rendered[begin:], texts[number])))
    return spans


def encode_content_as_text(
    tokenizer: Tokenizer, plain: Callable[[], Tokenizer], text: str, spans: Sequence[Span], control: Collection[int]
) -> list[int]:
    """Token ids of a rendered conversation, in which no token of `control` stems from `spans`. Where none would, these
    are the tokenizer's ids. plain: gives `without_control_tokens` of it.

    Raises PromptError where the tokenizer has no other way to write what the content spells.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    filled, spelt = text, _spelt(encoding, text, spans, control)
    if not spelt:
        ids: list[int] = encoding.ids
        return ids
    found = []
    while spelt:  # what was hidden by another one may come to light
        found += spelt
        for begin, end in spelt:
            filled = filled[:begin] + FILLER * (end - begin) + filled[end:]
        encoding = tokenizer.encode(filled, add_special_tokens=False)
        spelt = _spelt(encoding, filled, spans, control)
    pieces = _between_control_tokens(encoding, text, control)
    result: list[int] = []
    for begin, end, kept in pieces:
        if not any(begin <= first < end for first, _ in found):
            result += kept
            continue
        written = _written(tokenizer, plain(), text[begin:end], begin, control)
        if any(token in control for token in written):
            words = ", ".join(sorted({text[first:last] for first, last in found}))
            raise PromptError(
                f"a message spells {words}, which the tokenizer can only write as control tokens; take it out, or "
                "allow control tokens (control_tokens)"
            )
        result += written
    return result


def without_control_tokens(tokenizer: Tokenizer, control: Collection[int]) -> Tokenizer:
    """A copy of a tokenizer that reads the control tokens among its added tokens as text."""
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["id"] in control
    copy: Tokenizer = Tokenizer.from_str(json.dumps(document))
    copy.encode_special_tokens = True
    return copy


def _kept_words(value: Any, kept: bool = False) -> Iterator[str]:
    """What `_with_texts` leaves as it is."""
    if isinstance(value, str):
        yield from [value] if kept else []
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _kept_words(item, kept or key in _KEPT)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _kept_words(item, kept)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A message with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: item if key in _KEPT else _with_texts(item, change) for key, item in value.items()}
    return [_with_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def _marks(number: int) -> tuple[str, str]:
    return chr(_FIRST_MARK + 2 * number), chr(_FIRST_MARK + 2 * number + 1)


def _common_end(one: str, other: str) -> int:
    """How many characters the ends of both have in common."""
    return _common_beginning(one[::-1], other[::-1])


def _common_beginning(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def _spelt(encoding: Encoding, text: str, spans: Sequence[Span], control: Collection[int]) -> list[Span]:
    """Where content makes a control token, or a part of one: the part of the token that is content."""
    found, apart = [], _apart(spans)
    for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in control:
            word = text[begin:end]  # some tokens take the white space beside them
            begin, end = begin + len(word) - len(word.lstrip()), end - len(word) + len(word.rstrip())
            index = bisect_right(apart, begin, key=itemgetter(1))  # the first that ends after the token's beginning
            while index < len(apart) and apart[index][0] < end:
                found.append((max(begin, apart[index][0]), min(end, apart[index][1])))
                index += 1
    return [(begin, end) for begin, end in found if text[begin:end].strip(FILLER)]


def _apart(spans: Sequence[Span]) -> list[Span]:
    """The spans in order, those that overlap as one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def controls_outside(encoding: Encoding, spans: Sequence[Span], control: Collection[int]) -> list[int]:
    """The control tokens that nothing in `spans` has a part in."""
    found, apart = [], _apart(spans)
    for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in control:
            index = bisect_right(apart, begin, key=itemgetter(1))
            if index == len(apart) or apart[index][0] >= end:
                found.append(token)
    return found


def _between_control_tokens(
    encoding: Encoding, text: str, control: Collection[int]
) -> list[tuple[int, int, list[int]]]:
    """The text in pieces, control tokens and what is between them: begin, end, token ids."""
    pieces: list[tuple[int, int, list[int]]] = [(0, 0, [])]
    for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in control:
            first, _, ids = pieces[-1]
            pieces[-1] = (first, begin, ids)
            pieces += [(begin, end, [token]), (end, end, [])]
        else:
            pieces[-1][2].append(token)
    first, _, ids = pieces[-1]
    pieces[-1] = (first, len(text), ids)
    return pieces


def _written(tokenizer: Tokenizer, plain: Tokenizer, piece: str, begin: int, control: Collection[int]) -> list[int]:
    """A piece between control tokens, without any. Not at the beginning of the text, tokenizers that put a space there
    must not put one."""
    ids: list[int] = plain.encode(piece, add_special_tokens=False).ids
    if begin == 0:
        return ids
    token = next(word for word in map(tokenizer.id_to_token, control) if word is not None)
    after_one = tokenizer.encode(f"{token}a", add_special_tokens=False).ids[1:]
    if after_one == tokenizer.encode("a", add_special_tokens=False).ids:
        return ids
    line = plain.encode("\n", add_special_tokens=False).ids
    whole: list[int] = plain.encode(f"\n{piece}", add_special_tokens=False).ids
    return whole[len(line) :] if whole[: len(line)] == line else ids
