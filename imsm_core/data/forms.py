"""What a row says: the forms that data for chat models comes in, as turns or as plain text. Knows nothing about tokens.

The first row decides which form a file has, and every other row must have it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .readers import BadRow, Row, kind_of

Message = dict[str, Any]
"""One turn as chat templates read it: a role, the content as text, and what else the data says about it."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's
_PAIRS = (("prompt", "answer"), ("prompt", "completion"))
FORMS = (
    "'messages', 'conversations', 'prompt' with 'answer' or 'completion', 'instruction' with 'output' (and 'input'), "
    "or 'text'"
)
NULL = "null"
"""The reason of a row that says that it has no value."""


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer to it. prompt: text, which becomes a user's turn, or the turns before the answer."""

    prompt: str | list[Message]
    answer: str


@dataclass(frozen=True)
class Fields:
    """The fields that hold prompt and answer, where they are not among those of a known form. None: not given.
    required: a file must have them; else they are looked for first."""

    prompt: str | None = None
    answer: str | None = None
    required: bool = True


@dataclass(frozen=True)
class Form:
    """name: messages, conversations, prompts, instructions or text. fields: the row's fields that it reads."""

    name: str
    fields: tuple[str, ...]

    def turns(self, row: Row) -> list[Turn]:
        """Every prompt of the row with its answer. Raises BadRow. Not for plain text."""
        if self.name in ("messages", "conversations"):
            messages = _conversation(_field(row, self.fields[0]), self.fields[0])
            if self.name == "conversations" and row.get("system"):  # where some of these files have it
                messages.insert(0, {"role": "system", "content": _text(row, "system")})
            _refuse_tools(row)
            found = list(_answered(messages, 0))
            if not found:
                raise BadRow("no answer", "no turn of a user is followed by one of the assistant")
            return found
        if self.name == "instructions":
            instruction, more = _text(row, "instruction"), row.get("input")
            context = "" if more is None else _text(row, "input", may_be_empty=True)
            prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
            return [Turn(prompt, _text(row, "output"))]
        return _prompt_and_answer(row, self.fields[0], self.fields[1])

    def text(self, row: Row) -> str:
        """The plain text of the row. Raises BadRow."""
        return _text(row, self.fields[0])


def find_form(row: Row, fields: Fields) -> Form:
    """The form of a file with this first row. Raises BadRow if it has none of them."""
    pairs: list[tuple[str, str]] = []
    if fields.prompt is not None or fields.answer is not None:
        pairs = [(p if fields.prompt is None else fields.prompt, a) for p, a in _PAIRS]
        pairs = [(p, a if fields.answer is None else fields.answer) for p, a in pairs]
    for pair in pairs:
        if row.keys() >= set(pair):
            return Form("prompts", pair)
    if pairs and fields.required:
        missing = next(name for name in pairs[0] if name not in row)
        raise BadRow("missing field", _missing(row, missing))
    for name in ("messages", "conversations"):
        if name in row:
            return Form(name, (name,))
    for pair in _PAIRS:
        if row.keys() >= set(pair):
            return Form("prompts", pair)
    if row.keys() >= {"instruction", "output"}:
        return Form("instructions", ("instruction", "output"))
    if "text" in row:
        return Form("text", ("text",))
    raise BadRow("unknown form", f"no form is known that has {_names(row)}; it needs {FORMS}")


def _prompt_and_answer(row: Row, prompt_field: str, answer_field: str) -> list[Turn]:
    prompt, answer = _field(row, prompt_field), _field(row, answer_field)
    if not isinstance(prompt, list) and not isinstance(answer, list):
        return [Turn(_text(row, prompt_field), _text(row, answer_field))]
    before = _turns_of(prompt, prompt_field, "user")
    after = _turns_of(answer, answer_field, "assistant")
    _refuse_tools(row)
    found = list(_answered([*before, *after], len(before)))
    if not found:
        raise BadRow("no answer", f"field {answer_field!r} has no turn of the assistant")
    return found


def _turns_of(value: object, field: str, role: str) -> list[Message]:
    """A list of messages, or text as one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": _checked(value, f"field {field!r}")}]
    return _conversation(value, field)


def _answered(messages: Sequence[Message], first: int) -> Iterator[Turn]:
    """Every turn of the assistant from `first` on that something comes before, with all that does. OpenAI's weight of 0
    marks turns that are not learned."""
    for place, message in enumerate(messages):
        if place >= max(first, 1) and message["role"] == "assistant" and message.get("weight") != 0:
            if not message["content"].strip():
                raise BadRow("empty answer", f"turn {place + 1}, of the assistant, is empty")
            yield Turn(list(messages[:place]), message["content"])


def _conversation(value: object, field: str) -> list[Message]:
    """The messages in a field, in the words of chat templates. Raises BadRow."""
    if not isinstance(value, list):
        raise BadRow("not messages", f"field {field!r} is {kind_of(value)}, not a list of messages")
    if not value:
        raise BadRow("empty field", f"field {field!r} has no messages")
    return [_message(message, f"field {field!r}, turn {number}") for number, message in enumerate(value, 1)]


def _message(message: object, place: str) -> Message:
    if not isinstance(message, dict):
        raise BadRow("not messages", f"{place} is {kind_of(message)}, not a message")
    names = ("from", "value") if {"from", "value"} <= message.keys() else ("role", "content")
    for name in names:
        if name not in message:
            raise BadRow("not messages", f"{place} has no {name!r}; it has {_names(message)}")
    role = _checked(message[names[0]], f"{place}, {names[0]!r}")
    role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        raise BadRow("unknown role", f"{place} has the role {role!r:.80}; roles are {', '.join(ROLES)}")
    _refuse_tools(message, place)
    others = {name: value for name, value in message.items() if name not in (*names, "role", "content")}
    return {"role": role, "content": _content(message[names[1]], place), **others}


def _content(value: object, place: str) -> str:
    """A message's text, which may come in parts."""
    if not isinstance(value, list):
        return _checked(value, place)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part:
            raise BadRow("not text", f"{place} has a part that is not text")
    return "".join(_checked(part["text"], place) for part in value)


def _refuse_tools(row: Row, place: str = "it") -> None:
    for name in ("tools", "functions", "tool_calls", "function_call"):
        if row.get(name):
            raise BadRow("tools", f"{place} has {name!r}; conversations with tools cannot be trained on")


def _field(row: Row, field: str) -> object:
    if field not in row:
        raise BadRow("missing field", _missing(row, field))
    return row[field]


def _text(row: Row, field: str, may_be_empty: bool = False) -> str:
    text = _checked(_field(row, field), f"field {field!r}")
    if not may_be_empty and not text.strip():
        raise BadRow("empty field", f"field {field!r} is empty")
    return text


def _checked(value: object, place: str) -> str:
    """Text as it is. Raises BadRow for other values, and for half a surrogate pair, which JSON can hold."""
    if not isinstance(value, str):
        raise BadRow(NULL if value is None else "not text", f"{place} is {kind_of(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("not Unicode text", f"{place} is not Unicode text: {error.reason}") from error
    return value


def _missing(row: Row, field: str) -> str:
    return f"it has no field {field!r}; it has {_names(row)}"


def _names(row: Row) -> str:
    """The names of a row's fields, the first ones of many."""
    shown = ", ".join(repr(name)[:60] for name in list(row)[:12])
    return f"{shown}, ..." if len(row) > 12 else shown or "none"
