"""Text at the edge of the terminal: what it cannot show, what is not UTF-8, streams that are closed or full."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import PromptError
from runtime.streams import read_prompt

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from runtime.console import run_commands
def act(args):
    print("a warning: \\u0141\\xf3d\\u017a", file=sys.stderr)
    print(args.text)
    return 0
def register(commands):
    commands.add("act", act, "print").add_argument("text")
sys.exit(run_commands("program", [register]))
"""


def run(words: list[str | bytes], redirection: str = "", before: str = "", **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the program's command."""
    command = [
        "/bin/bash",
        "-c",
        f'{before} exec "$@" {redirection}',
        "bash",
        sys.executable,
        "-c",
        PROGRAM,
        "act",
        *words,
    ]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, check=False)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"\u0141\xf3d\u017a"), ("cp1252", "\\u0141\N{REPLACEMENT CHARACTER}d\\u017a"), ("utf-8", "Łódź")],
)
def test_what_the_terminal_cannot_show_is_escaped(encoding: str, shown: str) -> None:
    assert run(["Łódź"], PYTHONIOENCODING=encoding) == (0, f"{shown}\n", f"a warning: {shown}\n")


def test_the_locale_without_letters_shows_escapes() -> None:
    code, out, err = run(["Łódź"], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (code, err) == (0, "a warning: \\u0141\\xf3d\\u017a\n")
    assert out == "\\udcc5\\udc81\\udcc3\\udcb3d\\udcc5\\udcba\n"  # the bytes, which this locale cannot read either


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    assert run([b"caf\xe9"])[:2] == (0, "caf\\udce9\n")


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", ">&- <&-"])
def test_a_closed_stdout_is_refused_before_the_work(redirection: str) -> None:
    code, out, err = run(["x"], redirection)
    assert (code, out) == (2, "")
    assert err == "" if "2>" in redirection else err.startswith("error: stdout is closed")
    assert "warning" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_one_line() -> None:
    assert run(["x"], ">/dev/full") == (2, "", "a warning: Łódź\nerror: stdout: No space left on device\n")
    assert run(["x" * 100_000], ">/dev/full")[2].endswith("\nerror: stdout: No space left on device\n")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-"])
def test_answers_do_not_depend_on_stderr_and_stdin(redirection: str) -> None:
    code, out, _ = run(["x"], redirection)
    assert (code, out) == (0, "x\n")


def test_a_reader_of_stderr_that_went_away_does_not_end_the_work(tmp_path: Path) -> None:
    assert run(["x"], "2> >(exec true)")[:2] == (0, "x\n")


def test_a_file_never_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    script = tmp_path / "writes.py"
    script.write_text(
        PROGRAM.replace("print(args.text)", 'f = open(args.text, "w"); assert f.fileno() > 2; print("x", file=f)')
    )
    command = [sys.executable, str(script), "act", str(tmp_path / "file")]
    closed = f"exec {' '.join(command)} 2>&- <&-"
    subprocess.run(["/bin/bash", "-c", closed], check=True)
    assert (tmp_path / "file").read_text() == "x\n"


def stdin_of(monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str = "ascii") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding))


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"Once", "Once"),
        ("Łódź\n".encode(), "Łódź"),
        (b"one\r\ntwo\r\n", "one\r\ntwo"),
        (b"\xef\xbb\xbfOnce\n\n", "Once\n"),
        (b"carriage return\r", "carriage return\r"),
        (b"", ""),
    ],
)
def test_stdin_is_utf_8_whatever_the_locale_says(monkeypatch: pytest.MonkeyPatch, content: bytes, prompt: str) -> None:
    stdin_of(monkeypatch, content)
    assert read_prompt("-") == prompt


def test_bytes_that_are_not_utf_8_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin_of(monkeypatch, b"caf\xe9 is", "latin-1")
    with pytest.raises(PromptError, match="stdin is not UTF-8: byte 0xe9 at offset 3"):
        read_prompt("-")
    with pytest.raises(PromptError, match="the prompt is not UTF-8: byte 0xe9 at offset 5"):
        read_prompt(os.fsdecode("ü".encode() + b"caf\xe9"))
    with pytest.raises(PromptError, match="the prompt is not UTF-8: byte 0xed at offset 1"):
        read_prompt("x\ud800")  # half of a surrogate pair, as a Windows program may pass it


def test_an_argument_of_another_locale_is_read_as_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_prompt("Łódź") == "Łódź"
    assert read_prompt("Łódź".encode().decode("ascii", errors="surrogateescape")) == "Łódź"


def test_a_closed_stdin_is_an_empty_prompt_and_a_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert read_prompt("-") == ""

    class Folder(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: object) -> int:
            raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Folder())))
    with pytest.raises(PromptError, match="cannot be read from stdin: Is a directory"):
        read_prompt("-")


def test_a_deleted_current_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    assert run(["x"], before=f"cd {tmp_path}/gone && rmdir ../gone &&") == (
        2,
        "",
        "error: the current folder does not exist any more; change into one that does\n",
    )
