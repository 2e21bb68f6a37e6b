"""Chat templates as transformers renders them: Jinja in a sandbox, with the names that templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from ..errors import ArtifactError, PromptError
from .borders import border
from .template_limits import LimitedEnvironment

Message = Mapping[str, Any]
Clock = Callable[[], datetime.datetime]
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; here it is only its content, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """Without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in it
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """`dict` for templates: no class, whose attributes could be looked at."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def compile_template(source: str, clock: Clock = datetime.datetime.now) -> jinja2.Template:
    """clock: what `strftime_now` tells. Raises ArtifactError if the template is not valid Jinja."""
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: clock().strftime(format),  # the name of its argument is transformers'
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    with border(ArtifactError, "chat_template.jinja is not valid"):
        return environment.from_string(source)


def render_chat(template: jinja2.Template, messages: Sequence[Message], special_tokens: Mapping[str, str]) -> str:
    """The text of a conversation, up to where the assistant's next turn begins. Raises PromptError if there are no
    messages, if one is no message, or if the template refuses them or does not come to an end."""
    variables: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}
    with border(PromptError, "the chat template refuses the messages"):
        environment = template.environment
        assert isinstance(environment, LimitedEnvironment)
        environment.start()
        text = template.render(messages=_seen_by_templates(messages), **variables)
        text.encode()  # lone surrogates are no text
        return text


def check_messages(messages: Sequence[Message]) -> None:
    """Raise PromptError unless there is a message, and each has a role and a content (or something else, as calls of
    tools have)."""
    if not messages:
        raise PromptError("the conversation has no messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"message {number} is no mapping with a role, such as {{'role': 'user', 'content': ...}}")
        if len(message) < 2:
            raise PromptError(f"message {number} has a role and no content")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list | tuple):
            raise PromptError(f"message {number} has a content of type {type(content).__name__}; it must be text")


def _seen_by_templates(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Plain data: no key without a value, and reasoning by the names that templates know."""
    seen = []
    for message in messages:
        plain = {key: _plain(value) for key, value in message.items() if value is not None}
        thoughts = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
        if thoughts is not None:
            plain = {"thinking": thoughts, **plain, "reasoning_content": thoughts}
        seen.append(plain)
    return seen


def _plain(value: Any) -> Any:
    """JSON's types, and the name of the type for anything else."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return f"<{type(value).__name__}>"


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")
