"""What can go wrong at run time, as one tree.

IMSMRuntimeError          a user's mistake; the command line prints its one line and exits with `exit_code`
├── ArtifactError         an ARTIFACT folder that is incomplete, damaged, or contradicts itself
├── PromptError           a prompt that is empty, too long, or does not fit its state
├── ProviderError         an execution provider that is unknown or not in use
├── MissingPackageError   a command whose packages are not installed
└── SettingsError         a setting outside its range
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from numbers import Number
from pathlib import Path

LONGEST_SHOWN = 200
"""Characters of a value that a message shows."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST_SHOWN


class IMSMRuntimeError(Exception):
    """Base of every error that a user can cause; its message is one line."""

    exit_code = 2

    def told(self, spell: Callable[[str], str]) -> str:
        """The message, with settings' names as `spell` writes them: a command line has options instead."""
        return _one_line(re.sub("\x02(.*?)\x03", lambda match: spell(match[1]), super().__str__()))

    def __str__(self) -> str:
        return self.told(str)


class ArtifactError(IMSMRuntimeError):
    """An ARTIFACT folder that is incomplete, damaged, or contradicts itself."""


class PromptError(IMSMRuntimeError):
    """A prompt that is empty, too long, or does not fit its state."""


class ProviderError(IMSMRuntimeError):
    """An execution provider that is unknown or not in use."""


class MissingPackageError(IMSMRuntimeError):
    """A command whose packages are not installed."""


class SettingsError(IMSMRuntimeError):
    """A setting outside its range. name: the setting's; value: what it was; rule: what it must be, in which {other}
    stands for another setting's name; detail: what a library says of it, which follows as it is."""

    def __init__(self, name: str, value: object, rule: str, detail: str = "") -> None:
        super().__init__(name, value, rule, detail)
        self.name, self.value, self.rule, self.detail = name, value, rule, detail

    def told(self, spell: Callable[[str], str]) -> str:
        rule = re.sub(r"\{(\w+)\}", lambda match: spell(match[1]), self.rule)
        return f"{spell(self.name)} is {shown(self.value)}; {rule}{self.detail and ': '}{self.detail}"


def shown(value: object) -> str:
    """A value in one line, whatever it is: text as it is where that is visible and short, else as Python writes it."""
    text = str(value) if isinstance(value, str | Path) else ""
    if text.strip() and text.isprintable() and (len(text) <= LONGEST_SHOWN or isinstance(value, Path)):
        return text
    try:
        text = str(value) if isinstance(value, Number) else _REPR.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a huge {type(value).__name__}"
    return " ".join(text.split())


def _one_line(text: str) -> str:
    """A message in which a path, say, has line breaks or what else cannot be seen."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class IMSMWarning(UserWarning):
    """Something that was done in another way than it was asked for; its message is one line."""


def setting(name: str) -> str:
    """A setting's name inside a message. The marks around it are in no text that a user may give, as braces are."""
    return f"\x02{name}\x03"
