"""stdin, stdout and stderr as a command needs them: whatever the terminal, the pipe or the disk behind them is."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from .errors import PromptError

STANDARD = (0, 1, 2)
STDOUT = "stdout"


def prepare_streams() -> None:
    """Characters that stdout or stderr cannot encode are written as escapes; what cannot be written to stderr is lost,
    and the work goes on. Closed streams lead to nowhere, so that no file that is opened takes their place; a closed
    stdout stays None, for `run_commands` to refuse."""
    for number in STANDARD:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    stdout: Any = sys.stdout
    stderr: Any = sys.stderr
    if stderr is None or _is_plain(stderr, sys.__stderr__):
        encoding = "utf-8" if stderr is None else stderr.encoding
        lossy = _Lossy(2, "w", closefd=False)
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(lossy), encoding, line_buffering=True)
    if stdout is not None and _is_plain(stdout, sys.__stdout__):
        named = _Named(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(named), stdout.encoding, line_buffering=named.isatty())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def read_prompt(text: str) -> str:
    """The prompt that a command was given: `text`, or for "-" what stdin holds, which is UTF-8 whatever the locale
    says, without a byte order mark and without the newline at its end. Raises PromptError if it is not UTF-8."""
    if text == "-":
        try:
            content = b"" if sys.stdin is None else sys.stdin.buffer.read()
        except OSError as error:
            raise PromptError(f"the prompt cannot be read from stdin: {error.strerror}") from error
        found = _decoded(content, "stdin").removeprefix("\ufeff")
        return found.removesuffix("\n").removesuffix("\r") if found.endswith("\n") else found
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates stand for bytes that the locale's encoding lacks
        try:
            content = os.fsencode(text)
        except UnicodeEncodeError:
            content = text.encode(errors="surrogatepass")
        return _decoded(content, "the prompt")
    return text


def read_line() -> str | None:
    """The next line of stdin, as `read_prompt` reads, without its end; None after the last one. Raises PromptError if
    it is not UTF-8."""
    try:
        content = b"" if sys.stdin is None else sys.stdin.buffer.readline()
    except OSError as error:
        raise PromptError(f"no line can be read from stdin: {error.strerror}") from error
    return _decoded(content, "a line of stdin").removesuffix("\n").removesuffix("\r") if content else None


def forget_stdout() -> None:
    """What is left to be written there is dropped, so that Python does not fail once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; convert it to UTF-8"
        ) from error


def _is_plain(stream: Any, first: Any) -> bool:
    """Whether it is a file or a pipe as Python opened it, and neither another program's nor the console of Windows."""
    return stream is first and type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO


class _Named(io.FileIO):
    """Says in its errors that it is stdout."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, STDOUT) from error


class _Lossy(io.FileIO):
    """Loses what cannot be written."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)
