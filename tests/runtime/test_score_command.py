"""`score`: rows of JSON in, rows of JSON out, and mistakes before anything is computed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import cli
from runtime import load
from runtime.cli import rows
from runtime.cli.rows import Progress, RowWriter
from runtime.generation.scoring import score_texts
from tests.builders import write_jsonl
from tests.exported import Exported

ROWS: list[dict[str, object]] = [
    {"prompt": "Hello", "continuation": " world", "id": "a"},
    {"prompt": "Hello", "continuation": ["x", "yz"]},
]


def test_every_row_of_the_input_becomes_one_of_the_output(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write_jsonl(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    command = ["score", str(tiny.artifact), "--input", str(source), "--output", str(target), "--memory-bias", "0.5"]
    assert cli.main(command) == 0
    (one,), two = score_texts(load(tiny.artifact), ROWS, memory_bias=0.5)
    first, second = map(json.loads, target.read_text().splitlines())
    assert first["id"] == "a"
    assert first["logprob"] == pytest.approx(one.logprob)
    assert (first["tokens"], first["characters"], first["bytes"], first["greedy"]) == (6, 6, 6, one.greedy)
    assert [choice["logprob"] for choice in second["choices"]] == pytest.approx([score.logprob for score in two])
    assert second["best"] == max((0, 1), key=lambda index: two[index].logprob)
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("2 rows, 9 tokens, ")
    mean = (one.logprob + sum(score.logprob for score in two)) / 9
    assert float(told.err.split(", ")[2].split()[0]) == pytest.approx(mean, abs=1e-4)


def test_rows_go_through_stdin_and_stdout(
    tiny: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert cli.main(["score", str(tiny.artifact), "--memory", "base"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: it is no JSON: Expecting property name"),
        ('{"prompt": "x", "prompt": "y"}', 'line 3: it is no JSON: the key "prompt" is there twice'),
        ('{"prompt": "x"}', "line 3: it has no continuation"),
        (
            '{"prompt": "x", "continuation": "y", "memory": "base"}',
            "line 3: it has memory, and all rows are judged alike: say memory for all",
        ),
        ('{"prompt": "x", "continuation": ""}', "line 3: the continuation is empty"),
        (json.dumps({"prompt": "x" * 200, "continuation": "y"}), "line 3: prompt and continuation have 202 tokens"),
        (b"\xff", "line 3: it is no JSON: it is not UTF-8"),
    ],
)
def test_a_wrong_row_is_told_by_its_line_and_nothing_is_written(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str | bytes, message: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    first = json.dumps(ROWS[0]).encode()
    source.write_bytes(first + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    assert cli.main(["score", str(tiny.artifact), "--input", str(source), "--output", str(target)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not target.exists()


def test_what_cannot_be_written_or_read_is_told(
    tiny: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, empty = write_jsonl(tmp_path / "in.jsonl", ROWS), tmp_path / "empty"
    empty.write_text("\n")
    for files, message in (
        ([source, source], f"error: --output is {source}; it is the file that is read (--input)"),
        ([source, tmp_path / "no" / "out"], f"error: --output is {tmp_path}/no/out; its folder does not exist"),
        ([empty, tmp_path / "out"], f"error: {empty} has no rows"),
        ([tmp_path / "none", tmp_path / "out"], f"error: {tmp_path}/none: No such file"),
    ):
        command = ["score", str(tiny.artifact), "--input", str(files[0]), "--output", str(files[1])]
        assert cli.main(command) == 2
        assert capsys.readouterr().err.startswith(message)
    assert source.read_text()


def test_a_full_disk_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 20:
                raise OSError(28, "No space left on device")
            return super().write(data[:12])

    monkeypatch.setattr(rows, "open", lambda path, mode, buffering: Full(path, mode), raising=False)
    with RowWriter(path) as writer:
        writer.write({"row": 1})
        with pytest.raises(OSError, match="No space left"):
            writer.write({"row": "much longer"})
    assert path.read_text() == '{"row": 1}\n'


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    times = iter([0.0, 10.0, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress(2, 100) as progress:
        progress.advance(10)
        progress.advance(90)
    shown = terminal.getvalue().split("\r")
    assert shown[1] == "1 of 2 rows, 10%, 1:30 left"
    assert shown[-2].strip() == shown[-1] == ""  # and is taken away
    monkeypatch.undo()
    monkeypatch.setattr("sys.stderr", pipe := io.StringIO())
    with Progress(2, 100) as progress:
        progress.advance(10)
    assert pipe.getvalue() == ""
