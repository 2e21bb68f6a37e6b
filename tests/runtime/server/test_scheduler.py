"""Who leaves frees a row at once and nobody else notices; queues end; what breaks is told."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from runtime import Batch, Model, generate
from tests.runtime.server.client import CHAT, COMPLETIONS, Client, Reply, run

LONG = {"min_tokens": 110, "max_tokens": 110}
OTHER = {"prompt": [5, 6, 7], **LONG}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a model of a usual size."""
    step = Batch.step

    def slowly(batch: Batch) -> Any:
        time.sleep(0.005)
        return step(batch)

    monkeypatch.setattr(Batch, "step", slowly)


def check(reply: Reply, model: Model) -> None:
    """Whether an answer to OTHER is whole."""
    assert reply.status == 200, reply.content
    expected = generate(model, OTHER["prompt"], max_new_tokens=110, min_new_tokens=110)  # type: ignore[arg-type]
    assert reply.body["choices"][0]["text"] == expected.text


def state_of(client: Client, prompt_tokens: int) -> Any:
    states = {slot.get("prompt_tokens"): slot["state"] for slot in client.server.scheduler.slots()}
    return states.get(prompt_tokens)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_written_frees_its_row(stream: bool, model: Model) -> None:
    async def talk(client: Client) -> None:
        other = client.start("POST", COMPLETIONS, OTHER)
        leaving = client.start("POST", COMPLETIONS, {"prompt": [9] * 5, **LONG, "n": 2, "stream": stream})
        await leaving.until(lambda: state_of(client, 5) == "writing")
        leaving.leave.set()
        await leaving.until(lambda: leaving.ended and len(client.server.scheduler._running) == 1)
        assert not other.ended
        await other.until(lambda: other.ended)
        check(other, model)
        assert client.free
        assert b"[DONE]" not in leaving.content
        assert 'ended="cancelled"} 2.0' in (await client.get("/metrics")).content.decode()

    run(model, talk)


@pytest.mark.usefixtures("slow")
def test_who_leaves_while_read_frees_its_row(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.scheduler.ALONE_MS", 1e-6)
    monkeypatch.setattr("runtime.generation.batching.PIECE_MS", 1e-6)

    async def talk(client: Client) -> None:
        leaving = client.start("POST", COMPLETIONS, {"prompt": [9] * 120})
        await leaving.until(lambda: state_of(client, 120) == "reading")
        other = client.start("POST", COMPLETIONS, OTHER)
        leaving.leave.set()
        await leaving.until(lambda: leaving.ended and state_of(client, 120) is None)
        await other.until(lambda: other.ended)
        check(other, model)
        assert client.free
        assert client.server.scheduler.metrics.first_token._sum.get() > 0
        assert "imsm_prompt_tokens_total 3.0" in (await client.get("/metrics")).content.decode()

    run(model, talk)


@pytest.mark.usefixtures("slow")
def test_a_full_queue_and_who_leaves_it(model: Model) -> None:
    async def talk(client: Client) -> None:
        other = client.start("POST", COMPLETIONS, OTHER)
        await other.until(lambda: state_of(client, 3) == "writing")
        waiting = [client.start("POST", COMPLETIONS, {"prompt": [9] * 5, "max_tokens": 2}) for _ in range(2)]
        await other.until(lambda: len(client.server.scheduler._queue) == 2)
        refused = await client.post(CHAT, {"messages": [{"role": "user", "content": "x"}], "stream": True})
        assert refused.status == 429
        assert refused.body["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        waiting[0].leave.set()
        await other.until(lambda: len(client.server.scheduler._queue) == 1)
        await waiting[1].until(lambda: waiting[1].ended)
        assert waiting[1].status == 200
        check(other, model)
        assert client.free

    run(model, talk, rows=1, queue=2)


@pytest.mark.usefixtures("slow")
def test_a_request_that_takes_too_long(model: Model) -> None:
    async def talk(client: Client) -> None:
        running = client.start("POST", COMPLETIONS, OTHER | {"stream": True})
        waiting = await client.post(COMPLETIONS, OTHER)
        assert waiting.status == 504
        assert waiting.body["error"]["code"] == "timeout"
        await running.until(lambda: running.ended)
        assert running.status == 200
        assert running.events[-1]["error"]["code"] == "timeout"
        assert client.free

    run(model, talk, rows=1, timeout_s=0.2)


@pytest.mark.usefixtures("slow")
def test_the_end_lets_what_runs_go_on_for_a_while(model: Model) -> None:
    async def talk(client: Client) -> None:
        short = client.start("POST", COMPLETIONS, {"prompt": [8] * 4, "max_tokens": 8, "min_tokens": 8})
        long = client.start("POST", COMPLETIONS, OTHER | {"stream": True})
        await long.until(lambda: state_of(client, 3) == "writing" and state_of(client, 4) == "writing")
        waiting = client.start("POST", COMPLETIONS, {"prompt": [9] * 5})
        await waiting.until(lambda: len(client.server.scheduler._queue) == 1)
        client.server.scheduler.drain(0.25)
        late = await client.post(COMPLETIONS, {"prompt": [9]})
        await long.until(lambda: long.ended and waiting.ended and short.ended)
        for refused in (late, waiting):
            assert refused.status == 503
            assert refused.body["error"]["code"] == "server_stopping"
        assert short.status == 200
        assert len(long.events) > 3
        assert long.events[-1]["error"]["code"] == "server_stopping"
        assert (await client.get("/health")).status == 503

    run(model, talk, rows=2)


def test_a_step_that_fails_ends_its_texts_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step, left = Batch.step, [1]

    def failing(batch: Batch) -> Any:
        if batch.active and left:
            left.pop()
            raise MemoryError("secret details")
        return step(batch)

    monkeypatch.setattr(Batch, "step", failing)

    async def talk(client: Client) -> None:
        failed = await client.post(COMPLETIONS, OTHER)
        assert failed.status == 500
        assert "secret" not in failed.content.decode()
        assert (await client.get("/health")).status == 200
        again = await client.post(COMPLETIONS, OTHER)
        check(again, model)

    run(model, talk)


def test_a_thread_that_dies_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(batch: Batch) -> Any:
        raise MemoryError

    monkeypatch.setattr(Batch, "step", failing)

    async def talk(client: Client) -> None:
        statuses = [(await client.post(COMPLETIONS, OTHER)).status for _ in range(4)]
        assert statuses == [500, 500, 503, 503]
        health = await client.get("/health")
        assert health.status == 503
        assert "has ended" in health.body["error"]["message"]

    run(model, talk)


def test_a_step_that_hangs_is_told(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batch.step

    def hanging(batch: Batch) -> Any:
        time.sleep(0.4)
        return step(batch)

    monkeypatch.setattr(Batch, "step", hanging)

    async def talk(client: Client) -> None:
        reply = client.start("POST", COMPLETIONS, {"prompt": [5], "max_tokens": 1})
        await asyncio.sleep(0.2)
        health = await client.get("/health")
        assert health.status == 503
        assert "takes longer than 0.05 s" in health.body["error"]["message"]
        await reply.until(lambda: reply.ended)
        assert reply.status == 200
        assert (await client.get("/health")).status == 200

    run(model, talk, stuck_s=0.05)
