"""`chat`: a script's lines are turns, and in a terminal Ctrl-C stops an answer and not the program."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli
from runtime import generate, load
from tests.exported import Exported

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def letters(tiny: Exported) -> list[str]:
    """Options that let the model write letters alone."""
    codec = load(tiny.artifact).codec
    allowed = codec.tokenizer.encode("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False).ids
    return [word for token in range(259) if token not in allowed for word in ("--logit-bias", f"{token}=-inf")]


def script(monkeypatch: pytest.MonkeyPatch, lines: bytes, artifact: Path, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines), isatty=lambda: False))
    return cli.main(["chat", str(artifact), *options])


def test_a_script_has_a_turn_on_each_line(
    talking: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(monkeypatch, b"Hi\n\n  \nand\r\nlast", talking, "--max-new-tokens", "4") == 0
    shown = capsys.readouterr()
    model = load(talking)
    state = model.session.new_state(1)
    replies = [generate(model, text, state=state, max_new_tokens=4).text for text in ("Hi", "and", "last")]
    assert shown.out == "".join(text if text.endswith("\n") else f"{text}\n" for text in replies)
    assert shown.err == ""


TEXTS = r'''
one \
two
"""
/no command
  three \
"""
"""four"""
/memory 3
/memory
/set top-k 3
/set stop "x y" z
/set stop none
/set seed 5
/set logit_bias 9=-1.5
/set control_tokens on
/trace
five
/trace off
/history
/save SAVED
/system @SYSTEM
/system none
/reset
/help
/quit
never read
'''


def test_commands_and_texts_of_several_lines(
    talking: Path,
    letters: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, system = tmp_path / "saved.json", tmp_path / "system.txt"
    system.write_text("Shout.")
    lines = TEXTS.replace("SAVED", str(saved)).replace("SYSTEM", str(system))
    assert script(monkeypatch, lines.encode(), talking, "--max-new-tokens", "3", "--system", "Be.", *letters) == 0
    shown = capsys.readouterr()
    messages = json.loads(saved.read_text())
    assert messages[0] == {"role": "system", "content": "Be."}
    said = [message["content"] for message in messages if message["role"] == "user"]
    assert said == ["one \ntwo", "/no command\n  three \\", "four", "five"]
    assert shown.out.splitlines() == [message["content"] for message in messages if message["role"] == "assistant"]
    lines_told = shown.err.splitlines()
    begin = ["memory_bias 3", "memory_bias 3", "top_k 3", "stop ('x y', 'z')", "stop none", "seed 5"]
    assert lines_told[:6] == begin
    assert lines_told[6:9] == ["logit_bias {9: -1.5}", "control_tokens True", "trace on"]
    assert re.split(" +", lines_told[9]) == ["token", "gate", "blend", "base", "adapter"]
    assert "assistant: " + messages[-1]["content"] in lines_told
    assert {"system Shout.", "system none", "forgot the conversation", f"wrote 9 messages to {saved}"} <= {*lines_told}
    assert any(line.startswith("/save FILE") for line in lines_told)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "there is no command /nothing; /help tells which there are"),
        ("/memory much", "memory-bias is much; it must be a number"),
        ("/memory nan", "it must be a number"),
        ("/trace 5", "/trace is on or off, not 5"),
        ("/set raw on", "there is no setting raw"),
        ("/set temperature", "/set temperature needs a value"),
        ("/set temperature x", "invalid float value: 'x'"),
        ("/set temperature -1", "temperature is -1.0; it must be 0"),
        ('/set stop "x', "stop: No closing quotation"),
        ("/set control_tokens 1", "control_tokens is on or off, not 1"),
        ("/save", "/save needs a file's name"),
        ("/save /no/where/at/all", "/no/where/at/all cannot be written: No such file"),
        ("/system @/no/where", "system is @/no/where; the file cannot be read"),
        ("x" * 130, "context"),
    ],
)
def test_a_mistake_in_a_script_ends_it(
    line: str,
    message: str,
    talking: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert script(monkeypatch, f"{line}\nnever\n".encode(), talking) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""


def test_a_full_context_is_told(
    talking: Path, letters: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"twenty letters of it\n" * 4
    assert script(monkeypatch, lines, talking, "--max-new-tokens", "30", *letters) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 4
    assert "[the context is full: forgot the oldest turns (" in shown.err


SLOW = """
import sys, time, cli
from runtime.engine.session import Session
step = Session.decode_step
Session.decode_step = lambda *rest, **named: time.sleep(0.05) or step(*rest, **named)
raise SystemExit(cli.main(sys.argv[1:]))
"""


class Terminal:
    """A process in a terminal of its own, whose steps are slow."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-c", SLOW, *arguments])
        self.shown = ""

    def until(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """Read until a pattern comes; what comes up to it is not looked at again."""
        found = self.comes(pattern, seconds)
        if found is None:
            pytest.fail(f"no {pattern} in {self.shown!r}")
        return found

    def comes(self, pattern: str, seconds: float) -> re.Match[str] | None:
        """`until`, which may be in vain."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self.end], [], [], max(0, end - time.monotonic()))
            if not ready:
                return None
            try:
                self.shown += os.read(self.end, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:  # the terminal is gone
                return None
        self.shown = self.shown[found.end() :]
        return found

    def line(self, text: str) -> None:
        """Type a line where one is asked for."""
        self.until("> ")
        self.type(f"{text}\n")

    def interrupt_prompt(self, pattern: str) -> None:
        """Ctrl-C where a line is asked for: just before it waits, Python notices a signal with the next one."""
        self.until("> ")
        for _ in range(20):
            time.sleep(0.1)
            self.type("\x03")
            if self.comes(pattern, 1):
                return
        pytest.fail(f"no {pattern} in {self.shown!r}")

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def code(self) -> int:
        """Wait for its end; returns the exit code."""
        self.comes("\0", 30)  # which never comes
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.end)
        return code


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(talking: Path, letters: list[str], tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    terminal = Terminal("chat", str(talking), "--max-new-tokens", "40", *letters)
    try:
        terminal.until("Ctrl-D ends")
        terminal.line("Hi")
        terminal.until("Hi\n")
        begun = terminal.until("[a-z]{4,}")[0]
        terminal.type("\x03")
        rest = terminal.until(r"(?:\^C)?([a-z]*)\n\[stopped\]")[0].replace("^C", "").split("\n")[0]
        terminal.line("/set max_new_tokens 3")
        terminal.line("/nothing")
        terminal.until("error: there is no command /nothing")
        terminal.line("you")
        terminal.until("you\n")
        second = terminal.until("([a-z]{3})\n")[1]
        terminal.line(f"/save {saved}")
        terminal.until("wrote 4 messages")
        terminal.interrupt_prompt("Ctrl-C once more, or Ctrl-D, ends")
        terminal.until("> ")
        time.sleep(0.3)
        terminal.type("\x03")
        assert terminal.code() == 130
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
    messages = json.loads(saved.read_text())
    assert [message["content"] for message in messages] == ["Hi", begun + rest, "you", second]
    assert 4 <= len(begun + rest) < 40
    model = load(talking)
    bias = {int(token): float(value) for token, value in (pair.split("=") for pair in letters[1::2])}
    assert generate(model, messages[:3], max_new_tokens=3, logit_bias=bias).text == second


def test_the_end_of_input_ends_a_terminals_chat(talking: Path) -> None:
    terminal = Terminal("chat", str(talking))
    try:
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.code() == 0
    except BaseException:
        os.kill(terminal.pid, signal.SIGKILL)
        raise
