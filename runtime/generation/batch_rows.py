"""Rows of a batch file: what each asks for, and what is written for it.

Two kinds: OpenAI's lines {"custom_id", "method", "url", "body"}, and prompt rows {"prompt" or "messages", settings,
"id"}, which with a "continuation" ask for a score.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checks import is_sequence
from ..errors import IMSMRuntimeError, PromptError, SettingsError, shown
from .embedding import prepare as prepare_to_embed
from .embedding import prepare_ids
from .generation import Model, own_processors
from .openai_answers import embedding_body, error_body, response_body
from .openai_rows import EMBEDDING, BodyError, EmbeddingRequest, Request, read_embedding_request, read_request
from .prompts import encoded
from .results import Generation, facts_of_tokens
from .score_settings import ScoreSettings
from .scoring import Prepared, prepare
from .settings import GenerationSettings

Key = tuple[str, str | int]
"""What a row is told apart by: "custom_id" or "id" and its value, or "row" and its line."""
_ENVELOPE = {"custom_id", "method", "url", "body"}
_SETTINGS = {each.name for each in fields(GenerationSettings)}
_SCORED = {each.name for each in fields(ScoreSettings)}


@dataclass(frozen=True)
class Text:
    """A text to generate: its prompt's token ids (N,) int32."""

    ids: NDArray[np.int32]
    settings: GenerationSettings


class ToScore(NamedTuple):
    """A row with a continuation."""

    row: Mapping[str, Any]
    prepared: Prepared
    settings: ScoreSettings


class ToEmbed(NamedTuple):
    """One of OpenAI's lines that asks for embeddings. ids: each text's tokens."""

    request: EmbeddingRequest
    ids: list[list[int]]


@dataclass(frozen=True)
class Job:
    """A row that can be used: texts to generate, a continuation to score, or texts to embed. request: of OpenAI's lines
    that ask for texts."""

    key: Key
    texts: tuple[Text, ...] = ()
    request: Request | None = None
    score: ToScore | None = None
    embed: ToEmbed | None = None


def key_of(row: Any, line: int) -> Key:
    """What a row is called. Raises PromptError for what is no row."""
    if not isinstance(row, Mapping):
        raise PromptError(f"it is {shown(row)}, not an object")
    if "custom_id" in row:
        if not isinstance(row["custom_id"], str) or not row["custom_id"]:
            raise PromptError(f"custom_id is {shown(row['custom_id'])}; it must be text")
        return "custom_id", row["custom_id"]
    if "id" not in row:
        return "row", line
    if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
        raise PromptError(f"id is {shown(row['id'])}; it must be text or a whole number")
    return "id", row["id"]


def key_of_result(document: Mapping[str, Any]) -> Key | None:
    """The key of the row that a line of the output is of; None for another program's line."""
    for name in ("custom_id", "id", "row"):
        if isinstance(document.get(name), str | int):
            return name, document[name]
    return None


def read_job(model: Model, key: Key, row: Mapping[str, Any], defaults: GenerationSettings) -> Job:
    """What a row asks for. Raises BodyError for what is wrong in the body of one of OpenAI's lines, and
    IMSMRuntimeError for other rows that cannot be used."""
    if key[0] == "custom_id":
        return _of_openai(model, key, row, defaults)
    if "continuation" in row:
        return _scored(model, key, row, defaults)
    prompts = [name for name in ("prompt", "messages") if name in row]
    if len(prompts) != 1:
        raise PromptError("a row has either prompt or messages, or is one of OpenAI's with a custom_id")
    said = {name: value for name, value in row.items() if name not in ("id", *prompts)}
    if unknown := said.keys() - _SETTINGS:
        raise PromptError(f"there is no setting {sorted(unknown)[0]}")
    if said.get("logit_bias"):
        said["logit_bias"] = _bias(said["logit_bias"])
    settings = GenerationSettings(**vars(defaults) | said)
    return Job(key, (_text(model, _prompt(row[prompts[0]], prompts[0]), settings),))


def _of_openai(model: Model, key: Key, row: Mapping[str, Any], defaults: GenerationSettings) -> Job:
    if unknown := row.keys() ^ _ENVELOPE:
        raise PromptError(f"it has {sorted(row)}, and must have custom_id, method, url and body ({sorted(unknown)[0]})")
    if row["method"] != "POST":
        raise PromptError(f"method is {shown(row['method'])}; it must be POST")
    if row["url"] == EMBEDDING:
        return _embedded(model, key, row["body"])
    request = read_request(row["url"], row["body"], defaults, model.session.folder.name)
    if request.stream:
        raise BodyError("stream", "stream is true, and a file's answer comes whole; leave it out")
    field = "messages" if "messages" in row["body"] else "prompt"
    try:
        texts = [
            _text(model, prompt, request.settings_of(choice))
            for prompt in request.prompts
            for choice in range(request.choices)
        ]
    except SettingsError as error:
        raise BodyError(error.name, str(error)) from error
    except PromptError as error:
        raise BodyError(field, str(error)) from error
    return Job(key, tuple(texts), request)


def _embedded(model: Model, key: Key, body: Any) -> Job:
    request = read_embedding_request(body, model.session.folder.name)
    try:
        ids = [
            (prepare_to_embed if isinstance(text, str) else prepare_ids)(model, text, request.settings)
            for text in request.texts
        ]
    except SettingsError as error:
        raise BodyError(error.name, str(error)) from error
    except PromptError as error:
        raise BodyError("input", f"a text of input: {error}") from error
    return Job(key, embed=ToEmbed(request, ids))


def _scored(model: Model, key: Key, row: Mapping[str, Any], defaults: GenerationSettings) -> Job:
    said = {name: value for name, value in row.items() if name not in ("id", "prompt", "continuation")}
    if unknown := said.keys() - _SCORED:
        raise PromptError(f"a score has no setting {sorted(unknown)[0]}")
    shared = {name: value for name, value in vars(defaults).items() if name in _SCORED}
    settings = ScoreSettings(**shared | said)
    return Job(key, score=ToScore(row, prepare(model, row, settings), settings))


def _text(model: Model, prompt: Any, settings: GenerationSettings) -> Text:
    """A text whose prompt fits and whose settings the model can follow."""
    session = model.session
    state = session.new_state(1)
    ids = encoded(model, prompt, settings, state).ids
    session.check_lengths(state, [ids])
    own_processors(model, settings)
    if settings.trace is not None:
        session.check_by_memory("trace", settings.trace)
    return Text(np.array(ids, np.int32), settings)


def _prompt(value: Any, name: str) -> Any:
    if isinstance(value, str) and name == "prompt":
        return value
    if not is_sequence(value) or not value:
        raise PromptError(f"{name} is {shown(value)}; it must be {'text, token ids or ' * (name == 'prompt')}messages")
    return list(value)


def _bias(value: Any) -> Any:
    """A mapping whose keys JSON made texts of."""
    try:
        return {int(token): bias for token, bias in value.items()}
    except (AttributeError, ValueError) as error:
        raise SettingsError("logit_bias", value, "it must be an object with token ids as its keys") from error


def result_document(model: Model, job: Job, results: Sequence[Generation]) -> dict[str, Any]:
    """A line of the output."""
    if job.request is not None:
        request, text = job.request, model.codec.token_text
        ends = (*model.session.manifest.eos_token_ids, *request.settings.stop_token_ids)
        echoed = request.echoed(model.codec.decode)
        body = response_body(request.model, request.chat, request.choices, results, text, ends, echoed)
        return _openai_document(job.key, 200, body)
    (result,) = results
    found: dict[str, Any] = {
        job.key[0]: job.key[1],
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.timings.prompt_tokens,
        "new_tokens": len(result.tokens),
    }
    if result.gate_means is not None:
        found["gate_mean"] = float(np.mean(result.gate_means))
    return found | facts_of_tokens(result, model.codec.token_text)


def embedding_document(key: Key, wanted: ToEmbed, embeddings: Sequence[NDArray[np.float32]]) -> dict[str, Any]:
    """A line of the output, with embeddings."""
    tokens = sum(map(len, wanted.ids))
    body = embedding_body(wanted.request.model, embeddings, tokens, wanted.request.base64)
    return _openai_document(key, 200, body)


def is_error(document: Mapping[str, Any]) -> bool:
    """Whether a row of the output tells of an error."""
    response = document.get("response")
    return document.get("error") is not None or (isinstance(response, Mapping) and response.get("status_code") != 200)


def error_document(key: Key, error: IMSMRuntimeError) -> dict[str, Any]:
    """A line of the output for a row that cannot be used."""
    if key[0] != "custom_id":
        return {key[0]: key[1], "error": str(error)}
    return _openai_document(key, 400, error.body if isinstance(error, BodyError) else error_body(str(error)))


def _openai_document(key: Key, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": key[1],
        "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body},
        "error": None,
    }
