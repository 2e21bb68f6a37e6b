"""Answers are what `generate` gives, in the shapes of OpenAI's API, whoever else is served."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime import GenerationSettings, Model, embed, generate
from tests.runtime.server.client import CHAT, COMPLETIONS, Client, Reply, run

HELLO = [{"role": "user", "content": "Hello"}]


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply.content
    choice = reply.body["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def test_a_chat_is_what_generate_gives(model: Model) -> None:
    async def talk(client: Client) -> None:
        reply = await client.post(CHAT, {"model": "tiny", "messages": HELLO, "max_tokens": 7})
        alone = generate(model, HELLO, max_new_tokens=7)
        assert text_of(reply) == alone.text
        body = reply.body
        assert (body["object"], body["model"]) == ("chat.completion", "tiny")
        assert body["choices"][0]["finish_reason"] == alone.finish_reason
        count = alone.timings.prompt_tokens
        assert body["usage"] == {
            "prompt_tokens": count,
            "completion_tokens": 7,
            "total_tokens": count + 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
        again = await client.post(CHAT, {"messages": parts, "max_completion_tokens": 7})
        assert text_of(again) == alone.text
        assert again.body["usage"]["prompt_tokens_details"]["cached_tokens"] == count - 1
        to_the_end = await client.post(CHAT, {"messages": HELLO, "min_tokens": 128})
        assert to_the_end.body["usage"]["total_tokens"] == 128 + 1  # the last token is not read

    run(model, talk)


def test_many_clients_at_once_with_settings_of_their_own(model: Model) -> None:
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_tokens": 9, "seed": 3, "temperature": 1.2}, {"max_new_tokens": 9, "seed": 3, "temperature": 1.2}),
        ({"max_tokens": 12, "imsm": {"memory_bias": 4}}, {"max_new_tokens": 12, "memory_bias": 4}),
        (
            {"max_tokens": 20, "response_format": {"type": "json_object"}, "seed": 1, "temperature": 2},
            {"max_new_tokens": 20, "json_object": True, "seed": 1, "temperature": 2},
        ),
        (
            {"max_tokens": 11, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
            {"max_new_tokens": 11, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        ),
        ({"max_tokens": 30, "logit_bias": {"7": 100}}, {"max_new_tokens": 30, "logit_bias": {7: 100}}),
        (
            {"max_tokens": 8, "top_k": 5, "min_p": 0.01, "seed": 9, "temperature": 1},
            {"max_new_tokens": 8, "top_k": 5, "min_p": 0.01, "seed": 9, "temperature": 1},
        ),
    ]

    async def talk(client: Client) -> None:
        replies = []
        for number, (body, _) in enumerate(asked):
            messages = [{"role": "user", "content": f"Question {number}"}]
            replies.append(client.start("POST", CHAT, {"messages": messages, **body}))
        for number, (reply, (_, settings)) in enumerate(zip(replies, asked, strict=True)):
            await reply.until(lambda reply=reply: reply.ended)  # type: ignore[misc]
            messages = [{"role": "user", "content": f"Question {number}"}]
            assert text_of(reply) == generate(model, messages, **settings).text, number

    run(model, talk, rows=3)


def test_a_stream_is_the_whole_answer_in_pieces(model: Model) -> None:
    body: dict[str, Any] = {"messages": HELLO, "max_tokens": 12, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 5}
    body |= {"temperature": 1, "imsm": {"trace": 2}}

    async def talk(client: Client) -> None:
        whole = (await client.post(CHAT, body)).body
        options = {"stream": True, "stream_options": {"include_usage": True}}
        reply = await client.post(CHAT, body | options)
        assert reply.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = reply.events
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert {**usage["usage"], "prompt_tokens_details": None} == {**whole["usage"], "prompt_tokens_details": None}
        assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
        assert all(chunk["usage"] is None for chunk in chunks)
        for index, expected in enumerate(whole["choices"]):
            own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert [choice["delta"].get("role") for choice in own] == ["assistant", *[None] * (len(own) - 1)]
            assert "".join(choice["delta"].get("content", "") for choice in own) == expected["message"]["content"]
            assert [choice["finish_reason"] for choice in own] == [*[None] * (len(own) - 1), "length"]
            told = [entry for choice in own if choice["logprobs"] for entry in choice["logprobs"]["content"]]
            assert [entry["token"] for entry in told] == [entry["token"] for entry in expected["logprobs"]["content"]]
            assert all(len(entry["top_logprobs"]) == 2 for entry in told)
            traced = [entry for choice in own if "imsm" in choice for entry in choice["imsm"]["trace"]]
            assert [entry["id"] for entry in traced] == [entry["id"] for entry in expected["imsm"]["trace"]]
            assert set(traced[0]) == {"id", "token", "gate_mean", "blend", "base", "adapter"}
        assert whole["choices"][0]["message"] != whole["choices"][1]["message"]

    run(model, talk)


def test_completions_of_texts_and_token_ids(model: Model) -> None:
    async def talk(client: Client) -> None:
        prompts = ["Hello", "Once upon"]
        texts = (await client.post(COMPLETIONS, {"prompt": prompts, "n": 2, "seed": 4, "temperature": 1})).body
        assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]
        expected = [
            generate(model, prompt, raw=True, seed=seed, temperature=1, max_new_tokens=16).text
            for prompt in prompts
            for seed in (4, 5)
        ]
        assert [choice["text"] for choice in texts["choices"]] == expected
        ids = (await client.post(COMPLETIONS, {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 3})).body
        assert [choice["text"] for choice in ids["choices"]] == [
            generate(model, prompt, max_new_tokens=3).text for prompt in ([5, 6], [7, 8, 9])
        ]
        one = (await client.post(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 3})).body
        assert one["choices"] == ids["choices"][:1]

    run(model, talk)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_tells_the_prompts_chances(stream: bool, model: Model) -> None:
    async def talk(client: Client) -> None:
        body = {"prompt": "Hello", "max_tokens": 2, "echo": True, "logprobs": 2, "stream": stream}
        reply = await client.post(COMPLETIONS, body)
        alone = generate(model, "Hello", raw=True, max_new_tokens=2, logprobs=2, echo=True)
        assert alone.prompt is not None
        choices = [event["choices"][0] for event in reply.events[:-1]] if stream else [reply.body["choices"][0]]
        assert "".join(choice["text"] for choice in choices) == "Hello" + alone.text
        told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        chances = [chance for each in told for chance in each["token_logprobs"]]
        expected = [token.logprob for token in (*alone.prompt, *alone.tokens)]
        assert chances[0] is None is told[0]["top_logprobs"][0]
        assert chances[1:] == pytest.approx(expected[1:], abs=1e-4)
        offsets = [offset for each in told for offset in each["text_offset"]]
        assert offsets == sorted(offsets)
        assert len(offsets) == len(expected)
        plain = await client.post(COMPLETIONS, body | {"logprobs": None, "stream": False})
        assert text_of(plain) == "Hello" + alone.text

    run(model, talk)


def test_stop_strings_and_structure(model: Model) -> None:
    async def talk(client: Client) -> None:
        whole = generate(model, HELLO, max_new_tokens=20).text
        stop = whole[5:7]
        reply = await client.post(CHAT, {"messages": HELLO, "max_tokens": 20, "stop": stop})
        assert text_of(reply) == whole[: whole.index(stop)]
        assert reply.body["choices"][0]["finish_reason"] == "stop"
        schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        schema["additionalProperties"] = False
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        reply = await client.post(CHAT, {"messages": HELLO, "max_tokens": 60, "response_format": form})
        assert json.loads(text_of(reply))["a"] in (1, 2)

    run(model, talk)


def test_a_conversation_reads_what_is_new(model: Model) -> None:
    async def talk(client: Client) -> None:
        turns = [{"role": "user", "content": "Tell me of the sea and of what lies in it"}]
        first = await client.post(CHAT, {"messages": turns, "max_tokens": 6})
        turns = [*turns, {"role": "assistant", "content": text_of(first)}, {"role": "user", "content": "And?"}]
        second = await client.post(CHAT, {"messages": turns, "max_tokens": 6, "imsm": {"memory_bias": 1}})
        assert text_of(second) == generate(model, turns, max_new_tokens=6, memory_bias=1).text
        assert second.body["usage"]["prompt_tokens_details"]["cached_tokens"] >= 40
        metrics = (await client.get("/metrics")).content.decode()
        cached = second.body["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert f"imsm_cached_prompt_tokens_total {cached}.0" in metrics
        assert 'imsm_requests_total{path="/v1/chat/completions",status="200"} 2.0' in metrics
        assert "imsm_generated_tokens_total 12.0" in metrics

    run(model, talk)


def test_texts_tokens_and_templates(model: Model) -> None:
    async def talk(client: Client) -> None:
        ids = (await client.post("/tokenize", {"content": "Hello"})).body["tokens"]
        assert ids == model.codec.encode_raw("Hello", beginning=False)
        whole = (await client.post("/tokenize", {"content": "Hello", "add_special": True})).body["tokens"]
        assert whole == model.codec.encode_raw("Hello")
        pieces = (await client.post("/tokenize", {"content": "Hello", "with_pieces": True})).body["tokens"]
        assert "".join(each["piece"] for each in pieces) == "Hello"
        assert (await client.post("/tokenize", {"content": ""})).body["tokens"] == []
        assert (await client.post("/detokenize", {"tokens": ids})).body == {"content": "Hello"}
        assert (await client.post("/apply-template", {"messages": HELLO})).body == {"prompt": "uHello\na"}

    run(model, talk)


def test_what_the_server_tells_of_itself(model: Model) -> None:
    async def talk(client: Client) -> None:
        assert (await client.get("/health")).body == {"status": "ok"}
        models = (await client.get("/v1/models")).body
        assert [each["id"] for each in models["data"]] == ["tiny"]
        assert (await client.get("/v1/models/tiny")).body == models["data"][0]
        assert (await client.get("/v1/models/other")).status == 404
        props = (await client.get("/props")).body
        assert (props["n_ctx"], props["total_slots"]) == (128, 8)
        defaults = GenerationSettings.of_model(model.session.manifest.generation)
        assert props["default_generation_settings"]["temperature"] == defaults.temperature
        assert [slot["state"] for slot in (await client.get("/slots")).body] == ["free"] * 8

    run(model, talk)


def test_embeddings_are_those_of_the_library(model: Model) -> None:
    async def talk(client: Client) -> None:
        body = (await client.post("/v1/embeddings", {"input": ["Hello", "Hi"], "memory": "base"})).body
        expected = embed(model, ["Hello", "Hi"], memory="base")
        for found, wanted in zip(body["data"], expected.embeddings, strict=True):
            assert found["embedding"] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert body["usage"]["prompt_tokens"] == expected.tokens.sum()
        ids = [model.codec.encode_raw(text) for text in ("Hello", "Hi")]
        assert (await client.post("/v1/embeddings", {"input": ids, "memory": "base"})).body == body

    run(model, talk)
