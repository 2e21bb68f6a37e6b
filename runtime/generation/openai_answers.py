"""Results in the shapes of OpenAI's answers."""

from __future__ import annotations

import base64
import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .logprobs import Candidate
from .results import Generation, Token

TokenText = Callable[[int], str]


LEAST_LOGPROB = -9999.0
"""What OpenAI tells of a token that cannot come; JSON has no infinity."""


def error_body(
    message: str, param: str | None = None, kind: str = "invalid_request_error", code: str | None = None
) -> dict[str, Any]:
    """The body of an answer that is an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_body(prompt: int, new: int, held: int | None = None) -> dict[str, Any]:
    """How many tokens a request took. held: of its prompts, those that were read before; None where none are kept."""
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return counts if held is None else counts | {"prompt_tokens_details": {"cached_tokens": held}}


def answer_id(chat: bool) -> str:
    """A new name of an answer."""
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


def embedding_body(
    model: str, embeddings: Sequence[NDArray[np.float32]], tokens: int, as_base64: bool
) -> dict[str, Any]:
    """The body that answers a request for embeddings (d,). tokens: of all its texts."""

    def written(embedding: NDArray[np.float32]) -> list[float] | str:
        if as_base64:
            return base64.b64encode(embedding.astype("<f4").tobytes()).decode()
        found: list[float] = embedding.tolist()
        return found

    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": written(embedding)}
            for index, embedding in enumerate(embeddings)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def response_body(
    model: str,
    chat: bool,
    choices: int,
    results: Sequence[Generation],
    token_text: TokenText,
    ends: Sequence[int],
    echoed: Sequence[str],
    held: int | None = None,
) -> dict[str, Any]:
    """The body that answers a chat or a completion. results: of all `choices` of the first prompt, then of the next.
    ends: tokens that end a text, which its log-probabilities leave out. echoed: what each text begins with. held: as
    `usage_body` has it."""
    prompt = sum(result.timings.prompt_tokens for result in results[::choices])
    new = sum(len(result.tokens) for result in results)
    return {
        "id": answer_id(chat),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            _choice(chat, index, before, result, token_text, ends)
            for index, (before, result) in enumerate(zip(echoed, results, strict=True))
        ],
        "usage": usage_body(prompt, new, held),
    }


def _choice(
    chat: bool, index: int, begun: str, result: Generation, token_text: TokenText, ends: Sequence[int]
) -> dict[str, Any]:
    logprobs = None
    if result.logprobs is not None:
        tokens = (*(result.prompt or ()), *told_tokens(result.tokens, ends))
        logprobs = chat_logprobs(tokens, token_text) if chat else completion_logprobs(tokens, token_text)
    text = begun + result.text
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    found = {"index": index, **said, "logprobs": logprobs, "finish_reason": result.finish_reason}
    traced = imsm_body(result.tokens, token_text)
    return found | ({"imsm": traced} if traced else {})


def told_tokens(tokens: Sequence[Token], ends: Sequence[int]) -> Sequence[Token]:
    """Without the token that ends the text."""
    return tokens[:-1] if tokens and tokens[-1].id in ends else tokens


def imsm_body(tokens: Sequence[Token], token_text: TokenText) -> dict[str, Any]:
    """What OpenAI's API has no place for, of traced tokens: the gate's mean, and the likeliest tokens of each memory.
    Nothing where no trace was asked for."""

    def listed(found: Sequence[Candidate]) -> list[dict[str, Any]]:
        return [{"id": each.id, "token": token_text(each.id), "logprob": _told(each.logprob)} for each in found]

    traces = [
        {"id": token.id, "token": token_text(token.id), "gate_mean": token.gate_mean}
        | {name: listed(memory) for name, memory in token.trace._asdict().items()}
        for token in tokens
        if token.trace is not None
    ]
    return {"trace": traces} if traces else {}


def _told(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def chat_logprobs(tokens: Sequence[Token], token_text: TokenText) -> dict[str, Any]:
    """Log-probabilities as a chat's answer has them. bytes: None for a part of a character."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(token)
        return {"token": text, "logprob": _told(logprob), "bytes": None if "\ufffd" in text else list(text.encode())}

    found = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*each) for each in token.top_logprobs or ()]}
        for token in tokens
    ]
    return {"content": found, "refusal": None}


def completion_logprobs(tokens: Sequence[Token], token_text: TokenText, offset: int = 0) -> dict[str, Any]:
    """Log-probabilities as a completion's answer has them. A part of a character is told by its number, since such
    parts look alike. offset: where the first token begins in the text."""

    def named(token: int) -> str:
        text = token_text(token)
        return f"token_id:{token}" if "\ufffd" in text else text

    lengths = [len(token_text(token.id)) for token in tokens]
    return {
        "tokens": [named(token.id) for token in tokens],
        "token_logprobs": [_told(token.logprob) for token in tokens],
        "top_logprobs": [
            None
            if token.logprob is None
            else {named(each.id): _told(each.logprob) for each in token.top_logprobs or ()}
            for token in tokens
        ],
        "text_offset": list(itertools.accumulate(lengths[:-1], initial=offset)) if lengths else [],
    }
