"""Chat templates as transformers writes them: Jinja in a sandbox, with the names that templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ArtifactError, PromptError

Message = dict[str, str]


class _GenerationBlock(Extension):
    """{% generation %} marks the assistant's words for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
    """Raises ArtifactError if the template is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ArtifactError(f"chat_template.jinja is not valid: {error}") from error


def render_chat(template: jinja2.Template, messages: Sequence[Message], special_tokens: dict[str, str]) -> str:
    """The text of a conversation, up to where the assistant's next turn begins. Raises PromptError if the template
    refuses the messages."""
    try:
        return template.render(messages=list(messages), add_generation_prompt=True, **special_tokens)
    except jinja2.TemplateError as error:
        raise PromptError(f"the chat template refuses the messages: {error}") from error


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
