"""The command `serve` in a process of its own, with OpenAI's client."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import cli
from runtime import Model, generate

ROOT = Path(__file__).resolve().parents[3]
HELLO: Any = [{"role": "user", "content": "Hello"}]


class Process:
    """A server, and a client of it."""

    def __init__(self, artifact: Path) -> None:
        words = ["serve", artifact, "--port", 0, "--api-key", "secret", "--model-name", "tiny", "--threads", 1]
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.fullmatch(r"serving tiny at (http://127\.0\.0\.1:(\d+))\n", line)
        assert found, line + self.process.stderr.read()
        self.url, self.port = found[1], int(found[2])
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=20)

    def end(self) -> str:
        """Everything that it said after its first line, once it has ended."""
        _, told = self.process.communicate(timeout=20)
        return told


@pytest.fixture(scope="module")
def server(talking: Path) -> Iterator[Process]:
    made = Process(talking)
    yield made
    made.client.close()
    if made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


def test_the_official_client(server: Process, model: Model) -> None:
    client = server.client
    assert [each.id for each in client.models.list()] == ["tiny"]
    alone = generate(model, HELLO, max_new_tokens=9)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=9)
    assert answer.choices[0].message.content == alone.text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=9, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == alone.text
    assert chunks[-1].usage is not None
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2)
    text = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=5, logprobs=2)
    assert text.choices[0].text == generate(model, [5, 6, 7], max_new_tokens=5).text
    assert len(client.embeddings.create(model="tiny", input=["a", "b"]).data) == 2
    more: Any = {"imsm": {"memory_bias": -2}}
    biased = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=9, extra_body=more)
    assert biased.choices[0].message.content == generate(model, HELLO, max_new_tokens=9, memory_bias=-2).text
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 999}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_bytes_that_are_no_http(server: Process) -> None:
    for junk in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b"Traceback" not in said
    assert server.client.models.list().data


def test_a_port_that_is_taken(server: Process, talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(talking), "--port", str(server.port)]) == 2
    assert capsys.readouterr().err == (
        f"error: --port is {server.port}; the server cannot listen there: Address already in use\n"
    )
    assert cli.main(["serve", str(talking), "--host", "no.such.host.invalid"]) == 2
    assert "--host is no.such.host.invalid; it is no address to listen at" in capsys.readouterr().err
    assert cli.main(["serve", str(talking), "--api-key", "sécret"]) == 2
    assert "sécret" not in capsys.readouterr().err


def test_sigterm_in_the_middle_of_an_answer(server: Process, model: Model) -> None:
    more: Any = {"min_tokens": 120}
    chunks = server.client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=120, stream=True, extra_body=more
    )
    text = next(chunks).choices[0].text
    server.process.send_signal(signal.SIGTERM)
    text += "".join(chunk.choices[0].text for chunk in chunks)
    assert text == generate(model, [5, 6, 7], max_new_tokens=120, min_new_tokens=120).text
    told = server.end()
    assert server.process.returncode == 0
    assert "Traceback" not in told
