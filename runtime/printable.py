"""Text of unknown origin on one line of a terminal."""

from __future__ import annotations

from typing import Any

LONGEST = 60


def printable(text: str) -> str:
    """The text with everything that is no visible character or space escaped: line breaks, control sequences, changes
    of direction, bytes that are no text."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def shortened(value: Any, quoted: bool = True) -> str:
    """A value of a document as a message shows it: at most about LONGEST characters, strings quoted."""
    if isinstance(value, dict | list):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and value.bit_length() > 8 * LONGEST:
        return "a number of more than 100 digits"
    written = printable(value if isinstance(value, str) else repr(value))
    cut = written if len(written) <= LONGEST else f"{written[:LONGEST]}..."
    return f'"{cut}"' if quoted and isinstance(value, str) else cut
