"""Answers as server-sent events, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from ..generation.openai_answers import (
    TokenText,
    answer_id,
    chat_logprobs,
    completion_logprobs,
    imsm_body,
    told_tokens,
    usage_body,
)
from ..generation.openai_rows import Request
from ..generation.results import Chunk
from .arrivals import Arrivals, GoneError
from .security import ApiError

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class ChunkWriter:
    """The bodies of one answer's chunks. echoed: what the text of each choice begins with. ends: tokens that end a
    text, which log-probabilities leave out."""

    def __init__(self, request: Request, echoed: Sequence[str], token_text: TokenText, ends: Sequence[int]) -> None:
        self._request, self._echoed, self._token_text, self._ends = request, echoed, token_text, ends
        self._offsets = [0] * len(echoed)
        self._begun = [False] * len(echoed)
        self._frame = {
            "id": answer_id(request.chat),
            "object": "chat.completion.chunk" if request.chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self.new_tokens = 0

    def bodies(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """What is sent for a chunk of a choice, which may be nothing."""
        first = not self._begun[index]
        self._begun[index] = True
        self.new_tokens += chunk.token is not None
        text = self._echoed[index] * first + chunk.text
        logprobs, traced = self._logprobs(index, chunk), self._traced(chunk)
        if not self._request.chat:
            if not (text or logprobs or traced or chunk.finish_reason):
                return []
            return [self._body(index, {"text": text}, logprobs, chunk.finish_reason, traced)]
        found = []
        if first:
            found.append(self._body(index, {"delta": {"role": "assistant", "content": ""}}, None, None, {}))
        if text or logprobs or traced:
            found.append(self._body(index, {"delta": {"content": text}}, logprobs, None, traced))
        if chunk.finish_reason is not None:
            found.append(self._body(index, {"delta": {}}, None, chunk.finish_reason, {}))
        return found

    def usage(self, prompt: int, held: int) -> dict[str, Any]:
        """The last chunk's body, if the usage is told."""
        return self._frame | {"choices": [], "usage": usage_body(prompt, self.new_tokens, held)}

    def _body(
        self, index: int, said: dict[str, Any], logprobs: Any, finish_reason: str | None, traced: dict[str, Any]
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._request.include_usage else {}
        return self._frame | {"choices": [choice | ({"imsm": traced} if traced else {})]} | usage

    def _logprobs(self, index: int, chunk: Chunk) -> dict[str, Any] | None:
        if self._request.settings.logprobs is None or chunk.token is None:
            return None
        tokens = [*(chunk.prompt or ()), *told_tokens([chunk.token], self._ends)]
        if not tokens:
            return None
        if self._request.chat:
            return chat_logprobs(tokens, self._token_text)
        found = completion_logprobs(tokens, self._token_text, self._offsets[index])
        self._offsets[index] += sum(len(self._token_text(token.id)) for token in tokens)
        return found

    def _traced(self, chunk: Chunk) -> dict[str, Any]:
        return {} if chunk.token is None else imsm_body([chunk.token], self._token_text)


class EventStream:
    """An answer that comes as it is made. Until its first chunk an error is an answer with its own status; then it is
    an event."""

    def __init__(self, arrivals: Arrivals, writer: ChunkWriter, request: Request, prompt_tokens: int) -> None:
        self._arrivals, self._writer = arrivals, writer
        self._request, self._prompt_tokens = request, prompt_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def event(data: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            async with self._arrivals as arrivals:
                async for index, arrival in arrivals:
                    for body in self._writer.bodies(index, arrival.chunk):
                        await event(_written(body))
            if self._request.include_usage:
                held = sum(self._arrivals.held.get(index, 0) for index in self._firsts())
                await event(_written(self._writer.usage(self._prompt_tokens, held)))
            await event("[DONE]")
        except ApiError as error:
            if not begun:
                await error.response()(scope, receive, send)
                return
            await event(_written(error.body))
        except GoneError:
            if not begun:
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _firsts(self) -> range:
        """The first choice of every prompt."""
        return range(0, len(self._request.prompts) * self._request.choices, self._request.choices)


def _written(body: dict[str, Any]) -> str:
    return json.dumps(body, allow_nan=False)
