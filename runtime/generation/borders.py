"""Around other people's code (Jinja, tokenizers): what it raises becomes an error of this package, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jinja2

from ..errors import IMSMRuntimeError

LONGEST_REASON = 300  # characters


@contextmanager
def border(kind: type[IMSMRuntimeError], what: str) -> Iterator[None]:
    """Inside the block anything but an error of this package, an interrupt and an exit is raised as `kind`: panics of
    Rust are BaseExceptions, and out of memory is only this one call's."""
    try:
        yield
    except (IMSMRuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An exception in one line of printable characters."""
    text = told(str(error))
    name = "" if isinstance(error, jinja2.TemplateError) and text else type(error).__name__
    line = ": ".join(part for part in (name, text) if part)
    return told(line)


def told(text: str) -> str:
    """What a library says in one line of printable characters."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "…"
