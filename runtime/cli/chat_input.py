"""A user's turns, from a terminal or from a file or a pipe: a line each, or several."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import NamedTuple

from ..streams import read_line

PROMPT, MORE = "> ", ". "
FENCE = '"""'


class Turn(NamedTuple):
    """command: whether it begins with a slash and stands on one line, without a fence."""

    text: str
    command: bool


class Lines:
    """Reads turns. A line that ends with a backslash goes on in the next one; what is between two of FENCE is a turn as
    it is. asks: whether stdin is a terminal. interrupted: whether the last thing there was Ctrl-C."""

    def __init__(self) -> None:
        self.asks = sys.stdin is not None and sys.stdin.isatty()
        self.interrupted = False
        self._edits = self.asks and sys.stdout.isatty()
        if self._edits:
            with suppress(ImportError):  # Windows has its own
                import readline  # noqa: F401  input() then has a history and edits lines

    def read(self) -> Turn | None:
        """The next turn that is not blank; None at the end. Raises PromptError for what is not UTF-8."""
        while True:
            line = self._line(PROMPT)
            if line is None:
                return None
            if line.lstrip().startswith(FENCE):
                text, command = self._fenced(line.lstrip().removeprefix(FENCE)), False
            else:
                several = line.endswith("\\")
                text = self._continued(line)
                command = not several and text.startswith("/")
            if text.strip():
                return Turn(text, command)

    def _fenced(self, line: str | None) -> str:
        lines = []
        while line is not None:
            if line.rstrip().endswith(FENCE):
                lines.append(line.rstrip().removesuffix(FENCE))
                break
            lines.append(line)
            line = self._line(MORE)
        return "\n".join(lines).strip("\n")

    def _continued(self, line: str | None) -> str:
        lines = []
        while line is not None:
            lines.append(line.removesuffix("\\"))
            line = self._line(MORE) if line.endswith("\\") else None
        return "\n".join(lines)

    def _line(self, prompt: str) -> str | None:
        if self._edits:
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.asks:
            print(prompt, end="", file=sys.stderr, flush=True)
        return read_line()
