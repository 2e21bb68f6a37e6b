"""Bodies of OpenAI's API: what a request asks for.

A field that is not implemented is an error that names it; nothing is ignored but `user`, which changes no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..checks import is_sequence
from ..errors import PromptError, SettingsError, shown
from .chat_template import Message
from .constraints import schema_text
from .embed_settings import EmbedSettings
from .openai_answers import error_body
from .settings import GenerationSettings

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MOST_CHOICES = 128
_OWN = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
"""OpenAI's names, and vLLM's, of our settings; the others have the same."""
_NO_FIELDS = ("raw", "logprobs", "echo", "trace", "json_object", "json_schema")
_SETTINGS = {each.name for each in fields(GenerationSettings) if each.name not in _NO_FIELDS}
_IMSM = ("memory_bias", "trace")
"""Settings in the object `imsm`."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""Fields that are known, and what they may be: what they are without being said."""


class BodyError(PromptError):
    """What is wrong with a body. param: the field. code: OpenAI's for it, if there is one."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's API tells it."""
        return error_body(str(self), self.param, code=self.code)


@dataclass(frozen=True)
class Request:
    """What a body asks for: `choices` texts for each of the prompts. url: CHAT or COMPLETION. model: as the body calls
    it. prompts: messages, texts or token ids. stream: whether the answer comes as it is made, include_usage: with its
    usage at the end. echo: whether a completion's text begins with its prompt."""

    url: str
    model: str
    prompts: tuple[str | Sequence[Message] | Sequence[int], ...]
    settings: GenerationSettings
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False

    @property
    def chat(self) -> bool:
        """Whether it is one of CHAT."""
        return self.url == CHAT

    def echoed(self, decode: Callable[[Sequence[int]], str]) -> list[str]:
        """What the text of each choice begins with."""
        if not self.echo:
            return [""] * (len(self.prompts) * self.choices)
        texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in self.prompts]  # type: ignore[arg-type]
        return [text for text in texts for _ in range(self.choices)]

    def settings_of(self, choice: int) -> GenerationSettings:
        """Those of a choice: each draws with a seed of its own."""
        seed = self.settings.seed
        return self.settings if seed is None else replace(self.settings, seed=seed + choice)


@dataclass(frozen=True)
class EmbeddingRequest:
    """What a body asks of EMBEDDING. texts: or their token ids. base64: whether numbers come as the base64 of float32,
    little-endian."""

    model: str
    texts: tuple[str | Sequence[int], ...]
    settings: EmbedSettings
    base64: bool


def read_request(url: str, body: Any, defaults: GenerationSettings, model: str) -> Request:
    """What a body asks of `url`. defaults: what it does not say. model: its name where the body has none. Raises
    BodyError."""
    if url not in (CHAT, COMPLETION):
        raise BodyError("url", f"url is {shown(url)}; there are {CHAT}, {COMPLETION} and {EMBEDDING}")
    left, name = _said(body, model)
    choices = left.pop("n", 1)
    if type(choices) is not int or not 1 <= choices <= MOST_CHOICES:
        raise BodyError("n", f"n is {shown(choices)}; it must be 1 to {MOST_CHOICES}")
    stream, include_usage = _stream(left)
    more, echo = _imsm(left.pop("imsm", {})), False
    prompts: tuple[Any, ...]
    if url == CHAT:
        prompts = (_messages(left.pop("messages", None)),)
        more |= _chat_settings(left)
    else:
        prompts = _texts("prompt", left.pop("prompt", None))
        echo, logprobs = _flag(left, "echo"), left.pop("logprobs", None)
        more |= {"raw": True, "logprobs": logprobs, "echo": echo and logprobs is not None}
    for field, allowed in _NEUTRAL.items():
        if field in left and (value := left.pop(field)) not in allowed:
            raise BodyError(field, f"{field} is {shown(value)}, which is not implemented; leave it out")
    settings = _settings(left, more, defaults)
    return Request(url, name, prompts, settings, choices, stream, include_usage, echo)


def read_embedding_request(body: Any, model: str) -> EmbeddingRequest:
    """What a body asks of EMBEDDING: with OpenAI's fields, and memory, pooling and normalize. Raises BodyError."""
    left, name = _said(body, model)
    texts, form = _texts("input", left.pop("input", None)), left.pop("encoding_format", "float")
    if form not in ("float", "base64"):
        raise BodyError("encoding_format", f"encoding_format is {shown(form)}; it must be float or base64")
    for field in left:
        if field not in ("memory", "pooling", "normalize"):
            raise BodyError(field, f"{field} is not implemented; leave it out")
    try:
        return EmbeddingRequest(name, texts, EmbedSettings(**left), form == "base64")
    except SettingsError as error:
        raise BodyError(error.name, str(error)) from error


def _said(body: Any, model: str) -> tuple[dict[str, Any], str]:
    """What a body says, and its model's name."""
    if not isinstance(body, Mapping):
        raise BodyError("body", f"the body is {shown(body)}, not an object")
    left = {name: value for name, value in body.items() if value is not None and name != "user"}
    name = left.pop("model", model)
    if not isinstance(name, str):
        raise BodyError("model", f"model is {shown(name)}; it must be text")
    return left, name


def _flag(left: dict[str, Any], field: str) -> bool:
    value = left.pop(field, False)
    if not isinstance(value, bool):
        raise BodyError(field, f"{field} is {shown(value)}; it must be true or false")
    return value


def _stream(left: dict[str, Any]) -> tuple[bool, bool]:
    """Takes whether the answer is a stream, and whether that tells its usage, out of a body."""
    stream, options = _flag(left, "stream"), left.pop("stream_options", None)
    if options is None:
        return stream, False
    if not isinstance(options, Mapping) or not stream:
        raise BodyError("stream_options", "stream_options must be an object, and needs stream")
    rest = {name: value for name, value in options.items() if value is not None}
    usage = _flag(rest, "include_usage")
    for name, value in rest.items():
        if name != "include_obfuscation" or value is not False:
            raise BodyError(f"stream_options.{name}", f"stream_options.{name} is not implemented; leave it out")
    return stream, usage


def _imsm(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BodyError("imsm", f"imsm is {shown(value)}; it must be an object")
    for name in value:
        if name not in _IMSM:
            raise BodyError(f"imsm.{name}", f"imsm.{name} is not implemented; there are {' and '.join(_IMSM)}")
    return {name: part for name, part in value.items() if part is not None}


def _settings(left: Mapping[str, Any], more: dict[str, Any], defaults: GenerationSettings) -> GenerationSettings:
    said = {"trace": None, "echo": False, **more}
    spelt = {name: f"imsm.{name}" for name in more if name in _IMSM}
    for field, value in left.items():
        name = _OWN.get(field, field)
        if name not in _SETTINGS:
            raise BodyError(field, f"{field} is not implemented; leave it out")
        if name in spelt:
            raise BodyError(field, f"{spelt[name]} and {field} are the same; leave one out")
        spelt[name] = field
        said[name] = _bias(value) if name == "logit_bias" else value
    try:
        return replace(defaults, **said)
    except SettingsError as error:
        field = spelt.get(error.name, error.name)
        raise BodyError(field, error.told(lambda name: spelt.get(name, name))) from error


def _bias(value: Any) -> Any:
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, ValueError) as error:
        raise BodyError("logit_bias", "logit_bias must be an object with token ids as its keys") from error


def _chat_settings(left: dict[str, Any]) -> dict[str, Any]:
    """Takes what only a chat has out of the rest of a body."""
    told, count = _flag(left, "logprobs"), left.pop("top_logprobs", None)
    if count is not None and not told:
        raise BodyError("top_logprobs", "top_logprobs needs logprobs")
    form = left.pop("response_format", {"type": "text"})
    return {"raw": None, "logprobs": (count or 0) if told else None, **_form(form)}


def _form(form: Any) -> dict[str, Any]:
    if form == {"type": "text"}:
        return {}
    if form == {"type": "json_object"}:
        return {"json_object": True}
    if isinstance(form, Mapping) and form.get("type") == "json_schema" and isinstance(form.get("json_schema"), Mapping):
        described = form["json_schema"]
        unknown = {*form, *described} - {"type", "json_schema", "name", "description", "schema", "strict"}
        if not unknown and isinstance(described.get("schema"), Mapping):
            return {"json_schema": schema_text(described["schema"])}
    rule = 'it must be {"type": "text"}, {"type": "json_object"}, or "json_schema" with a schema'
    raise BodyError("response_format", f"response_format is {shown(form)}; {rule}")


def _messages(value: Any) -> list[Message]:
    if not is_sequence(value) or not value or not all(isinstance(message, Mapping) for message in value):
        raise BodyError("messages", f"messages is {shown(value)}; it must be a list of messages")
    return [_message(number, message) for number, message in enumerate(value)]


def _message(number: int, message: Message) -> Message:
    """With one text as its content, as templates of texts expect it."""
    content = message.get("content")
    if content is None or not is_sequence(content):
        return message
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            field = f"messages[{number}].content[{index}]"
            raise BodyError(field, f"{field} is {shown(part)}; only text is implemented")
        parts.append(part["text"])
    return {**message, "content": "\n".join(parts)}


def _texts(field: str, value: Any) -> tuple[Any, ...]:
    """One text or a list of them, token ids or a list of those."""
    if isinstance(value, str):
        return (value,)
    if is_sequence(value) and value:
        if all(type(item) is int for item in value):
            return (value,)
        if all(isinstance(item, str) or (is_sequence(item) and item) for item in value):
            return tuple(value)
    raise BodyError(field, f"{field} is {shown(value)}; it must be text, token ids, or a list of those")
