"""From the body of a request to texts that can be generated, with every mistake told before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import IMSMRuntimeError, SettingsError, shown
from ..generation.chat_template import Message
from ..generation.embedding import prepare_ids
from ..generation.generation import Model, own_processors
from ..generation.openai_rows import BodyError, EmbeddingRequest, Request, read_embedding_request, read_request
from ..generation.settings import GenerationSettings
from .tickets import Text

COMPLETION_TOKENS = 16
"""What a completion has at most unless it says otherwise, as in OpenAI's API; a chat's answer ends with the context."""


class Prepared(NamedTuple):
    """A request and its texts: all choices of its first prompt, then of the next."""

    request: Request
    texts: list[Text]


def prepare(model: Model, url: str, body: Any, defaults: GenerationSettings, name: str) -> Prepared:
    """What a body of a chat or a completion asks for. name: the model's. Raises BodyError."""
    if isinstance(body, Mapping) and body.get("control_tokens") is not None:
        message = "control_tokens is not implemented: text is text; send a prompt of token ids to control the model"
        raise BodyError("control_tokens", message)
    request = read_request(url, body, defaults, name)
    check_model(request.model, name)
    field = "messages" if request.chat else "prompt"
    try:
        prompts = [_ids(model, prompt, field) for prompt in request.prompts]
        own_processors(model, request.settings)
        if request.settings.trace is not None:
            model.session.check_by_memory("imsm.trace", request.settings.trace)
    except BodyError:
        raise
    except SettingsError as error:
        wanted = "response_format" if error.name.startswith("json") and request.chat else error.name
        raise BodyError(wanted, str(error)) from error
    except IMSMRuntimeError as error:
        raise BodyError(field, str(error)) from error
    settings = [request.settings_of(choice) for choice in range(request.choices)]
    return Prepared(request, [Text(ids, each) for ids in prompts for each in settings])


def prepare_embedding(model: Model, body: Any, name: str) -> tuple[EmbeddingRequest, list[list[int]]]:
    """What a body asks of the endpoint for embeddings, and each text's tokens. Raises BodyError."""
    request = read_embedding_request(body, name)
    check_model(request.model, name)
    try:
        each = (text_ids(model, text, "input") if isinstance(text, str) else text for text in request.texts)
        return request, [prepare_ids(model, ids, request.settings) for ids in each]
    except BodyError:
        raise
    except SettingsError as error:
        raise BodyError(error.name, str(error)) from error
    except IMSMRuntimeError as error:
        raise BodyError("input", f"a text of input: {error}") from error


def check_model(asked: str, name: str) -> None:
    """Raise BodyError for a model that is not there."""
    if asked != name:
        raise BodyError("model", f"there is no model {shown(asked)}; this server has {name}", "model_not_found")


def defaults_of(model: Model, url: str, chat: str) -> GenerationSettings:
    """What a request does not say: the model's own way to sample, and how long answers are."""
    manifest = model.session.manifest
    most = manifest.context_length if url == chat else COMPLETION_TOKENS
    return replace(GenerationSettings.of_model(manifest.generation), max_new_tokens=most)


def text_ids(model: Model, text: Any, field: str, special: bool = True) -> list[int]:
    """A text's tokens, none of which is a control token that it spells. special: with the tokens that the tokenizer
    puts around a text. Raises BodyError."""
    if not isinstance(text, str):
        raise BodyError(field, f"{field} is {shown(text)}; it must be text")
    try:
        return model.codec.encode_plain(text, special) if text else []
    except IMSMRuntimeError as error:
        raise BodyError(field, str(error)) from error


def messages_of(body: Mapping[str, Any]) -> Sequence[Message]:
    """The messages of a body, each with one text. Raises BodyError."""
    request = read_request("/v1/chat/completions", {"messages": body.get("messages")}, GenerationSettings(), "")
    return request.prompts[0]  # type: ignore[return-value]


def _ids(model: Model, prompt: Any, field: str) -> list[int]:
    session = model.session
    if isinstance(prompt, str):
        ids = model.codec.encode_plain(prompt)
    elif field == "messages":
        ids = model.codec.encode_chat(prompt)
    else:
        ids = session.token_ids(prompt)
        if not ids:
            raise BodyError(field, "a prompt has no tokens")
    most = session.manifest.context_length
    if len(ids) > most:
        message = f"the prompt has {len(ids)} tokens; the model's context is {most}"
        raise BodyError(field, message, "context_length_exceeded")
    return ids
