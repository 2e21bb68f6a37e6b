"""What the server refuses: always a proper status and an error body, never a traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime import Model
from runtime.server.security import _host_name
from tests.runtime.server.client import CHAT, COMPLETIONS, Client, Reply, run

HELLO = [{"role": "user", "content": "Hello"}]


def error_of(reply: Reply, status: int) -> Any:
    assert reply.status == status, reply.content
    error = reply.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    assert "\n" not in error["message"]
    return error


BODIES: list[tuple[str, Any, str | None]] = [
    (CHAT, {}, "messages"),
    (CHAT, [], "body"),
    (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HELLO, "functions": []}, "functions"),
    (CHAT, {"messages": HELLO, "audio": {}}, "audio"),
    (CHAT, {"messages": HELLO, "max_tokens": -1}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": -1}, "temperature"),
    (CHAT, {"messages": HELLO, "top_p": 2}, "top_p"),
    (CHAT, {"messages": HELLO, "n": 0}, "n"),
    (CHAT, {"messages": HELLO, "n": 20}, "n"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": HELLO, "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    (CHAT, {"messages": HELLO, "logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"999999": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format"),
    (
        CHAT,
        {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
        "response_format",
    ),
    (CHAT, {"messages": HELLO, "regex": "("}, "regex"),
    (CHAT, {"messages": HELLO, "imsm": 1}, "imsm"),
    (CHAT, {"messages": HELLO, "imsm": {"x": 1}}, "imsm.x"),
    (CHAT, {"messages": HELLO, "imsm": {"memory_bias": "x"}}, "imsm.memory_bias"),
    (CHAT, {"messages": HELLO, "memory_bias": 1, "imsm": {"memory_bias": 1}}, "memory_bias"),
    (CHAT, {"messages": HELLO, "control_tokens": True}, "control_tokens"),
    (CHAT, {"messages": HELLO, "surprise": 1}, "surprise"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 200}]}, "messages"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**9]}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": ["x"] * 17}, "prompt"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
    (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs"),
    (COMPLETIONS, {"prompt": [5] * 129}, "prompt"),
    ("/v1/embeddings", {"input": 3}, "input"),
    ("/v1/embeddings", {"input": ["x" * 200]}, "input"),
    ("/v1/embeddings", {"input": ["x", ""]}, "input"),
    ("/v1/embeddings", {"input": [10**9]}, "input"),
    ("/v1/embeddings", {"input": "x", "memory": "other"}, "memory"),
    ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions"),
    ("/tokenize", {"content": 3}, "content"),
    ("/tokenize", {"content": "x", "y": 1}, "y"),
    ("/tokenize", {"content": "x", "add_special": 1}, "add_special"),
    ("/detokenize", {"tokens": ["x"]}, "tokens"),
    ("/detokenize", {"tokens": None}, "tokens"),
    ("/apply-template", {"messages": 3}, "messages"),
]


def test_a_body_that_cannot_be_followed_names_the_field(model: Model) -> None:
    async def talk(client: Client) -> None:
        for path, body, param in BODIES:
            error = error_of(await client.post(path, body), 400)
            assert (error["type"], error["param"]) == ("invalid_request_error", param), (path, body, error)
            too_long = "the model's context is 128" in error["message"] and path != "/v1/embeddings"
            assert (error["code"] == "context_length_exceeded") == too_long, error
        assert client.free
        stream = await client.post(CHAT, {"messages": HELLO, "stream": True, "top_p": 2})
        assert error_of(stream, 400)["param"] == "top_p"

    run(model, talk, queue=16)


def test_requests_that_are_junk(model: Model) -> None:
    async def talk(client: Client) -> None:
        for junk in (b"", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 5000, b'"\\ud800"', b"null x"):
            assert error_of(await client.post(CHAT, junk), 400)["code"] == "invalid_json"
        error_of(await client.post(CHAT, b"null"), 400)
        error_of(await client.post(CHAT, {"messages": HELLO}, headers={"content-type": "text/plain"}), 415)
        error_of(await client.get("/nothing"), 404)
        error_of(await client.get(CHAT), 405)
        error_of(await client.send("DELETE", "/health"), 405)
        assert error_of(await client.post(CHAT, {"messages": HELLO, "model": "gpt"}), 404)["code"] == "model_not_found"
        fine = await client.post(CHAT, {"messages": HELLO, "max_tokens": 1})
        assert fine.status == 200

    run(model, talk)


def test_what_nobody_foresaw_is_told_to_the_log_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(scheduler: Any) -> Any:
        raise RuntimeError("secret details")

    monkeypatch.setattr("runtime.server.scheduler.Scheduler.slots", failing)

    async def talk(client: Client) -> None:
        reply = await client.get("/slots")
        assert error_of(reply, 500)["type"] == "server_error"
        assert b"secret" not in reply.content
        assert (await client.get("/health")).status == 200

    run(model, talk)


@pytest.mark.parametrize("pieces", [1, 9])
def test_a_body_that_is_too_large(pieces: int, model: Model) -> None:
    async def talk(client: Client) -> None:
        large = json.dumps({"messages": HELLO, "user": "x" * 5000}).encode()
        assert error_of(await client.post(CHAT, large, pieces=pieces), 413)["code"] == "body_too_large"
        claimed = await client.post(CHAT, b"{}", headers={"content-length": "9" * 30})
        error_of(claimed, 413)
        assert (await client.post(CHAT, {"messages": HELLO, "max_tokens": 1}, pieces=pieces)).status == 200

    run(model, talk, body_mb=0.001)


def test_the_key_is_asked_for_everywhere_but_at_health(model: Model) -> None:
    async def talk(client: Client) -> None:
        for path in (CHAT, COMPLETIONS, "/v1/embeddings", "/tokenize"):
            assert error_of(await client.post(path, {}), 401)["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/props", "/slots", "/nothing", "/health/"):
            reply = await client.get(path)
            error_of(reply, 401)
            assert reply.headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "secret", "Bearer \xff"):
            error_of(await client.get("/v1/models", headers={"authorization": wrong}), 401)
        assert (await client.get("/v1/models", headers={"authorization": "Bearer secret"})).status == 200
        assert (await client.get("/health")).status == 200

    run(model, talk, api_key=" secret\n")


def test_a_page_whose_name_leads_here_is_refused(model: Model) -> None:
    async def talk(client: Client) -> None:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost@evil.example"):
            error = error_of(await client.get("/v1/models", headers={"host": host}), 403)
            assert error["code"] == "host_not_allowed"
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000", "my.name:80"):
            assert (await client.get("/v1/models", headers={"host": host})).status == 200, host

    run(model, talk, hosts=("my.name",))

    async def anywhere(client: Client) -> None:
        assert (await client.get("/v1/models", headers={"host": "any.example"})).status == 200

    run(model, anywhere, host="0.0.0.0")


def test_other_pages_may_use_it_only_where_they_are_named(model: Model) -> None:
    ours, theirs = {"origin": "https://ours.example"}, {"origin": "https://theirs.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    key = {"authorization": "Bearer secret"}
    allow = "access-control-allow-origin"

    async def talk(client: Client) -> None:
        preflight = await client.send("OPTIONS", CHAT, headers=ours | asks)  # which has no key
        assert preflight.status == 200
        assert preflight.headers[allow] == "https://ours.example"
        refused = await client.send("OPTIONS", CHAT, headers=theirs | asks)
        assert refused.status == 400
        assert allow not in refused.headers
        assert (await client.get("/v1/models", headers=ours | key)).headers[allow] == "https://ours.example"
        assert allow not in (await client.get("/v1/models", headers=theirs | key)).headers
        assert (await client.get("/v1/models", headers=ours)).status == 401

    run(model, talk, origins=("https://ours.example",), api_key="secret")

    async def off(client: Client) -> None:
        assert error_of(await client.send("OPTIONS", CHAT, headers=ours | asks), 405)
        assert allow not in (await client.get("/v1/models", headers=ours)).headers

    run(model, off)


def test_the_name_in_a_host() -> None:
    assert [_host_name(host) for host in ("A.b:1", "[::1]:2", "[::1]", "x", "")] == ["a.b", "::1", "::1", "x", ""]
