"""Rows of JSONL files and of arrays, each with the line on which it begins, and what is wrong with bad ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from imsm_core.data.readers import BadRow, Row, read_file, rows
from imsm_core.errors import DataError

FILE = Path("rows.jsonl")
GOOD = '{"prompt": "p", "answer": "a"}\n'


def read(content: str | bytes) -> list[tuple[int, Row | BadRow]]:
    return list(rows(content.encode() if isinstance(content, str) else content, FILE))


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows() -> None:
    row = '{"prompt": "a"}'
    assert read(f"\ufeff{row}\r\n\r\n{row}") == [(1, {"prompt": "a"}), (3, {"prompt": "a"})]


def test_line_separators_inside_json_text_do_not_end_a_row() -> None:
    text = "a\u2028b\u2029c\u0085d"
    assert read(f'{{"prompt": "{text}"}}\n') == [(1, {"prompt": text})]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ("{broken", "not JSON", "it is not JSON: .* at column 2"),
        ("[1, 2]", "not a JSON object", "it is a list, not a JSON object"),
        ('"text"', "not a JSON object", "it is text, not a JSON object"),
        ("true", "not a JSON object", "it is a boolean, not a JSON object"),
        ("NaN", "not a JSON object", "it is a number, not a JSON object"),
        ('{"n": ' + "9" * 5000 + "}", "not JSON", "it cannot be read"),
        ("[" * 100_000, "not JSON", "it cannot be read"),
    ],
    ids=range(7),
)
def test_bad_line_is_told_and_does_not_end_the_file(line: str, reason: str, message: str) -> None:
    (_, first), (number, bad), (last, _) = read(f"{GOOD}\n{line}\n{GOOD}")
    assert (number, last) == (3, 4)
    assert first == {"prompt": "p", "answer": "a"}
    assert isinstance(bad, BadRow)
    assert bad.reason == reason
    with pytest.raises(BadRow, match=message) as caught:
        raise bad
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n \t\n"])
def test_an_array_is_rows_too(indent: int | None, before: str) -> None:
    values = [{"prompt": f"p{n}", "answer": ["a\n", {"deep": n}]} for n in range(4)]
    text = before + json.dumps(values, indent=indent) + "\n\n"
    lines = text.split("\n")
    starts = [
        n for n, line in enumerate(lines, 1) if line.lstrip(" [\ufeff").startswith("{") and "deep" not in line[:9]
    ]
    found = read(text)
    assert [row for _, row in found] == values
    if indent is None:
        assert {number for number, _ in found} == {1 + before.count("\n")}
    else:
        assert [number for number, _ in found] == [n for n in starts if '"prompt"' in lines[n]]


def test_an_empty_array_has_no_rows_and_an_element_may_be_bad() -> None:
    assert read("[]") == read(" [ \n ] ") == []
    (_, bad), (line, row) = read('[1,\n{"text": "a"}]')
    assert isinstance(bad, BadRow)
    assert (line, row) == (2, {"text": "a"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "line 1: the array of rows is not JSON: Expecting value"),
        ('[{"a": 1},', "line 1: the array of rows is not JSON: Expecting value"),
        ('[{"a": 1},]', "line 1: the array of rows is not JSON: Expecting value"),
        ('[\n{"a": 1}', "line 2: the array of rows is not JSON: the file ends where ',' or ']' must"),
        ('[{"a": 1}\n\n{"a": 2}]', "line 3: the array of rows is not JSON: '{' stands where ',' or ']' must"),
        ('[{"a": 1},\n{"a": ]', "line 2: the array of rows is not JSON: Expecting value"),
        ('[{"a": 1}]\n{"a": 2}', "line 2: there is more after the array of rows"),
        ("[" * 100_000, "line 1: the array of rows is not JSON: "),
        ("[" + "9" * 5000, "line 1: the array of rows is not JSON: "),
    ],
    ids=range(9),
)
def test_a_broken_array_is_named_by_its_line(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^rows.jsonl, {message}"):
        read(text)


def test_a_file_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(DataError, match=r"is not UTF-8 text: .* at byte 15"):
        read(b'{"prompt": "caf\xe9", "answer": "a"}\n')
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read(GOOD.encode("utf-16"))


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*none\.jsonl: No such file"):
        read_file(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: it is not a regular file"):
        read_file(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot read the data file"):
        read_file(Path("a\0b"))
    (tmp_path / "rows.jsonl").write_bytes(b"x")
    assert read_file(tmp_path / "rows.jsonl") == b"x"
