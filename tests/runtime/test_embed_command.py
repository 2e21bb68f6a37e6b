"""`embed`: rows of JSON in, rows of JSON out, and mistakes before anything is computed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

import cli
from runtime import embed, load
from tests.builders import write_jsonl
from tests.exported import Exported

ROWS: list[dict[str, object]] = [{"text": "once upon a time", "id": "a"}, {"input": "x"}, {"text": "time", "id": None}]


def test_every_row_of_the_input_becomes_one_of_the_output(tiny: Exported, tmp_path: Path) -> None:
    source, target = write_jsonl(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    words = ["embed", str(tiny.artifact), "--input", str(source), "--output", str(target)]
    assert cli.main([*words, "--memory", "base", "--pooling", "last", "--no-normalize", "--batch-size", "2"]) == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    texts = ["once upon a time", "x", "time"]
    expected = embed(load(tiny.artifact), texts, memory="base", pooling="last", normalize=False)
    assert [row.keys() for row in found] == [
        {"id", "embedding", "tokens"},
        {"index", "embedding", "tokens"},
        {"id", "embedding", "tokens"},
    ]
    assert (found[0]["id"], found[1]["index"], found[2]["id"]) == ("a", 1, None)
    assert [row["tokens"] for row in found] == expected.tokens.tolist()
    np.testing.assert_allclose([row["embedding"] for row in found], expected.embeddings, atol=1e-5)


def test_rows_go_through_stdin_and_stdout(
    tiny: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\n".join(json.dumps(row) for row in ROWS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert cli.main(["embed", str(tiny.artifact)]) == 0
    rows = [json.loads(line)["embedding"] for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("plain", "line 2: it is no JSON"),
        ("[1]", "line 2: it is [1], not an object with the key text"),
        ('{"id": 5}', "line 2: it has no text; a row has the key text, or input"),
        ('{"text": "a", "input": "b"}', "line 2: it has both text and input"),
        ('{"input": ["a"]}', "line 2: the input is ['a']; it must be text"),
        ('{"text": ""}', "line 2: it is empty"),
        (json.dumps({"text": "x" * 200}), "line 2: it has 201 tokens; the model's context is 128"),
    ],
)
def test_a_wrong_row_is_told_by_its_line_and_nothing_is_written(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    assert cli.main(["embed", str(tiny.artifact), "--input", str(source), "--output", str(target)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not target.exists()


def test_an_unknown_value_is_told_by_its_option(tiny: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["embed", str(tiny.artifact), "--pooling", "max"]) == 2
    assert capsys.readouterr().err.startswith("error: --pooling is max; it must be one of mean, last")
