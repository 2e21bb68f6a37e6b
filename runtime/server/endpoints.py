"""What every path answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from ..checks import integers
from ..engine.memories import MEMORIES
from ..errors import PromptError, shown
from ..generation.embedding import embed_prepared
from ..generation.generation import Model
from ..generation.openai_answers import embedding_body, response_body
from ..generation.openai_rows import CHAT, COMPLETION, BodyError
from ..generation.openai_rows import Request as Asked
from ..generation.results import Gathering
from .arrivals import Arrivals
from .bodies import Prepared, check_model, defaults_of, messages_of, prepare, prepare_embedding, text_ids
from .metrics import Metrics
from .scheduler import Scheduler
from .security import parsed, read_body, refusal
from .settings import ServeSettings
from .streaming import ChunkWriter, EventStream
from .tickets import Text

Answer = TypeVar("Answer")
MOST_EMBEDDING = 16
"""Requests for embeddings that wait at most: they are computed one after the other, beside the batch."""


class Endpoints:
    """The answers of one server. name: the model's."""

    def __init__(
        self, model: Model, settings: ServeSettings, scheduler: Scheduler, metrics: Metrics, name: str
    ) -> None:
        self.model, self.settings, self.scheduler, self.metrics, self.name = model, settings, scheduler, metrics, name
        self._started = int(time.time())
        self._preparing = ThreadPoolExecutor(2, "imsm-prepare")
        self._embedding = ThreadPoolExecutor(1, "imsm-embed")
        self._embedding_now = 0
        self._defaults = {url: defaults_of(model, url, CHAT) for url in (CHAT, COMPLETION)}

    def close(self) -> None:
        """End the threads."""
        self._preparing.shutdown(cancel_futures=True)
        self._embedding.shutdown(cancel_futures=True)

    async def chat(self, request: Request) -> Response | ASGIApp:
        """Chat completions."""
        return await self._generated(request, CHAT)

    async def completion(self, request: Request) -> Response | ASGIApp:
        """Completions of texts and of token ids."""
        return await self._generated(request, COMPLETION)

    async def embeddings(self, request: Request) -> Response:
        """Texts as vectors."""
        wanted, ids = await self._prepared(request, lambda body: prepare_embedding(self.model, body, self.name))
        if self._embedding_now >= MOST_EMBEDDING:
            message = f"{MOST_EMBEDDING} requests for embeddings wait already"
            raise refusal(429, message, "queue_full", {"Retry-After": "1"})
        self._embedding_now += 1
        try:
            work = self._embedding.submit(lambda: list(embed_prepared(self.model.session, ids, wanted.settings)))
            found = await asyncio.wrap_future(work)
        finally:
            self._embedding_now -= 1
        return JSONResponse(embedding_body(wanted.model, found, sum(map(len, ids)), wanted.base64))

    async def models(self, request: Request) -> Response:
        """The one model that there is."""
        return JSONResponse({"object": "list", "data": [self._facts()]})

    async def one_model(self, request: Request) -> Response:
        """... by its name."""
        check_model(request.path_params["name"], self.name)
        return JSONResponse(self._facts())

    async def health(self, request: Request) -> Response:
        """Whether texts can be generated."""
        trouble = self.scheduler.trouble()
        if trouble is not None:
            raise refusal(503, trouble, "unhealthy")
        return JSONResponse({"status": "ok"})

    async def tokenize(self, request: Request) -> Response:
        """The token ids of a text; control tokens that it spells are text."""

        def found(body: Any) -> dict[str, Any]:
            said = _fields(body, content=None, add_special=False, with_pieces=False)
            for name in ("add_special", "with_pieces"):
                if not isinstance(said[name], bool):
                    raise BodyError(name, f"{name} is {shown(said[name])}; it must be true or false")
            ids = text_ids(self.model, said["content"], "content", said["add_special"])
            text = self.model.codec.token_text
            return {"tokens": [{"id": token, "piece": text(token)} for token in ids] if said["with_pieces"] else ids}

        return JSONResponse(await self._prepared(request, found))

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""

        def found(body: Any) -> dict[str, Any]:
            tokens = _fields(body, tokens=None)["tokens"]
            try:
                return {"content": self.model.codec.decode(integers(tokens, "token id"))}
            except PromptError as error:
                raise BodyError("tokens", str(error)) from error

        return JSONResponse(await self._prepared(request, found))

    async def apply_template(self, request: Request) -> Response:
        """Messages as the chat template writes them."""

        def found(body: Any) -> dict[str, Any]:
            messages = messages_of(_fields(body, messages=None))
            try:
                return {"prompt": self.model.codec.render(messages)}
            except PromptError as error:
                raise BodyError("messages", str(error)) from error

        return JSONResponse(await self._prepared(request, found))

    async def prometheus(self, request: Request) -> Response:
        """What was counted."""
        return Response(self.metrics.told(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def props(self, request: Request) -> Response:
        """What the model and the server are set to."""
        manifest, template = self.model.session.manifest, self.model.session.folder / "chat_template.jinja"
        chat = self._defaults[CHAT]
        own = {each.name: getattr(chat, each.name) for each in fields(chat) if each.metadata.get("models")}
        return JSONResponse(
            {
                "model": self.name,
                "total_slots": self.settings.rows,
                "n_ctx": manifest.context_length,
                "default_generation_settings": own,
                "chat_template": template.read_text(encoding="utf-8") if template.is_file() else None,
                "memories": list(MEMORIES) if self.model.session.siamese else ["base"],
            }
        )

    async def slots(self, request: Request) -> Response:
        """What every row does."""
        return JSONResponse(self.scheduler.slots())

    async def _generated(self, request: Request, url: str) -> Response | ASGIApp:
        wanted = await self._prepared(
            request, lambda body: prepare(self.model, url, body, self._defaults[url], self.name)
        )
        asked, texts = wanted
        if len(texts) > self.settings.queue:
            message = f"the request asks for {len(texts)} texts; this server takes {self.settings.queue} at most"
            raise BodyError("n" if asked.choices > 1 else "prompt", message)
        arrivals = Arrivals(self.scheduler, texts, request.receive)
        if not asked.stream:
            return await self._whole(wanted, arrivals)
        writer = ChunkWriter(asked, self._echoed(asked), self.model.codec.token_text, self._ends(asked))
        return EventStream(arrivals, writer, asked, _prompt_tokens(asked, texts))

    async def _whole(self, wanted: Prepared, arrivals: Arrivals) -> Response:
        asked, texts = wanted
        gathered = [Gathering(len(text.ids)) for text in texts]
        async with arrivals:
            async for number, arrival in arrivals:
                gathered[number].take(arrival.chunk)
        results = [text.result() for text in gathered]
        held = sum(arrivals.held[number] for number in range(0, len(texts), asked.choices))
        spelt, ends, echoed = self.model.codec.token_text, self._ends(asked), self._echoed(asked)
        return JSONResponse(response_body(asked.model, asked.chat, asked.choices, results, spelt, ends, echoed, held))

    def _echoed(self, asked: Asked) -> list[str]:
        return asked.echoed(self.model.codec.decode)

    def _ends(self, asked: Asked) -> tuple[int, ...]:
        return (*self.model.session.manifest.eos_token_ids, *asked.settings.stop_token_ids)

    async def _prepared(self, request: Request, work: Callable[[Any], Answer]) -> Answer:
        """What `work` makes of a request's body, in a thread: the others' answers go on."""
        content = await read_body(request, int(self.settings.body_mb * 2**20))
        return await asyncio.wrap_future(self._preparing.submit(lambda: work(parsed(content))))

    def _facts(self) -> dict[str, Any]:
        most = self.model.session.manifest.context_length
        return {
            "id": self.name,
            "object": "model",
            "created": self._started,
            "owned_by": "imsm",
            "max_model_len": most,
        }


def _fields(body: Any, **known: Any) -> dict[str, Any]:
    """The fields of a body, or what they are where they are not said. Raises BodyError for others."""
    if not isinstance(body, Mapping):
        raise BodyError("body", f"the body is {shown(body)}, not an object")
    said = {name: value for name, value in body.items() if value is not None}
    for name in said:
        if name not in known:
            raise BodyError(name, f"{name} is not implemented; leave it out")
    return known | said


def _prompt_tokens(asked: Asked, texts: list[Text]) -> int:
    return sum(len(text.ids) for text in texts[:: asked.choices])
