"""What can go wrong in training, as one tree.

IMSMError                 a user's mistake; the command line prints its one line and exits with `exit_code`
├── DataError             a data file or row that cannot be trained on
├── BaseModelError        a base model that cannot be loaded, or is not the one that was tuned
├── AdapterError          a PEFT method or adapter that cannot be used
├── CheckpointError       a CHECKPOINT folder or a snapshot that is missing a part or contradicts itself
├── SettingsError         a setting outside its range, or one that contradicts another
├── OutputError           an output folder that cannot be written
├── OutputExistsError     the output folder exists and `force` was not given
├── Diverged              the loss is no longer a finite number
└── Interrupted           Ctrl-C ended the training after a whole step

A message names a setting by `setting`, the rule of a SettingsError by a placeholder, such as {gate_rank}. `str` fills
in the name of the field; the command line fills in its own spelling, by `told`.
"""

from __future__ import annotations

import re
from collections.abc import Callable


class IMSMError(Exception):
    """Base of every error that a user can cause; its message is one line."""

    exit_code = 2

    def told(self, spell: Callable[[str], str]) -> str:
        """The message, with the name of every setting in it passed through `spell`."""
        return re.sub("\x02(.*?)\x03", lambda match: spell(match[1]), super().__str__())

    def __str__(self) -> str:
        return self.told(str)


class DataError(IMSMError):
    """A data file or row that cannot be trained on."""


class BaseModelError(IMSMError):
    """A base model that cannot be loaded, or is not the one that was tuned."""


class AdapterError(IMSMError):
    """A PEFT method or adapter that cannot be used."""


class CheckpointError(IMSMError):
    """A CHECKPOINT folder or a snapshot that is missing a part or contradicts itself."""


class SettingsError(IMSMError):
    """A setting outside its range, or one that contradicts another.

    name: the field of the settings. value: what it is; None if it is not given. rule: what is wrong or must hold, with
    other settings as placeholders.
    """

    def __init__(self, name: str, value: object, rule: str) -> None:
        super().__init__(name, value, rule)
        self.name = name
        self.value = value
        self.rule = rule

    def told(self, spell: Callable[[str], str]) -> str:
        return f"{spell(self.name)} is {shown(self.value)}; {_fill(self.rule, spell)}"


class OutputError(IMSMError):
    """An output folder that cannot be written."""


class OutputExistsError(IMSMError):
    """The output folder exists and `force` was not given."""


class Diverged(IMSMError):
    """The loss is no longer a finite number; a checkpoint of such a run would be useless."""


class Interrupted(IMSMError):
    """Ctrl-C ended the training after a whole step; a snapshot was written if the run has a folder for them."""

    exit_code = 130


def setting(name: str) -> str:
    """A setting's name inside a message. The marks around it are in no path that a user may give, as braces are."""
    return f"\x02{name}\x03"


def shown(value: object) -> str:
    """A value in one line: text as it is, quoted if it would be invisible or break the line."""
    if value is None:
        return "not given"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "empty"
    try:
        text = str(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a huge {type(value).__name__}"
    return text if text.strip() and text.isprintable() else repr(text)


def _fill(message: str, spell: Callable[[str], str]) -> str:
    return re.sub(r"\{([a-z]+(?:_[a-z]+)*)\}", lambda match: spell(match[1]), message)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message (with the second if it ends in a colon), or else its type's name."""
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError) and lines:  # its message is the bare key
        lines[0] = f"KeyError: {lines[0]}"
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines[0] = " ".join(f"{lines[0]} {lines[1]}".split())
    return lines[0] if lines else type(error).__name__
