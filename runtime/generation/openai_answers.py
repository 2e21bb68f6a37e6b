"""Results in the shapes of OpenAI's answers."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .results import Generation, Token

TokenText = Callable[[int], str]


def error_body(message: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """The body of an answer that is an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


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
    model: str, chat: bool, choices: int, results: Sequence[Generation], token_text: TokenText, ends: Sequence[int]
) -> dict[str, Any]:
    """The body that answers a chat or a completion. results: of all `choices` of the first prompt, then of the next.
    ends: tokens that end a text, which its log-probabilities leave out."""
    prompt = sum(result.timings.prompt_tokens for result in results[::choices])
    new = sum(len(result.tokens) for result in results)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(chat, index, result, token_text, ends) for index, result in enumerate(results)],
        "usage": {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new},
    }


def _choice(chat: bool, index: int, result: Generation, token_text: TokenText, ends: Sequence[int]) -> dict[str, Any]:
    logprobs = None
    if result.logprobs is not None:
        tokens = result.tokens[:-1] if result.tokens[-1].id in ends else result.tokens
        logprobs = chat_logprobs(tokens, token_text) if chat else completion_logprobs(tokens, token_text)
    said = (
        {"message": {"role": "assistant", "content": result.text, "refusal": None}} if chat else {"text": result.text}
    )
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": result.finish_reason}


def chat_logprobs(tokens: Sequence[Token], token_text: TokenText) -> dict[str, Any]:
    """Log-probabilities as a chat's answer has them. bytes: None for a part of a character."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    found = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(*each) for each in token.top_logprobs or ()]}
        for token in tokens
    ]
    return {"content": found, "refusal": None}


def completion_logprobs(tokens: Sequence[Token], token_text: TokenText) -> dict[str, Any]:
    """Log-probabilities as a completion's answer has them. A part of a character is told by its number, since such
    parts look alike."""

    def named(token: int) -> str:
        text = token_text(token)
        return f"token_id:{token}" if "\ufffd" in text else text

    lengths = [len(token_text(token.id)) for token in tokens]
    return {
        "tokens": [named(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{named(each.id): each.logprob for each in token.top_logprobs or ()} for token in tokens],
        "text_offset": [sum(lengths[:index]) for index in range(len(tokens))],
    }
