"""`batch`: every row has one line of the output, whatever ended the run before, and it is what a run alone gives."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
from runtime import Model, embed, generate, load, score_texts
from tests.exported import Exported

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tiny: Exported) -> Model:
    return load(tiny.artifact)


class Run:
    """A folder with an input and an output."""

    def __init__(self, folder: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.artifact, self.capsys = artifact, capsys
        self.told = ""

    def write(self, *rows: Any) -> None:
        self.input.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))

    def words(self, *options: str) -> list[str]:
        return ["batch", str(self.artifact), "--input", str(self.input), "--output", str(self.output), *options]

    def __call__(self, *options: str, code: int = 0) -> list[dict[str, Any]]:
        found = cli.main(self.words(*options))
        self.told = self.capsys.readouterr().err
        assert found == code, self.told
        return self.lines()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()] if self.output.exists() else []


@pytest.fixture
def run(tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(tmp_path, tiny.artifact, capsys)


def of_openai(name: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": body}


def bodies(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {line["custom_id"]: line["response"]["body"] for line in lines}


SLOW = """
import sys, time, cli
from runtime.engine.session import Session
step = Session.decode_step
Session.decode_step = lambda *rest, **named: time.sleep(0.01) or step(*rest, **named)
raise SystemExit(cli.main(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_and_each_row_comes_once(run: Run, model: Model) -> None:
    rows = [
        {"id": number, "prompt": "x" * number + "?", "max_new_tokens": 3 + 5 * (number % 4), "seed": number}
        for number in range(1, 13)
    ]
    run.write(*rows)
    options = ["--rows", "3", "--temperature", "1.5"]
    for enough in (0, 3, 7):
        process = subprocess.Popen([sys.executable, "-c", SLOW, *run.words(*options)], cwd=ROOT)
        begin = time.monotonic()
        while not (run.output.exists() and run.output.read_bytes().count(b"\n") >= enough):
            assert process.poll() is None
            assert time.monotonic() - begin < 60
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = run.output.read_bytes()
        assert before.count(b"\n") < 12
    with run.output.open("ab") as file:  # as if it had been killed in the middle of a line
        file.write(b'{"id": 12, "te')
    lines = run(*options)
    assert run.output.read_bytes().startswith(before)
    assert sorted(line["id"] for line in lines) == list(range(1, 13))
    for line in lines:
        row = rows[line["id"] - 1]
        alone = generate(model, row["prompt"], temperature=1.5, max_new_tokens=row["max_new_tokens"], seed=row["seed"])
        assert (line["text"], line["finish_reason"]) == (alone.text, alone.finish_reason)
        assert (line["prompt_tokens"], line["new_tokens"]) == (alone.timings.prompt_tokens, len(alone.tokens))
        assert line["gate_mean"] == pytest.approx(np.mean(alone.gate_means or 0), abs=1e-5)
    content = run.output.read_bytes()
    run(*options)
    assert "0 rows written, 12 were there" in run.told
    assert run.output.read_bytes() == content


def test_lines_of_openai(run: Run, model: Model) -> None:
    ids = model.codec.encode_raw("Hi")
    run.write(
        of_openai("texts", "completions", prompt=["Hello", "Hi"], n=2, seed=5, temperature=1, max_tokens=4, logprobs=2),
        of_openai("tokens", "completions", prompt=ids, max_tokens=9, stop=None, user="me", model="mine", stream=False),
        of_openai("chat", "chat/completions", messages=[{"role": "user", "content": "Hi"}]),
        of_openai("embedding", "embeddings", input=["Hi", "Hello"], memory="adapter"),
        of_openai("base64", "embeddings", input="Hi", encoding_format="base64"),
    )
    lines = run("--max-new-tokens", "5", code=1)
    assert {line["custom_id"]: line["response"]["status_code"] for line in lines} == {
        **dict.fromkeys(["texts", "tokens", "embedding", "base64"], 200),
        "chat": 400,
    }
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
    found = bodies(lines)
    assert found["chat"]["error"] == {
        "message": "this artifact has no chat template; send the prompt as text",
        "type": "invalid_request_error",
        "param": "messages",
        "code": None,
    }
    texts = found["texts"]
    assert (texts["object"], texts["model"]) == ("text_completion", "artifact")
    drawn = [
        generate(model, prompt, raw=True, seed=seed, temperature=1, max_new_tokens=4, logprobs=2)
        for prompt in ("Hello", "Hi")
        for seed in (5, 6)
    ]
    assert [choice["text"] for choice in texts["choices"]] == [result.text for result in drawn]
    assert [choice["index"] for choice in texts["choices"]] == [0, 1, 2, 3]
    new = sum(len(result.tokens) for result in drawn)
    assert texts["usage"] == {"prompt_tokens": 9, "completion_tokens": new, "total_tokens": 9 + new}
    told = texts["choices"][0]["logprobs"]
    assert told["token_logprobs"] == pytest.approx(drawn[0].logprobs, abs=1e-4)
    texts_of = [model.codec.token_text(token) for token in drawn[0].token_ids]
    numbers = [f"token_id:{token}" for token in drawn[0].token_ids]  # parts of characters look alike
    assert told["tokens"] == [n if "\ufffd" in text else text for text, n in zip(texts_of, numbers, strict=True)]
    assert [len(top) for top in told["top_logprobs"]] == [2] * 4
    tokens = found["tokens"]
    assert tokens["model"] == "mine"
    assert tokens["choices"][0]["text"] == generate(model, ids, max_new_tokens=9).text
    assert tokens["choices"][0]["finish_reason"] == "length"
    expected = embed(model, ["Hi", "Hello"], memory="adapter").embeddings
    np.testing.assert_allclose([each["embedding"] for each in found["embedding"]["data"]], expected, atol=1e-5)
    coded = np.frombuffer(base64.b64decode(found["base64"]["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(coded, embed(model, ["Hi"]).embeddings[0], atol=1e-5)


def test_chats_of_openai(run: Run, talking: Path) -> None:
    run.artifact = talking
    said = [{"role": "user", "content": "Hi"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    image = {"type": "image_url", "image_url": {"url": "x"}}
    run.write(
        of_openai("plain", "chat/completions", messages=said, max_completion_tokens=4, n=2),
        of_openai("told", "chat/completions", messages=parts, max_tokens=3, logprobs=True, top_logprobs=2),
        of_openai("form", "chat/completions", messages=said, response_format=form, max_tokens=60),
        of_openai("image", "chat/completions", messages=[{"role": "user", "content": [image]}]),
        of_openai("unasked", "chat/completions", messages=said, top_logprobs=2),
        of_openai("no form", "chat/completions", messages=said, response_format={"type": "xml"}),
        {"messages": said, "max_new_tokens": 4},
    )
    lines = run("--max-new-tokens", "5", code=1)
    found = bodies([line for line in lines if "custom_id" in line])
    model = load(talking)
    plain = generate(model, said, max_new_tokens=4)
    assert [line["text"] for line in lines if "row" in line] == [plain.text]
    assert found["plain"]["object"] == "chat.completion"
    assert [choice["message"] for choice in found["plain"]["choices"]] == [
        {"role": "assistant", "content": plain.text, "refusal": None}
    ] * 2
    told = generate(model, [{"role": "user", "content": "H\ni"}], max_new_tokens=3, logprobs=2)
    content = found["told"]["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx(told.logprobs, abs=1e-4)
    assert [len(entry["top_logprobs"]) for entry in content] == [2, 2, 2]
    assert all(entry["bytes"] in (None, [*entry["token"].encode()]) for entry in content)
    written = found["form"]["choices"][0]
    assert written["finish_reason"] == "length" or set(json.loads(written["message"]["content"])) >= {"a"}
    assert written["message"]["content"].lstrip().startswith("{")
    errors = {name: body["error"]["param"] for name, body in found.items() if "error" in body}
    assert errors == {
        "image": "messages[0].content[0]",
        "unasked": "top_logprobs",
        "no form": "response_format",
    }


def test_prompt_rows_have_settings_of_their_own_and_scores(run: Run, model: Model) -> None:
    run.write(
        {"prompt": "Hello", "logprobs": 1, "trace": 1, "memory_bias": 2.5},
        {"id": "ids", "prompt": [5, 6, 7], "logit_bias": {"9": -1e9}, "max_new_tokens": 3},
        {"id": "score", "prompt": "Hello", "continuation": [" you", "!"], "memory": "base"},
        {"prompt": "Hello", "continuation": " you"},
    )
    lines = run("--max-new-tokens", "4", "--rows", "2")
    by_key = {line.get("id") or line["row"]: line for line in lines}
    assert set(by_key) == {1, "ids", "score", 4}
    alone = generate(model, "Hello", logprobs=1, trace=1, memory_bias=2.5, max_new_tokens=4)
    assert by_key[1]["text"] == alone.text
    assert by_key[1]["logprobs"] == pytest.approx(alone.logprobs, abs=1e-4)
    assert [set(each) for each in by_key[1]["trace"]] == [{"blend", "base", "adapter"}] * 4
    assert by_key["ids"]["text"] == generate(model, [5, 6, 7], max_new_tokens=3, logit_bias={9: -1e9}).text
    rows = [{"prompt": "Hello", "continuation": [" you", "!"]}]
    (expected,) = score_texts(model, rows, memory="base")
    found = [choice["logprob"] for choice in by_key["score"]["choices"]]
    assert found == pytest.approx([each.logprob for each in expected], abs=1e-4)
    assert by_key[4]["tokens"] == 4


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "x", "suffix": "y"}, "suffix", "suffix is not implemented; leave it out"),
        ({"prompt": "x", "echo": "yes"}, "echo", "echo is yes; it must be true or false"),
        ({"prompt": "x", "stream": True}, "stream", "stream is true, and a file's answer comes whole; leave it out"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
        ({"prompt": "x", "min_tokens": 9, "max_tokens": 5}, "min_tokens", "it must not be above max_tokens"),
        ({"prompt": "x", "max_tokens": 5, "max_new_tokens": 5}, "max_new_tokens", "max_tokens and max_new_tokens are"),
        ({"prompt": "x", "temperature": "1"}, "temperature", "it must be a number, not str"),
        ({"prompt": "x", "n": 0}, "n", "n is 0; it must be 1 to 128"),
        ({"prompt": "x", "model": 5}, "model", "model is 5; it must be text"),
        ({"prompt": "x", "raw": False}, "raw", "raw is not implemented"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token ids as its keys"),
        ({"prompt": "x", "logit_bias": {"9999": 1}}, "logit_bias", "its tokens must be ids from 0 to 258"),
        ({"prompt": "x" * 200}, "prompt", "the model's context is 128"),
        ({"prompt": []}, "prompt", "it must be text, token ids, or a list of those"),
        ({}, "prompt", "prompt is None"),
        ([], "body", "the body is [], not an object"),
    ],
)
def test_what_a_body_must_not_be_is_the_answer_of_its_line(body: Any, param: str, message: str, run: Run) -> None:
    run.write({**of_openai("bad", "completions"), "body": body}, {"prompt": "x", "max_new_tokens": 1})
    bad, good = run(code=1)
    error = bad["response"]["body"]["error"]
    assert (bad["response"]["status_code"], error["param"]) == (400, param)
    assert message in error["message"]
    assert good["row"] == 2
    assert "2 rows written, 0 were there" in run.told
    assert "1 have an error" in run.told


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: it is no JSON"),
        ("5", "line 2: it is 5, not an object"),
        ({"id": [], "prompt": "x"}, "line 2: id is []; it must be text or a whole number"),
        ({"text": "x"}, "line 2: a row has either prompt or messages"),
        ({"prompt": "x", "temprature": 1}, "line 2: there is no setting temprature"),
        ({"prompt": "x", "temperature": -1}, "line 2: temperature is -1"),
        ({"prompt": "x" * 200}, "line 2: the prompt has 201 tokens"),
        ({"prompt": 5}, "line 2: prompt is 5; it must be text, token ids or messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: this artifact has no chat template"),
        ({"prompt": "x", "continuation": ""}, "line 2: the continuation is empty"),
        ({"prompt": "x", "continuation": "y", "seed": 1}, "line 2: a score has no setting seed"),
        ({**of_openai("a", "completions", prompt="x"), "method": "GET"}, "line 2: method is GET; it must be POST"),
        ({"custom_id": "a", "url": "/v1/completions", "body": {}}, "must have custom_id, method, url and body"),
        ({"custom_id": 5}, "line 2: custom_id is 5; it must be text"),
    ],
)
def test_a_row_that_cannot_be_used_is_told_before_anything_is_computed(row: Any, message: str, run: Run) -> None:
    run.write({"prompt": "x", "max_new_tokens": 1}, row)
    assert run(code=2) == []
    assert message in run.told
    assert len(run.told.splitlines()) == 1
    lines = run("--skip-bad-rows", code=1)
    assert len(lines) == 2
    assert ("error" in lines[0] and lines[0]["error"]) or lines[0]["response"]["status_code"] == 400
    assert lines[1]["row"] == 1


def test_a_key_twice_is_an_error(run: Run) -> None:
    run.write({"id": 1, "prompt": "x"}, {"id": "1", "prompt": "x"}, {"id": 1, "prompt": "y"})
    run("--skip-bad-rows", code=2)
    assert "line 3: its id 1 is that of line 1, too" in run.told


def test_an_output_of_something_else_is_kept(run: Run, tmp_path: Path) -> None:
    run.write({"prompt": "x"})
    (first,) = run("--max-new-tokens", "1")
    changes: list[tuple[Callable[[], object], list[str], str]] = [
        (lambda: run.write({"prompt": "y"}), ["--max-new-tokens", "1"], "it is of another input"),
        (lambda: run.write({"prompt": "x"}), ["--max-new-tokens", "2"], "it is of another set of options"),
        (lambda: (tmp_path / "out.jsonl.state.json").unlink(), [], "does not say what it is of"),
    ]
    for change, options, message in changes:
        change()
        before = run.output.read_bytes()
        run(*options, code=2)
        assert message in run.told
        assert "take another name, or --overwrite" in run.told
        assert run.output.read_bytes() == before
    (second,) = run("--max-new-tokens", "2", "--overwrite")
    assert (first["new_tokens"], second["new_tokens"]) == (1, 2)
    with run.output.open("a") as file:
        file.write('{"something": "else"}\n')
    run("--max-new-tokens", "2", code=2)
    assert "its line 2 is no row of a batch" in run.told


def test_an_output_that_another_run_writes_is_refused(run: Run) -> None:
    fcntl = pytest.importorskip("fcntl")
    run.write({"prompt": "x"})
    with run.output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run(code=2)
    assert "another run is writing it" in run.told


def test_mistakes_in_options(run: Run, tmp_path: Path) -> None:
    run.write({"prompt": "x"})
    run("--rows", "0", code=2)
    assert "--rows is 0; it must be at least 1" in run.told
    run.output = run.input
    run(code=2)
    assert "it is the file that is read" in run.told
    run.output = tmp_path / "no" / "where"
    run(code=2)
    assert "its folder does not exist" in run.told


def test_an_error_while_a_row_is_generated_is_its_answer(run: Run) -> None:
    run.write({"id": "bad", "prompt": "x"}, {"id": "good", "prompt": "x", "max_new_tokens": 9, "logit_bias": None})
    lines = run(*(f"--logit-bias={token}=-inf" for token in range(259)), code=1)
    assert {line["id"]: "error" in line for line in lines} == {"bad": True, "good": False}
    assert "no token is allowed" in lines[0]["error"]
    assert run(*(f"--logit-bias={token}=-inf" for token in range(259)), code=1) == lines  # a run with nothing to do


def test_an_output_that_is_no_file_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.write({"prompt": "x"})
    assert cli.main(["batch", str(run.artifact), "--input", str(run.input), "--output", "-"]) == 2
    assert "--output is -; it must be a file" in capsys.readouterr().err
    assert not Path("-").exists()
