"""Rows of a JSONL file and their fields, with a line number in every complaint."""

from __future__ import annotations

from pathlib import Path

import pytest

from imsm_core.data.readers import rows, text_field
from imsm_core.errors import DataError

GOOD = '{"prompt": "p", "answer": "a"}\n'


def read(tmp_path: Path, content: str | bytes) -> list[tuple[int, str, str]]:
    """(line number, prompt, answer) of every row."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(n, text_field(row, "prompt", file, n), text_field(row, "answer", file, n)) for n, row in rows(file)]


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    row = '{"prompt": "a", "answer": "b"}'
    assert read(tmp_path, f"\ufeff{row}\r\n\r\n{row}") == [(1, "a", "b"), (3, "a", "b")]


def test_line_separators_inside_json_text_do_not_end_a_row(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\u0085d"
    assert read(tmp_path, f'{{"prompt": "{text}", "answer": "x"}}\n') == [(1, text, "x")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "\n" + "{broken\n", "line 3 is not JSON: .* at column 2"),
        (GOOD + "[1, 2]\n", "line 2 is list, not a JSON object"),
        (GOOD + '"text"\n', "line 2 is str, not a JSON object"),
        (GOOD + '{"prompt": "p", "reply": "a"}\n', "line 2 has no field 'answer'; it has 'prompt', 'reply'"),
        ("{}\n", "line 1 has no field 'prompt'; it has none"),
        (GOOD + '{"prompt": 3, "answer": "a"}\n', "line 2: field 'prompt' is int, not text"),
        (GOOD + '{"prompt": "p", "answer": null}\n', "line 2: field 'answer' is NoneType, not text"),
        (GOOD + '{"prompt": "\\ud83d", "answer": "a"}\n', "line 2: field 'prompt' is not Unicode text"),
        (GOOD + '{"prompt": "p", "answer": "a", "n": ' + "9" * 5000 + "}\n", "line 2 cannot be read"),
        (GOOD + "[" * 100_000 + "\n", "line 2 cannot be read"),
        (b'{"prompt": "caf\xe9", "answer": "a"}\n', "is not UTF-8 text: .* at byte 15"),
    ],
)
def test_bad_row_is_named_by_its_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content)
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*none\.jsonl: No such file"):
        list(rows(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="Is a directory"):
        list(rows(tmp_path))
